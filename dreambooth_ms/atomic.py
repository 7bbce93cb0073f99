"""Files that appear whole or not at all: a temporary name in the same folder, fsync, rename; and their digests."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from dreambooth_ms.errors import WeightError

TEMPORARY_PREFIX = ".partial-"


@contextmanager
def atomic_path(target: Path, size: int = 0) -> Iterator[Path]:
    """A path to write to; on leaving, what was written takes the target's name in one step. On any error that is
    removed, and what had the name before is untouched. `size` is how many bytes it will have, if that is known: a disk
    that lacks room is told at once. Raises WeightError if the folder cannot be written to or the disk is full."""
    check_room(target, size)
    partial = target.parent / f"{TEMPORARY_PREFIX}{token_hex(4)}{target.suffix}"
    with writing(f"{target}:"):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
    with writing(f"{target}:", "free some space and try again"):
        try:
            yield partial
            sync(partial)
            partial.replace(target)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise WeightError, before long work, if a folder, or the one it is to be made in, cannot be written to."""
    with writing(f"{folder}:"), tempfile.TemporaryFile(prefix=TEMPORARY_PREFIX, dir=_nearest_that_exists(folder)):
        pass


def check_room(target: Path, size: int, advice: str = "free some space and try again") -> None:
    """Raise WeightError if the disk has no room for a file, or in a folder, beside what it is to replace."""
    with writing(f"{target}:"):
        free = shutil.disk_usage(_nearest_that_exists(target if target.is_dir() else target.parent)).free
    if size > free:
        raise WeightError(
            f"{target}: cannot be written (No space left on device: {_readable(size)} are needed, "
            f"{_readable(free)} are free); {advice}"
        )


def check_free(path: Path, other: str = "another name") -> None:
    """Raise WeightError if a name is taken; an empty folder is not. `other` is what to choose then."""
    with writing(f"{path}:", f"choose {other}"):
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken:
        raise WeightError(f"{path}: is there already; remove it, or choose {other}")


@contextmanager
def new_folder(path: Path, advice: str = "choose another place") -> Iterator[Path]:
    """A folder to write into, which takes its name when all of it is written; on any error nothing is left. Raises
    WeightError if the place cannot be written to, or the disk is full."""
    with writing(f"{path}:", advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=path.parent, ignore_cleanup_errors=True) as name:
            partial = Path(name)
            yield partial
            partial.chmod(0o755)
            partial.replace(path)
            sync(path.parent)


def _nearest_that_exists(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


def write_bytes(target: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with atomic_path(target) as partial:
        partial.write_bytes(content)


def remove_leftovers(folder: Path) -> None:
    """Remove what programs that were killed while they wrote have left in a folder and those below it."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in folders + files if name.startswith(TEMPORARY_PREFIX)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(what: str, advice: str = "choose another folder") -> Iterator[None]:
    """Inside, what is wrong with a place to write to becomes a WeightError."""
    try:
        yield
    except OSError as error:
        raise WeightError(f"{what} cannot be written ({error.strerror or error}); {advice}") from error

"""Where the bytes of a tensor are: in parts of files.

Files are read with plain reads into fresh memory, not by a memory map, whose pages would count as this program's. No
handle is kept: every read opens the file, and sees if it is still the one that was looked at first.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from operator import attrgetter
from pathlib import Path

import numpy as np

from dreambooth_ms.errors import WeightError, near
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError

_COPIED = 1 << 22
"""Bytes at a time. Few, because memory that was never touched costs a page fault for every page."""

_identity = attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")


@dataclass(frozen=True)
class FileRange:
    """A file that is only read, as it was when it was first looked at; or a part of one."""

    path: Path
    start: int
    size: int
    identity: tuple[int, ...]
    """What else than its name tells a file from others."""

    @contextmanager
    def opened(self) -> Iterator[BufferedReader]:
        """The file, open for reading.

        Raises:
            WeightError: it has changed since it was first looked at, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                if _identity(os.fstat(file.fileno())) != self.identity:
                    raise WeightError(f"{self.path}: changed while it was being read; try again")
                yield file
        except OSError as error:
            raise WeightError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from error

    def part(self, start: int, size: int) -> "FileRange":
        """Some of these bytes.

        Raises:
            FormatError: they would reach beyond the others.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise FormatError("cut short, or damaged: something in it would lie beyond its end")
        return replace(self, start=self.start + start, size=size)

    def read(self) -> bytes:
        """All of the bytes, which are few."""
        return read_values([self], DType.U8, (self.size,)).tobytes()

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of their size with the bytes."""
        with self.opened() as file:
            file.seek(self.start)
            if file.readinto(buffer) != self.size:
                raise WeightError(f"{self.path}: changed while it was being read; try again")

    def pieces(self) -> Iterator[memoryview]:
        """The bytes, some at a time: each piece takes the memory of the one before.

        Raises:
            WeightError: they cannot be read any more.
        """
        buffer = memoryview(bytearray(min(self.size, _COPIED)))
        for start in range(0, self.size, _COPIED):
            piece = buffer[: min(_COPIED, self.size - start)]
            self.part(start, len(piece)).read_into(piece)
            yield piece


@contextmanager
def reading(path: Path, kind: str) -> Iterator[FileRange]:
    """A file; inside, everything wrong with its content becomes a WeightError that names it.

    Raises:
        WeightError: no such file, or it is not readable as the given kind.
    """
    try:
        yield _source(path)
    except FormatError as error:
        raise WeightError(f"{path}: not a readable {kind} ({error}); {error.remedy}") from error


def _source(path: Path) -> FileRange:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise WeightError(f"{path}: no such file{near(path) or '; check the path'}") from error
    except (OSError, ValueError) as error:
        raise FormatError(getattr(error, "strerror", str(error))) from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("a folder" if stat.S_ISDIR(status.st_mode) else "not an ordinary file")
    return FileRange(path, 0, status.st_size, _identity(status))


def read_values(parts: Sequence[FileRange], dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """An array from bytes in row-major order that stand in parts one after the other; alone in its memory.

    Raises:
        WeightError: a file has changed, or cannot be read any more.
    """
    values = np.empty(shape, dtype.numpy)
    buffer = values.reshape(-1).view(np.uint8).data
    for part in parts:
        part.read_into(buffer[: part.size])
        buffer = buffer[part.size :]
    return values

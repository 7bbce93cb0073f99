"""Compiled graphs kept on disk, so that the next run starts sooner.

MindSpore knows the file of a graph by its place in the order of compilation alone, in one folder for the process, and
takes what it finds there (MindSpore 2.10.0, measured). So each process has an empty folder of its own for MindSpore: a
graph that is kept is copied there, to the place that comes next, just before it is compiled, and one that MindSpore
writes there is kept; then the folder is empty again.

An entry is a file named by a key. Its lines are the digest of what follows, how long the graph took to compile, and
what MindSpore's file was called up to its place; then that file. It is used only while the digest holds.
"""

import atexit
import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mindspore import nn
from mindspore.graph import api

from dreambooth_ms.atomic import TEMPORARY_PREFIX, write_bytes
from dreambooth_ms.errors import WeightError
from dreambooth_ms.runtime.graph_key import NotDescribable, graph_key

ENABLE, FOLDER = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH"
UNCHECKED = "MS_DEV_FORCE_USE_COMPILE_CACHE"
"""Keeps MindSpore from comparing the sources that it finds by the imports of the program; the key knows them all."""

MAX_BYTES = 1 << 30
"""The entries that were used last are kept, up to this size in all."""

SUFFIX = ".mindir"
"""Of the file that MindSpore writes for a graph; before it stands the graph's place in the order of compilation."""

ABANDONED_AFTER = 3600.0
"""Seconds after which nobody is still writing an unfinished entry."""


class Outlook(NamedTuple):
    """What is known of a compilation before it begins."""

    is_kept: bool = False
    """Whether the graph is read from the cache."""
    seconds: float | None = None
    """How long the graph of its kind that was used last took to compile; None if none is kept."""


class CompileCache:
    """Graphs of any process, in a folder; the size of all entries is bounded."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.found, self.kept = 0, 0
        """How many graphs this process had of it, and gave it."""
        self._is_off = False

    def compile(
        self, cell: nn.Cell, inputs: tuple[Any, ...], settings: object, kind: str, compile: Callable[[Outlook], None]
    ) -> None:
        """Let MindSpore compile a cell for such inputs, or read the graph that it has written before.

        What goes wrong with the cache is told in a warning, and the run goes on without it. `settings` decide the graph
        beside the cell, the inputs and the environment; `kind`, letters and digits, names graphs that take as long.
        """
        if self._is_off:
            return compile(Outlook())
        try:
            entry = self.folder / f"{graph_key(cell, inputs, settings)}.{kind}"
            copied = self._copy_to_mindspore(entry)
        except NotDescribable:
            return compile(Outlook())
        except OSError as error:
            self._turn_off(error)
            return compile(Outlook())
        begun = time.monotonic()
        try:
            with _mindspores.switched_on():
                compile(Outlook(is_kept=True) if copied else Outlook(seconds=self._seconds_before(kind)))
        except Exception:
            # Whether MindSpore has counted this one is not known; the next one that it writes will show.
            _mindspores.place = None
            if not copied:
                raise
            with suppress(OSError):  # MindSpore could not read it.
                entry.unlink()
        else:
            return self._keep_what_is_new(entry, copied, time.monotonic() - begun)
        finally:
            _mindspores.empty()
        return compile(Outlook())

    def _seconds_before(self, kind: str) -> float | None:
        """How long the entry of a kind that was used last took to compile."""
        with suppress(OSError, ValueError):
            newest = max(self.folder.glob(f"*.{kind}"), key=lambda entry: entry.stat().st_mtime)
            return float(newest.read_bytes().split(b"\n", 2)[1])
        return None

    def _copy_to_mindspore(self, entry: Path) -> dict[Path, int]:
        """Copy a sound entry's graph to MindSpore's folder; returns what is there now."""
        if _mindspores.place is None or not entry.exists():
            return {}
        digest, _, content = entry.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            entry.unlink(missing_ok=True)
            return {}
        _, name, graph = content.split(b"\n", 2)
        path = _mindspores.folder / f"{name.decode()}_{_mindspores.place}{SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(graph)
        return _mindspores.graphs()

    def _keep_what_is_new(self, entry: Path, copied: dict[Path, int], seconds: float) -> None:
        """Keep the graph that MindSpore has written, or note that it used what was copied there."""
        graphs = _mindspores.graphs()
        if len(graphs) != 1:
            _mindspores.place = None
            return
        (path,) = graphs
        name, _, place = str(path.relative_to(_mindspores.folder).with_suffix("")).rpartition("_")
        _mindspores.place = int(place) + 1
        try:
            if graphs == copied:
                self.found += 1
                os.utime(entry)
                return
            content = f"{seconds}\n{name}\n".encode() + path.read_bytes()
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Another process may have been first; what was copied in vain is replaced.
            if copied or not entry.exists():
                write_bytes(entry, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            self.kept += 1
            self._prune()
        except (OSError, WeightError) as error:
            self._turn_off(error)

    def _prune(self) -> None:
        """Remove what was used longest ago while all is too large, and what nobody finished."""
        files = {}
        for path in filter(Path.is_file, self.folder.iterdir()):
            with suppress(OSError):  # Another process may have removed it.
                files[path] = path.stat()
        total = sum(file.st_size for file in files.values())
        for path, file in sorted(files.items(), key=lambda item: item[1].st_mtime):
            is_unfinished = path.name.startswith(TEMPORARY_PREFIX)
            if (time.time() - file.st_mtime > ABANDONED_AFTER) if is_unfinished else total > self.max_bytes:
                path.unlink(missing_ok=True)
                total -= file.st_size

    def _turn_off(self, error: Exception) -> None:
        self._is_off = True
        warnings.warn(f"compiled graphs are not kept: {error}", stacklevel=2)


class _MindSporesCache:
    """MindSpore's own, which reads the folder's name once and counts the graphs compiled while it is switched on."""

    place: int | None = 0
    """Of the next graph; None if that is not known."""

    @cached_property
    def folder(self) -> Path:
        """The folder, made on first use and removed at the end of the process, but not of a fork of it."""
        folder, process = Path(tempfile.mkdtemp(prefix="dreambooth_ms-graphs-")), os.getpid()
        atexit.register(lambda: os.getpid() == process and shutil.rmtree(folder, ignore_errors=True))
        return folder

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Inside, what is compiled goes through MindSpore's cache."""
        if not os.path.isfile(api.entry_script_path or ""):
            # MindSpore reads the program's file, whose imports UNCHECKED makes it ignore; `python -c` has none.
            api.entry_script_path = __file__
        environment = {ENABLE: "1", FOLDER: str(self.folder), UNCHECKED: "1"}
        before = {name: os.environ[name] for name in environment if name in os.environ}
        os.environ |= environment
        try:
            yield
        finally:
            for name in environment:
                del os.environ[name]
            os.environ |= before

    def graphs(self) -> dict[Path, int]:
        """The files of the graphs that are there, with their times."""
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob(f"*{SUFFIX}")}

    def empty(self) -> None:
        """Remove the files, so that MindSpore finds none but those that are copied there."""
        for path in self.folder.iterdir():
            shutil.rmtree(path, ignore_errors=True)


_mindspores = _MindSporesCache()
_cache: CompileCache | None = None
_wish: str | None = None


def set_up_compile_cache(by_default: bool) -> None:
    """Keep graphs from now on or not, as MS_COMPILER_CACHE_ENABLE (1 or 0), else `by_default`, says, in the folder that
    MS_COMPILER_CACHE_PATH names."""
    global _cache, _wish
    _wish = os.environ.get(ENABLE, _wish)
    if _wish != "0":
        # Or MindSpore would use its cache in its own way; 0 it understands.
        os.environ.pop(ENABLE, None)
    named = os.environ.pop(FOLDER, None)
    folder = Path(named) if named else _cache.folder if _cache else default_folder()
    is_on = _wish != "0" if _wish is not None else by_default
    _cache = CompileCache(folder.absolute()) if folder and is_on else None


def compile_cache() -> CompileCache | None:
    """The cache in use, if any."""
    return _cache


@contextmanager
def use_compile_cache(cache: CompileCache | None) -> Iterator[None]:
    """Inside, this cache is in use."""
    global _cache
    before, _cache = _cache, cache
    try:
        yield
    finally:
        _cache = before


def default_folder() -> Path | None:
    """Where graphs are kept if MS_COMPILER_CACHE_PATH names no folder; None where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    caches = named if os.path.isabs(named) else os.path.expanduser("~/.cache")
    return Path(caches, "dreambooth_ms", "graphs") if os.path.isabs(caches) else None

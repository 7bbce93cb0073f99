"""Where the bytes of a tensor are: in parts of files, as they are or compressed.

Files are read with plain reads into fresh memory, not by a memory map, whose pages would count as this program's. No
handle is kept: every read opens the file, and sees if it is still the one that was looked at first.
"""

import os
import stat
import zipfile
import zlib
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
class SourceFile:
    """A file that is only read, as it was when it was first looked at."""

    path: Path
    size: int
    _identity: tuple[int, ...]

    @contextmanager
    def opened(self) -> Iterator[BufferedReader]:
        """The file, open for reading.

        Raises:
            WeightError: it has changed since it was first looked at, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                if _identity(os.fstat(file.fileno())) != self._identity:
                    raise WeightError(f"{self.path}: changed while it was being read; try again")
                yield file
        except OSError as error:
            raise WeightError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from error

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`.

        Raises:
            FormatError: they reach beyond the file.
        """
        return read_bytes(FileRange(self, start, count))


@contextmanager
def reading(path: Path, kind: str) -> Iterator[SourceFile]:
    """A file; inside, everything wrong with its content becomes a WeightError that names it.

    Raises:
        WeightError: no such file, or it is not readable as the given kind.
    """
    try:
        yield _source(path)
    except FormatError as error:
        raise WeightError(f"{path}: not a readable {kind} ({error}); {error.remedy}") from error


def _source(path: Path) -> SourceFile:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise WeightError(f"{path}: no such file{near(path) or '; check the path'}") from error
    except (OSError, ValueError) as error:
        raise FormatError(getattr(error, "strerror", str(error))) from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("a folder" if stat.S_ISDIR(status.st_mode) else "not an ordinary file")
    return SourceFile(path, status.st_size, _identity(status))


@dataclass(frozen=True)
class FileRange:
    """A part of a file as it is.

    Raises:
        FormatError: it would reach beyond the file.
    """

    file: SourceFile
    start: int
    size: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.size < 0 or self.start + self.size > self.file.size:
            raise FormatError("cut short, or damaged: something in it would lie beyond its end")

    def part(self, start: int, size: int) -> "FileRange":
        """Some of these bytes."""
        return FileRange(self.file, self.start + start, size)

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of their size with the bytes."""
        with self.file.opened() as file:
            file.seek(self.start)
            if file.readinto(buffer) != self.size:
                raise WeightError(f"{self.file.path}: changed while it was being read; try again")

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


@dataclass(frozen=True)
class DeflatedRange:
    """Bytes of an entry that was compressed; the standard library inflates no more at a time than is asked for."""

    compressed: FileRange
    entry: zipfile.ZipInfo
    start: int
    size: int

    def part(self, start: int, size: int) -> "DeflatedRange":
        """Some of these bytes."""
        return replace(self, start=self.start + start, size=size)

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of their size with the bytes; those before them are inflated and dropped."""
        with self.compressed.file.opened() as file:
            file.seek(self.compressed.start)
            try:
                content = zipfile.ZipExtFile(file, "r", self.entry)
                content.seek(self.start)
                if content.readinto(buffer) < self.size:
                    raise EOFError("what was compressed in it is shorter than declared")
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                path = self.compressed.file.path
                raise WeightError(
                    f"{path}: not a readable compressed archive ({error}); copy or download it again"
                ) from error


ByteRange = FileRange | DeflatedRange


def read_bytes(source: ByteRange) -> bytes:
    """All of some bytes, which are few."""
    return read_values([source], DType.U8, (source.size,)).tobytes()


def read_values(parts: Sequence[ByteRange], dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
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

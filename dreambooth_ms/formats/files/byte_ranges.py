"""Where the bytes of a tensor are: in a part of a file, in a compressed part, or in several parts one after the other.

Files are read with plain reads into fresh memory, not by a memory map, whose pages would count as this program's. No
handle is kept: every read opens the file, and sees if it is still the one that was looked at first.
"""

import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError, unreadable

_PIECE = 1 << 20
_COPIED = 1 << 22


@dataclass(frozen=True)
class SourceFile:
    """A file that is only read, as it was when it was first looked at."""

    path: Path
    size: int
    _identity: tuple[int, ...]

    @classmethod
    def at(cls, path: Path) -> "SourceFile":
        """Look at a file.

        Raises:
            OSError: there is none.
            FormatError: something else has this name, such as a folder or a pipe.
        """
        try:
            status = path.stat()
        except ValueError as error:
            raise FormatError(str(error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("a folder" if stat.S_ISDIR(status.st_mode) else "not an ordinary file")
        return cls(path, status.st_size, _identity(status))

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
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
        self.check(start, count)
        with self.opened() as file:
            file.seek(start)
            return file.read(count)

    def check(self, start: int, count: int) -> None:
        """Whether a part lies within the file.

        Raises:
            FormatError: it does not.
        """
        if start < 0 or count < 0 or start + count > self.size:
            raise FormatError("cut short, or damaged: something in it would lie beyond its end")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class ByteRange(Protocol):
    """Some bytes that can be brought into memory."""

    @property
    def size(self) -> int:
        """How many there are."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer with those from `start` on, which must be that many.

        Raises:
            WeightError: they cannot be read any more.
        """


@dataclass(frozen=True)
class FileRange:
    """A part of a file as it is."""

    file: SourceFile
    start: int
    size: int

    def __post_init__(self) -> None:
        self.file.check(self.start, self.size)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on."""
        with self.file.opened() as file:
            file.seek(self.start + start)
            filled = 0
            while filled < len(buffer):
                count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
                if not count:
                    raise WeightError(f"{self.file.path}: changed while it was being read; try again")
                filled += count

    def copy_to(self, target: BinaryIO) -> None:
        """Append the bytes to a file: within the kernel where it can, else by way of a small buffer.

        Raises:
            WeightError: they cannot be read any more.
            OSError: the file cannot be written to.
        """
        failure = None
        target.flush()
        with self.file.opened() as source:
            sent = _send(source, target, self.start, self.size)
            source.seek(self.start + sent)
            # Small, because memory that was never touched costs a page fault for every page.
            buffer = memoryview(bytearray(min(self.size - sent, _COPIED)))
            while sent < self.size and failure is None:
                count = source.readinto(buffer[: min(self.size - sent, _COPIED)])  # type: ignore[attr-defined]
                if not count:
                    raise WeightError(f"{self.file.path}: changed while it was being read; try again")
                sent += count
                try:
                    target.write(buffer[:count])
                except OSError as error:
                    failure = error  # Of the target; within, it would be taken for one of the source.
        if failure is not None:
            raise failure

    def part(self, start: int, size: int) -> "FileRange":
        """Some of these bytes."""
        return FileRange(self.file, self.start + start, size)


def _send(source: BinaryIO, target: BinaryIO, start: int, size: int) -> int:
    """Copy bytes from file to file without bringing them here; returns how many, 0 where the system cannot do it."""
    sent = 0
    if sys.platform == "linux":
        with suppress(OSError):
            while sent < size and (count := os.sendfile(target.fileno(), source.fileno(), start + sent, size - sent)):
                sent += count
    return sent


@dataclass(frozen=True)
class DeflatedRange:
    """A part of a file that was compressed, as zip archives do it."""

    compressed: FileRange
    size: int
    """Bytes after decompression, as the archive declares them."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on; those before are decompressed and dropped."""
        position = 0
        for piece in self._pieces():
            begin, end = max(start, position), min(start + len(buffer), position + len(piece))
            if begin < end:
                buffer[begin - start : end - start] = piece[begin - position : end - position]
            position += len(piece)
            if position >= start + len(buffer):
                return
        path = self.compressed.file.path
        raise unreadable(path, "compressed archive", "what was compressed in it is shorter than declared")

    def _pieces(self) -> Iterator[bytes]:
        """The decompressed bytes, in pieces that bound the memory whatever the compressed ones say."""
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        left = self.compressed.size
        with self.compressed.file.opened() as file:
            file.seek(self.compressed.start)
            pending = b""
            while not inflate.eof:
                if not pending:
                    pending = file.read(min(_PIECE, left))
                    left -= len(pending)
                    if not pending:
                        return
                try:
                    yield inflate.decompress(pending, _PIECE)
                except zlib.error as error:
                    raise unreadable(self.compressed.file.path, "compressed archive", str(error)) from error
                pending = inflate.unconsumed_tail


@dataclass(frozen=True)
class JoinedRanges:
    """Several parts one after the other."""

    parts: Sequence[ByteRange]

    @property
    def size(self) -> int:
        """The sum of the parts."""
        return sum(part.size for part in self.parts)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on."""
        position, filled = 0, 0
        for part in self.parts:
            begin = start + filled - position
            count = min(part.size - begin, len(buffer) - filled)
            if begin >= 0 and count > 0:
                part.read_into(begin, buffer[filled : filled + count])
                filled += count
            position += part.size


def read_values(source: ByteRange, dtype: DType, shape: tuple[int, ...], start: int = 0) -> np.ndarray:
    """An array from the bytes at `start`, in row-major order; alone in its memory.

    Raises:
        WeightError: the file has changed, or cannot be read any more.
    """
    values = np.empty(shape, dtype.numpy)
    source.read_into(start, values.reshape(-1).view(np.uint8).data)
    return values

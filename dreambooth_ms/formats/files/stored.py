"""A tensor that is not in memory yet, a file of such tensors, and where their bytes are: in parts of files.

Files are read with plain reads into fresh memory, not by a memory map, whose pages would count as this program's. No
handle is kept: every read opens the file, and sees if it is still the one that was looked at first.
"""

import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from io import BufferedReader
from operator import attrgetter
from pathlib import Path
from typing import IO

import numpy as np

from dreambooth_ms.errors import WeightError, near
from dreambooth_ms.formats.files.dtypes import DType, cast, is_finite
from dreambooth_ms.formats.files.format_error import FormatError, quoted

MAX_TENSORS = 200_000
"""More names than this are no model, but an attempt to fill the memory."""

MAX_DIMENSIONS = 32
"""Of numpy's arrays."""

Progress = Callable[[int], object]
"""Told while a file is written: the number of bytes since the last call."""

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
        """The file, open for reading; WeightError if it has changed since it was first looked at, or cannot be read."""
        try:
            with self.path.open("rb") as file:
                if _identity(os.fstat(file.fileno())) != self.identity:
                    raise WeightError(f"{self.path}: changed while it was being read; try again")
                yield file
        except OSError as error:
            raise WeightError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from error

    def part(self, start: int, size: int) -> "FileRange":
        """Some of these bytes; FormatError if they would reach beyond the others."""
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
        """The bytes, some at a time: each piece takes the memory of the one before."""
        buffer = memoryview(bytearray(min(self.size, _COPIED)))
        for start in range(0, self.size, _COPIED):
            piece = buffer[: min(_COPIED, self.size - start)]
            self.part(start, len(piece)).read_into(piece)
            yield piece


@contextmanager
def reading(path: Path, kind: str) -> Iterator[FileRange]:
    """A file; inside, everything wrong with it and its content becomes a WeightError that names it and its kind."""
    try:
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise WeightError(f"{path}: no such file{near(path) or '; check the path'}") from error
        except (OSError, ValueError) as error:
            raise FormatError(getattr(error, "strerror", str(error))) from error
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("a folder" if stat.S_ISDIR(status.st_mode) else "not an ordinary file")
        yield FileRange(path, 0, status.st_size, _identity(status))
    except FormatError as error:
        raise WeightError(f"{path}: not a readable {kind} ({error}); {error.remedy}") from error


def read_values(parts: Sequence[FileRange], dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """An array from bytes in row-major order that stand in parts one after the other; alone in its memory."""
    values = np.empty(shape, dtype.numpy)
    buffer = values.reshape(-1).view(np.uint8).data
    for part in parts:
        part.read_into(buffer[: part.size])
        buffer = buffer[part.size :]
    return values


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type are known; the values come when they are read, and are not kept. It stands for what a file holds
    and for what is to be written: a changed shape or name needs no values."""

    shape: tuple[int, ...]
    dtype: DType
    load: Callable[[], np.ndarray] = field(repr=False)
    """Fetches or makes the values; called once per reading."""
    ranges: tuple[FileRange, ...] = field(default=(), repr=False)
    """Where the bytes of the values stand as they are, one range after the other; empty if nowhere."""
    label: str = ""
    """Its file and name, of a tensor that ends the reading if NaN or infinity is in it; empty if it may hold any."""

    @property
    def byte_count(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, in memory; bfloat16 as bit patterns. WeightError where there is a label, and NaN or infinity."""
        values = self.load()
        assert values.shape == self.shape, f"{values.shape} instead of {self.shape}"
        assert values.dtype == self.dtype.numpy, f"{values.dtype} instead of {self.dtype.value}"
        self._check(raw_bytes(values))
        return values

    def write_to(self, file: IO[bytes]) -> None:
        """Append what `read` gives to a file, in row-major order; without a copy in memory where a file holds it so."""
        if not self.ranges:
            file.write(raw_bytes(self.read()))
        for one in self.ranges:
            for piece in one.pieces():
                self._check(piece)
                file.write(piece)

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity; reads the values."""
        pieces = (piece for one in self.ranges for piece in one.pieces()) if self.ranges else [raw_bytes(self.load())]
        return all(is_finite(piece, self.dtype) for piece in pieces)

    def cast_to(self, dtype: DType) -> "StoredTensor":
        """The same tensor in another float type; integers and truth values stay as they are."""
        if dtype is self.dtype or not (dtype.is_float and self.dtype.is_float):
            return self

        def load() -> np.ndarray:
            values = cast(self.read(), self.dtype, dtype)
            if self.label and not is_finite(raw_bytes(values), dtype):
                raise WeightError(
                    f"{self.label}: holds a number that is too large for {dtype.value}; choose a wider type"
                )
            return values

        return StoredTensor(self.shape, dtype, load)

    def _check(self, values: memoryview) -> None:
        if self.label and not is_finite(values, self.dtype):
            raise WeightError(f"{self.label}: holds NaN or infinity; download it again, or take another file")

    @classmethod
    def of(cls, values: np.ndarray, dtype: DType | None = None, label: str = "") -> "StoredTensor":
        """An array that is in memory; `dtype` marks bit patterns of bfloat16."""
        dtype = dtype or DType.of(values)
        return cls(values.shape, dtype, lambda: values.astype(dtype.numpy, copy=False), label=label)

    @classmethod
    def in_files(cls, shape: tuple[int, ...], dtype: DType, *ranges: FileRange) -> "StoredTensor":
        """A tensor whose bytes stand in files as they are, one range after the other."""
        return cls(shape, dtype, partial(read_values, ranges, dtype, shape), ranges)


class Container(Enum):
    """The kinds of files and folders that hold tensors, as they are called in messages."""

    SAFETENSORS = "safetensors file"
    TORCH_ZIP = "PyTorch checkpoint"
    TORCH_LEGACY = "PyTorch checkpoint of a version before 1.6"
    MINDSPORE = "MindSpore checkpoint"
    SHARDED = "sharded model's index"
    FOLDER = "folder"


@dataclass(frozen=True)
class TensorFile:
    """What a file holds."""

    path: Path
    container: Container
    tensors: Mapping[str, StoredTensor]
    """By name, in the order of the file."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Other groups of tensors in the same file that were passed over: where they stand -> how many."""


def checked_byte_count(shape: Sequence[int], dtype: DType) -> int:
    """Size in bytes of a tensor that a file declares; FormatError if no array can have its shape."""
    if len(shape) > MAX_DIMENSIONS or any(type(length) is not int or length < 0 for length in shape):
        raise FormatError(f"impossible shape {quoted(shape)}")
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 2**62:
        raise FormatError(f"impossibly large shape {quoted(shape)}")
    return math.prod(shape) * dtype.itemsize


def check_names(names: Sequence[str]) -> None:
    """Stop, by a FormatError, if a file declares too many names, or one that is no valid text."""
    if len(names) > MAX_TENSORS:
        raise FormatError(f"{len(names)} tensors; at most {MAX_TENSORS} are read")
    for name in names:
        if not is_valid_text(name):
            raise FormatError(f"the name {quoted(name)} is no valid text")


def is_valid_text(text: str) -> bool:
    """Whether a text can be written again; files can hold halves of characters."""
    return not re.search("[\ud800-\udfff]", text)


def total_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    """Size of the values of all tensors."""
    return sum(tensor.byte_count for tensor in tensors.values())


def raw_bytes(values: np.ndarray) -> memoryview:
    """An array's values in row-major order, as files store them."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

"""A tensor that is not in memory yet, and a file of such tensors."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.byte_ranges import FileRange, read_values
from dreambooth_ms.formats.files.dtypes import DType, cast, is_finite
from dreambooth_ms.formats.files.format_error import FormatError, quoted

MAX_TENSORS = 200_000
"""More names than this are no model, but an attempt to fill the memory."""

MAX_DIMENSIONS = 32
"""Of numpy's arrays."""

Progress = Callable[[int], object]
"""Told while a file is written: the number of bytes since the last call."""


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type are known; the values come when they are read, and are not kept.

    It stands for what a file holds and for what is to be written: a changed shape or name needs no values.
    """

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
        """The values, in memory; bfloat16 as bit patterns.

        Raises:
            WeightError: the file cannot be read any more; or it has a label, and holds NaN or infinity.
        """
        values = self.load()
        assert values.shape == self.shape, f"{values.shape} instead of {self.shape}"
        assert values.dtype == self.dtype.numpy, f"{values.dtype} instead of {self.dtype.value}"
        self._check(raw_bytes(values))
        return values

    def write_to(self, file: BinaryIO) -> None:
        """Append the values to a file, in row-major order; without a copy in memory where a file holds them so.

        Raises:
            WeightError: as in `read`.
        """
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
    """What a file holds. No handle stays open: a tensor opens the file when it is read, and sees if it was replaced."""

    path: Path
    container: Container
    tensors: Mapping[str, StoredTensor]
    """By name, in the order of the file."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Other groups of tensors in the same file that were passed over: where they stand -> how many."""


def checked_byte_count(shape: Sequence[int], dtype: DType) -> int:
    """Size in bytes of a tensor that a file declares.

    Raises:
        FormatError: no array can have this shape.
    """
    if len(shape) > MAX_DIMENSIONS or any(type(length) is not int or length < 0 for length in shape):
        raise FormatError(f"impossible shape {quoted(shape)}")
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 2**62:
        raise FormatError(f"impossibly large shape {quoted(shape)}")
    return math.prod(shape) * dtype.itemsize


def check_names(names: Sequence[str]) -> None:
    """Names as a file declares them.

    Raises:
        FormatError: there are too many, or one is no valid text.
    """
    if len(names) > MAX_TENSORS:
        raise FormatError(f"{len(names)} tensors; at most {MAX_TENSORS} are read")
    for name in names:
        if not is_valid_text(name):
            raise FormatError(f"the name {quoted(name)} is no valid text")


def is_valid_text(text: str) -> bool:
    """Whether a text can be written again; files can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tensors_digest(tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, in hexadecimal; whatever file they are in.

    Raises:
        WeightError: a tensor cannot be read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype.value} {tensor.shape}\n".encode())
        digest.update(raw_bytes(tensor.read()))
    return digest.hexdigest()


def total_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    """Size of the values of all tensors."""
    return sum(tensor.byte_count for tensor in tensors.values())


def raw_bytes(values: np.ndarray) -> memoryview:
    """An array's values in row-major order, as files store them."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

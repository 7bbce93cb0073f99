"""Element types of stored tensors, and casts between those that are floats.

numpy has no bfloat16: its values are carried as uint16 bit patterns, and only the dtype beside them says so.
"""

from enum import Enum

import numpy as np


class DType(Enum):
    """The type of a tensor's elements, in safetensors' spelling; with its type in numpy and its names elsewhere."""

    F64 = "F64", "<f8", "Float64", "DoubleStorage"
    F32 = "F32", "<f4", "Float32", "FloatStorage"
    F16 = "F16", "<f2", "Float16", "HalfStorage"
    BF16 = "BF16", "<u2", "BFloat16", "BFloat16Storage"
    I64 = "I64", "<i8", "Int64", "LongStorage"
    I32 = "I32", "<i4", "Int32", "IntStorage"
    I16 = "I16", "<i2", "Int16", "ShortStorage"
    I8 = "I8", "i1", "Int8", "CharStorage"
    U64 = "U64", "<u8", "UInt64", None
    U32 = "U32", "<u4", "UInt32", None
    U16 = "U16", "<u2", "UInt16", None
    U8 = "U8", "u1", "UInt8", "ByteStorage"
    BOOL = "BOOL", "?", "Bool", "BoolStorage"

    numpy: np.dtype
    """The array type that carries the values, little-endian."""
    mindspore: str
    """The name in MindSpore's checkpoints."""
    storage: str | None
    """The class in PyTorch's checkpoints; None for types that came after these classes."""

    def __new__(cls, name: str, numpy: str, mindspore: str, storage: str | None) -> "DType":
        """A member, whose value is its first column."""
        member = object.__new__(cls)
        member._value_, member.numpy, member.mindspore, member.storage = name, np.dtype(numpy), mindspore, storage
        return member

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize

    @property
    def is_float(self) -> bool:
        """Whether it can be cast to the other floats."""
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @classmethod
    def of(cls, values: np.ndarray) -> "DType":
        """The type of an array's values; ValueError if no file has it. uint16 is numbers, not bfloat16."""
        found = {dtype.numpy: dtype for dtype in cls if dtype is not DType.BF16}.get(values.dtype.newbyteorder("<"))
        if found is None:
            raise ValueError(f"arrays of {values.dtype} cannot be stored")
        return found


def cast(values: np.ndarray, source: DType, target: DType) -> np.ndarray:
    """Values of one float type as another; the same array if the types are the same.

    Rounds to nearest, ties to even. What is too large becomes infinite, NaN stays NaN. float64 becomes bfloat16 by way
    of float32, as in PyTorch. ValueError if one of the types is no float.
    """
    if source is target:
        return values
    if not (source.is_float and target.is_float):
        raise ValueError(f"cannot cast {source.value} to {target.value}")
    if source is DType.BF16:
        bits = values.astype(np.uint32)
        bits <<= np.uint32(16)
        values = bits.view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if target is DType.BF16:
            return _round_to_bfloat16(values.astype(np.float32, copy=False))
        return values.astype(target.numpy, copy=False)


DTYPES = {"fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16}
"""The floats by the names that flags have for them."""

_EXPONENTS = {DType.F64: 0x7FF << 52, DType.F32: 0x7F800000, DType.F16: 0x7C00, DType.BF16: 0x7F80}
"""The bits that are all set in NaN and infinity alone."""

_LOOKED_AT = 1 << 18
"""Bytes at a time, which stay in a processor's own memory."""


def is_finite(values: memoryview, dtype: DType) -> bool:
    """Whether none of some floats, as files store them, is NaN or infinity; what is no float is finite."""
    if not dtype.is_float:
        return True
    exponent, step = _EXPONENTS[dtype], _LOOKED_AT // dtype.itemsize
    bits = np.frombuffer(values, f"<u{dtype.itemsize}", len(values) // dtype.itemsize)
    return all((bits[at : at + step] & exponent).max() < exponent for at in range(0, len(bits), step))


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, plus one if the lower half is more than half of its last place, or just half
    and the upper half odd.

    In place as far as it goes: beside values of 4 bytes it needs 4 + 2 + 1 bytes per element.
    """
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    patterns = rounded.astype(np.uint16)
    not_numbers = np.isnan(values.reshape(-1))
    # A NaN whose payload stands in the lower half would become infinite, so its quiet bit is set.
    patterns[not_numbers] = (bits[not_numbers] >> 16) | 0x40
    return patterns.reshape(values.shape)

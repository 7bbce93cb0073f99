"""Casts between the floats of files: to the nearest value, and no bit is lost where none must be."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType, cast
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import Container, StoredTensor

FLOATS = [dtype for dtype in DType if dtype.is_float]


def test_bfloat16_is_the_upper_half_of_float32():
    patterns = np.arange(1 << 16, dtype=np.uint16)
    wide = cast(patterns, DType.BF16, DType.F32)
    assert wide.dtype == np.float32
    assert np.array_equal(wide.view(np.uint32), patterns.astype(np.uint32) << 16)


def test_every_bfloat16_survives_the_way_over_float32():
    """But that a NaN may become a quiet one."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    wide = cast(patterns, DType.BF16, DType.F32)
    back = cast(wide, DType.F32, DType.BF16)
    number = ~np.isnan(wide)
    assert np.array_equal(back[number], patterns[number])
    assert np.array_equal(back[~number], patterns[~number] | 0x40)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bfloat16_is_the_nearest_and_of_two_the_even_one(value):
    rounded = int(cast(np.array([value], np.float32), DType.F32, DType.BF16)[0])
    # In float64, so that distances are exact; 3.4e38 is halfway between the largest number and what would follow.
    neighbours = [pattern for pattern in range(rounded - 1, rounded + 2) if 0 <= pattern < 1 << 16]
    wide = {p: float(cast(np.array([p], np.uint16), DType.BF16, DType.F32)[0]) for p in neighbours}
    wide = {p: np.copysign(2.0**128, w) if np.isinf(w) else w for p, w in wide.items() if not np.isnan(w)}
    distances = {p: abs(w - value) for p, w in wide.items() if np.signbit(w) == np.signbit(value)}
    assert distances[rounded] == min(distances.values())
    tied = [p for p, distance in distances.items() if distance == distances[rounded]]
    assert len(tied) == 1 or rounded % 2 == 0


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (0x3F808000, 0x3F80),  # halfway, the lower one is even
        (0x3F818000, 0x3F82),  # halfway, the upper one is even
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 is infinite
        (0xFF7FFFFF, 0xFF80),
        (0x00000001, 0x0000),
        (0x80000000, 0x8000),
        (0x7F800001, 0x7FC0),  # a NaN whose payload is in the lower half
        (0xFFFFFFFF, 0xFFFF),
    ],
)
def test_special_values_of_bfloat16(pattern, expected):
    assert cast(np.array(pattern, np.uint32).view(np.float32), DType.F32, DType.BF16) == expected


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_every_float_becomes_every_other(source, target):
    values = np.array([0.0, -0.0, 1.0, -2.5, 0.5, 448.0, np.inf, -np.inf, np.nan], np.float32)
    held = cast(values, DType.F32, source)
    assert held.dtype == source.numpy
    found = cast(held.reshape(3, 3), source, target)
    assert (found.shape, found.dtype) == ((3, 3), target.numpy)
    assert np.array_equal(cast(found, target, DType.F32).ravel(), values, equal_nan=True)
    assert np.array_equal(np.signbit(cast(found, target, DType.F32)).ravel(), np.signbit(values))


@pytest.mark.parametrize("dtype", DType)
def test_the_same_type_is_the_same_array(dtype):
    values = np.zeros(2, dtype.numpy)
    assert cast(values, dtype, dtype) is values


@pytest.mark.filterwarnings("error")
def test_what_is_too_large_becomes_infinite_without_a_word():
    values = np.array([1e300, -1e300, 1e-300])
    assert np.array_equal(cast(values, DType.F64, DType.F16), np.array([np.inf, -np.inf, 0], np.float16))
    assert cast(values, DType.F64, DType.BF16).tolist() == [0x7F80, 0xFF80, 0]


def test_numbers_without_an_axis_keep_having_none():
    assert cast(np.array(2.5, np.float32), DType.F32, DType.BF16).shape == ()
    assert cast(np.array(0x4020, np.uint16), DType.BF16, DType.F32).shape == ()


def test_integers_are_not_cast():
    with pytest.raises(ValueError, match="cannot cast I64 to F16"):
        cast(np.zeros(1, np.int64), DType.I64, DType.F16)
    positions = StoredTensor.of(np.arange(3))
    assert positions.cast_to(DType.F16) is positions


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("at", [0, 12345, 299_999])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found_wherever_they_are(tmp_path, dtype, at, bad):
    values = np.full(300_000, -1.5)
    values[:2] = 0.0, float(np.finfo(np.float16).max)
    good = StoredTensor.of(values.copy()).cast_to(dtype)
    values[at] = bad
    broken = StoredTensor.of(values).cast_to(dtype)
    write_safetensors(tmp_path / "file", {"good": good, "broken": broken})
    stored = open_tensor_file(tmp_path / "file", Container.SAFETENSORS).tensors
    for found in (stored, {"good": good, "broken": broken}):
        assert {name: tensor.is_finite() for name, tensor in found.items()} == {"good": True, "broken": False}
    labelled = {name: replace(tensor, label=f"x: {name}") for name, tensor in stored.items()}
    labelled["good"].read(), labelled["good"].write_to(io.BytesIO())
    for use in (lambda tensor: tensor.read(), lambda tensor: tensor.write_to(io.BytesIO())):
        with pytest.raises(WeightError, match="x: broken: holds NaN or infinity; download it again"):
            use(labelled["broken"])


def test_what_is_no_float_is_finite():
    assert StoredTensor.of(np.full(3, -1)).is_finite()
    assert StoredTensor.of(np.zeros(0, np.float32)).is_finite()


def test_a_number_too_large_for_the_type_that_is_asked_for_is_refused_where_it_matters():
    tensor = StoredTensor.of(np.array([1e5], np.float32))
    assert np.isinf(tensor.cast_to(DType.F16).read()).all()
    with pytest.raises(WeightError, match="x: a: holds a number that is too large for F16; choose a wider type"):
        replace(tensor, label="x: a").cast_to(DType.F16).read()
    assert replace(tensor, label="x: a").cast_to(DType.BF16).is_finite()


def test_a_stored_tensor_is_cast_when_it_is_read():
    tensor = StoredTensor.of(np.array([1, 2.5], np.float32)).cast_to(DType.BF16)
    assert (tensor.dtype, tensor.shape, tensor.byte_count) == (DType.BF16, (2,), 4)
    assert tensor.read().tolist() == [0x3F80, 0x4020]
    assert tensor.cast_to(DType.BF16) is tensor

"""Tensors for files: of every type and shape, with random bits."""

import numpy as np

from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.stored import StoredTensor

RNG = np.random.default_rng(0)
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (2, 3), (2, 1, 3, 2)]


def random_tensor(dtype, shape):
    """Random bytes: among them NaNs with payloads, infinities and subnormal numbers."""
    count = int(np.prod(shape))
    if dtype is DType.BOOL:
        return StoredTensor.of(RNG.integers(0, 2, shape).astype(bool), dtype)
    values = np.frombuffer(RNG.bytes(count * dtype.itemsize), dtype.numpy).reshape(shape)
    return StoredTensor.of(values, dtype)


def one_of_each():
    return {f"{dtype.value} {shape}": random_tensor(dtype, shape) for dtype in DType for shape in SHAPES}


def numbers(*shape):
    return StoredTensor.of(RNG.standard_normal(shape, dtype=np.float32))


def bits(tensor):
    return tensor.read().tobytes()


def same(found, expected):
    return found.keys() == expected.keys() and all(
        (found[name].shape, found[name].dtype, bits(found[name])) == (tensor.shape, tensor.dtype, bits(tensor))
        for name, tensor in expected.items()
    )


def written_shapes(plan, public):
    """The shapes of the tensors that a plan writes, for the public shapes; constants have none."""
    return {name: own.shape([public[piece] for piece in own.pieces]) for name, own in plan.tensors.items()}

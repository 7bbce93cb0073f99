"""Operations on tensors that are no images, each in the form of the formulation in which its graph is compiled."""

from mindspore import Tensor, ops

from dreambooth_ms.ops import ascend
from dreambooth_ms.ops.graph import on_ascend


def equal_parts(x: Tensor, count: int, axis: int) -> tuple[Tensor, ...]:
    """So many parts of the same size, along an axis."""
    return ascend.equal_parts(x, count, axis) if on_ascend() else ops.split(x, x.shape[axis] // count, axis)


def part(x: Tensor, start: int, length: int) -> Tensor:
    """So many entries of the first axis."""
    if length == x.shape[0]:
        return x
    if on_ascend():
        return ascend.part(x, 0, start, length)
    return ops.slice(x, (start,) + (0,) * (x.ndim - 1), (length,) + x.shape[1:])


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Entries of a table (size, ...), by their numbers (N...) int32 -> (N..., ...)."""
    return ascend.look_up(table, ids) if on_ascend() else ops.gather(table, ids, 0)


def mean(x: Tensor, axes: tuple[int, ...], keep_dims: bool = False) -> Tensor:
    """The mean over some axes."""
    return ascend.mean(x, axes, keep_dims) if on_ascend() else x.mean(axes, keep_dims)


def exclusive_or(x: Tensor, y: Tensor) -> Tensor:
    """Bit by bit, of integers of one shape."""
    return ascend.exclusive_or(x, y) if on_ascend() else ops.bitwise_xor(x, y)


def bitwise_and(x: Tensor, y: int) -> Tensor:
    """Of integers."""
    return ascend.bitwise_and(x, y) if on_ascend() else ops.bitwise_and(x, y)

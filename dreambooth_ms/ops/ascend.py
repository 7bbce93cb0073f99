"""The operators of the Ascend formulation, in the forms that MindSpore reaches by aclnn, CANN's newer interface.

Kernels of that interface come compiled; those of the older one, which most of MindSpore's older forms take, CANN
compiles for each shape when it is first used. Which form takes which was seen in MindSpore's simulation
(docs/ascend.md). Forms that give a view of a tensor, such as `mint.chunk`, are not among them: they make MindSpore copy
parameters. CPU has no kernels for some, so `tools.formulation` puts others in their place there.
"""

from mindspore import Tensor, mint, ops
from mindspore.mint.nn import functional
from mindspore.ops.auto_generate import slice_ext_op, split_with_size_op

Padding = tuple[int, int, int, int]
"""Zero rows and columns added at the top, bottom, left and right."""

mean, exclusive_or, bitwise_and, linear = mint.mean, mint.bitwise_xor, mint.bitwise_and, functional.linear
"""See `ops.anywhere` and `ops.linear`."""


def convolution(x_BIHW: Tensor, weight: Tensor, bias_O: Tensor | None, stride: int, padding: Padding) -> Tensor:
    """(B, I, H, W), (O, I, k, k), (O,) -> (B, O, H', W')."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x_BIHW = functional.pad(x_BIHW, (left, right, top, bottom))
        top, left = 0, 0
    return functional.conv2d(x_BIHW, weight, bias_O, stride, (top, left))


def layer_norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """(N, C) -> (N, C)."""
    return functional.layer_norm(x_NC, weight_C.shape, weight_C, bias_C, eps)


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Entries of a table (size, ...), by their numbers (N...) int32 -> (N..., ...)."""
    rows = mint.index_select(table, 0, ops.reshape(ids, (-1,)))
    return ops.reshape(rows, ids.shape + table.shape[1:])


def equal_parts(x: Tensor, count: int, axis: int) -> tuple[Tensor, ...]:
    """So many parts of the same size, along an axis."""
    return split_with_size_op(x, (x.shape[axis] // count,) * count, axis)


def widen(x: Tensor, width: int) -> Tensor:
    """The last axis with zeros behind it, up to this width."""
    return functional.pad(x, (0, width - x.shape[-1]))


def part(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    """So many entries of an axis."""
    return slice_ext_op(x, axis, start, start + length, 1)

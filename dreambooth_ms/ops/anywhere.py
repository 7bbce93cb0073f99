"""Operations on tensors that are no images, each in the form of the formulation in which its graph is compiled."""

from mindspore import Tensor, ops
from mindspore.ops import constexpr

from dreambooth_ms.ops import ascend
from dreambooth_ms.runtime.device import Formulation, formulation


@constexpr
def _on_ascend() -> bool:
    return formulation() is Formulation.ASCEND


def equal_parts(x: Tensor, count: int, axis: int) -> tuple[Tensor, ...]:
    """So many parts of the same size, along an axis."""
    return ascend.equal_parts(x, count, axis) if _on_ascend() else ops.split(x, x.shape[axis] // count, axis)


def leading(x: Tensor, count: int) -> Tensor:
    """The first entries of the first axis."""
    return x if count == x.shape[0] else ascend.part(x, 0, 0, count) if _on_ascend() else x[:count]


def mean(x: Tensor, axes: tuple[int, ...], keep_dims: bool = False) -> Tensor:
    """The mean over some axes."""
    return ascend.mean(x, axes, keep_dims) if _on_ascend() else x.mean(axes, keep_dims)


def exclusive_or(x: Tensor, y: Tensor) -> Tensor:
    """Bit by bit, of integers of one shape."""
    return ascend.exclusive_or(x, y) if _on_ascend() else ops.bitwise_xor(x, y)

"""The layout of images, and of the weights whose stored form is not the public one.

Shapes: B batch, C channels, H height, W width, L = H * W tokens.
"""

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.ops import ascend
from dreambooth_ms.ops.anywhere import equal_parts
from dreambooth_ms.ops.graph import on_ascend, shared
from dreambooth_ms.ops.linear import transposed_times
from dreambooth_ms.runtime.device import Formulation, formulation


@dataclass(frozen=True)
class StoredLayout:
    """A convolution weight that is stored as (O, k * k * I), taps before channels; its public form is (O, I, k, k)."""

    kernel_size: int

    def store(self, weight: np.ndarray) -> np.ndarray:
        """Public form -> stored form."""
        k, rows = self.kernel_size, len(weight)
        return np.ascontiguousarray(weight.reshape(rows, -1, k, k).transpose(0, 2, 3, 1)).reshape(rows, -1)

    def restore(self, weight: np.ndarray) -> np.ndarray:
        """Stored form -> public form."""
        k, rows = self.kernel_size, len(weight)
        # A copy also where nothing moves: what is read must not change with the parameter.
        return weight.reshape(rows, k, k, -1).transpose(0, 3, 1, 2).copy().reshape(self.public_shape(weight.shape))

    def public_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the public form of a stored weight."""
        k = self.kernel_size
        return (shape[0], shape[1] // (k * k), k, k)


class FlatLayout(StoredLayout):
    """The same of a matrix whose columns are those of such a weight: its public form is (r, I * k * k)."""

    def public_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


def image_axes() -> tuple[int, int, int]:
    """Where an image has its height, width and channels, for what handles images outside of networks."""
    return (1, 2, 3) if formulation() is Formulation.CPU else (2, 3, 1)


def from_public_layout(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W), as files and schedulers hold images and latents -> an image of this formulation."""
    return x_BCHW if on_ascend() else ops.transpose(x_BCHW, (0, 2, 3, 1))


def to_public_layout(x: Tensor) -> Tensor:
    """The inverse of `from_public_layout`."""
    return x if on_ascend() else ops.transpose(x, (0, 3, 1, 2))


def image_to_tokens(x: Tensor) -> Tensor:
    """An image -> (B, H * W, C)."""
    if on_ascend():
        return ops.transpose(ops.reshape(x, (x.shape[0], x.shape[1], -1)), (0, 2, 1))
    return ops.reshape(x, (x.shape[0], -1, x.shape[3]))


def tokens_to_image(tokens_BLC: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> an image with the layout and the height and width of `like`."""
    channels = tokens_BLC.shape[2]
    if on_ascend():
        x_BCL = ops.transpose(tokens_BLC, (0, 2, 1))
        return ops.reshape(x_BCL, (like.shape[0], channels, like.shape[2], like.shape[3]))
    return ops.reshape(tokens_BLC, (like.shape[0], like.shape[1], like.shape[2], channels))


def concat_channels(x: Tensor, y: Tensor) -> Tensor:
    """Two images -> one with the channels of both."""
    return ops.concat((x, y), 1 if on_ascend() else 3)


def add_per_channel(x: Tensor, bias_BC: Tensor) -> Tensor:
    """An image plus one number per row and channel, (B, C)."""
    return x + _at_every_pixel(bias_BC, x)


def scale_and_shift(x: Tensor, by_BE: Tensor) -> Tensor:
    """x * (1 + scale) + shift with both, in this order, of each row and channel: (B, 2 C)."""
    scale_BC, shift_BC = equal_parts(by_BE, 2, 1)
    return x * _at_every_pixel(scale_BC + 1, x) + _at_every_pixel(shift_BC, x)


def _at_every_pixel(values_BC: Tensor, like: Tensor) -> Tensor:
    """(B, C) -> an image of the shape of `like`."""
    batch, channels = values_BC.shape
    if on_ascend():
        return ops.broadcast_to(ops.reshape(values_BC, (batch, channels, 1, 1)), like.shape)
    # Broadcasting inside `+` keeps an index table; `broadcast_to` takes longer than a product (measured).
    of_pixels_NC = over_pixels(values_BC.astype(ms.float32), like.size // (batch * channels))
    return ops.reshape(of_pixels_NC, like.shape).astype(like.dtype)


def over_pixels(x_BC: Tensor, pixels: int) -> Tensor:
    """(B, C) -> (N, C) of the N = B * `pixels` pixels of all images."""
    batch = x_BC.shape[0]
    return transposed_times(members(batch, batch * pixels), x_BC)


@constexpr
def members(groups: int, count: int) -> Tensor:
    """(groups, count) float32: 1 where one of so many things belongs to the group, such as a pixel to its image. Groups
    are of one size and follow each other."""
    return Tensor(np.kron(np.eye(groups), np.ones((1, count // groups))), ms.float32)


def upsample_nearest() -> Any:
    """What makes of an image one of twice its height and width: every pixel becomes a square of four."""
    return shared(_UpsampleRows) if formulation() is Formulation.CPU else _upsample_squares


def _upsample_squares(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    pixels = ops.reshape(x, (batch, channels, height, 1, width, 1))
    squares = ops.broadcast_to(pixels, (batch, channels, height, 2, width, 2))
    return ops.reshape(squares, (batch, channels, 2 * height, 2 * width))


class _UpsampleRows(nn.Cell):
    """Nearest upsampling by `Gather` on rows of pixels: a copy of C contiguous numbers each, and no index table."""

    def construct(self, x: Tensor) -> Tensor:
        return _repeated(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (_square_sums(dout),)


def average_pool() -> Any:
    """What makes of an image one of half its even height and width: every square of four becomes its mean."""
    return shared(_PoolRows) if formulation() is Formulation.CPU else _pool_squares


def _pool_squares(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return ascend.mean(ops.reshape(x, (batch, channels, height // 2, 2, width // 2, 2)), (3, 5), False)


class _PoolRows(nn.Cell):
    """Average pooling by `Gather`, the adjoint of nearest upsampling."""

    def construct(self, x: Tensor) -> Tensor:
        return _square_sums(x) * 0.25

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (_repeated(dout) * 0.25,)


def _repeated(x: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    rows = ops.gather(ops.reshape(x, (batch, height * width, channels)), _parents(height, width), 1)
    return ops.reshape(rows, (batch, 2 * height, 2 * width, channels))


def _square_sums(x: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    rows = ops.reshape(x, (batch, 4 * height * width, channels))
    sums = ops.gather(rows, _children(height, width, 0), 1)
    for corner in range(1, 4):
        sums = sums + ops.gather(rows, _children(height, width, corner), 1)
    return ops.reshape(sums, (batch, height, width, channels))


@constexpr
def _parents(height: int, width: int) -> Tensor:
    """For every pixel of the large image, the pixel of the small one that it repeats."""
    parents = np.arange(height * width).reshape(height, width).repeat(2, 0).repeat(2, 1)
    return Tensor(parents.reshape(-1), ms.int32)


@constexpr
def _children(height: int, width: int, corner: int) -> Tensor:
    """For every pixel of the small image, the one of its four copies that stands in this corner."""
    children = np.arange(4 * height * width).reshape(2 * height, -1)[corner // 2 :: 2, corner % 2 :: 2]
    return Tensor(children.reshape(-1), ms.int32)

"""Convolution. CPU: one `Gather` of the taps and one matrix product. Ascend: the native operator.

Shapes: B batch, H, W height and width, P = H * W pixels, I input channels, O output channels, k kernel size.
"""

from functools import lru_cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.ops.backend import Formulation, after, formulation, shared
from dreambooth_ms.ops.layout import StoredLayout
from dreambooth_ms.ops.linear import BiasAdd, empty_parameter

Padding = tuple[int, int, int, int]
"""Zero rows and columns added at the top, bottom, left and right."""

# The gathered taps of one part of a convolution take at most this many numbers (128 MiB in float32).
MAX_TAPS = 1 << 25


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    padding: Padding | None = None,
    has_bias: bool = True,
) -> "Conv2d":
    """A convolution in this device's formulation: image with I channels -> image with O channels.

    `padding` None keeps height and width at stride 1.
    """
    return Conv2d(in_channels, out_channels, kernel_size, stride, padding or (kernel_size // 2,) * 4, has_bias)


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: Padding) -> Any:
    """What a `Conv2d` is without its weights: image, weight as `Conv2d` stores it -> image, without the bias."""
    if formulation() is Formulation.CPU:
        return shared(_TapProduct, in_channels, out_channels, kernel_size, stride, padding)
    return ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=padding, stride=stride)


def channel_bias() -> Any:
    """Image, (C,) -> image with the bias added."""
    return shared(_ChannelsLastBiasAdd) if formulation() is Formulation.CPU else ops.BiasAdd()


class Conv2d(nn.Cell):
    """CPU: (B, H, W, I) -> (B, H', W', O). Ascend: (B, I, H, W) -> (B, O, H', W') by the device's operator.

    On CPU the weight is stored as (O, k * k * I): see `StoredLayout`. It computes in the dtype of x.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: Padding, has_bias: bool
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, has_bias
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        if formulation() is Formulation.CPU:
            self.weight = empty_parameter((out_channels, kernel_size * kernel_size * in_channels))
            self.stored_layouts = {"weight": StoredLayout(kernel_size)}
        else:
            self.weight = empty_parameter((out_channels, in_channels, kernel_size, kernel_size))
            self.stored_layouts = {}
        self.product = convolution(in_channels, out_channels, kernel_size, stride, padding)
        self.bias_add = channel_bias()
        if has_bias:
            self.bias = empty_parameter((out_channels,))

    def construct(self, x: Tensor) -> Tensor:
        y = self.product(x, self.weight.astype(x.dtype))
        return self.bias_add(y, self.bias.astype(x.dtype)) if self.has_bias else y


class _ChannelsLastBiasAdd(nn.Cell):
    """(B, H, W, C) plus (C,)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_add = shared(BiasAdd)

    def construct(self, x_BHWC: Tensor, bias_C: Tensor) -> Tensor:
        rows = self.bias_add(ops.reshape(x_BHWC, (-1, bias_C.shape[0])), bias_C)
        return ops.reshape(rows, x_BHWC.shape)


class _TapProduct(nn.Cell):
    """The linear part of a convolution, with its own backward pass: only the input and the weight are kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: Padding) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.taps = kernel_size * kernel_size
        self.pointwise = kernel_size == 1 and stride == 1
        self.times_transposed = ops.MatMul(transpose_b=True)
        self.times = ops.MatMul()
        self.transposed_times = ops.MatMul(transpose_a=True)

    def construct(self, x_BHWI: Tensor, weight: Tensor) -> Tensor:
        batch, height, width, channels = x_BHWI.shape
        if self.pointwise:
            y = self.times_transposed(ops.reshape(x_BHWI, (-1, channels)), weight)
            return ops.reshape(y, (batch, height, width, self.out_channels))
        out_height, out_width = _output_size(height, width, self.kernel_size, self.stride, self.padding)
        rows_BPI = _with_zero_row(x_BHWI)
        parts = ()
        for start, stop in _parts(batch, out_height * out_width, self.taps * channels):
            index = _taps(height, width, self.kernel_size, self.stride, self.padding, start, stop)
            columns = ops.reshape(ops.gather(rows_BPI, index, 1), (-1, self.taps * channels))
            y = self.times_transposed(columns, weight)
            parts = parts + (ops.reshape(y, (batch, stop - start, self.out_channels)),)
            rows_BPI = after(rows_BPI, y)
        y_BPO = ops.concat(parts, 1) if len(parts) > 1 else parts[0]
        return ops.reshape(y_BPO, (batch, out_height, out_width, self.out_channels))

    def bprop(self, x_BHWI: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.in_channels
        dout_rows = ops.reshape(dout, (-1, self.out_channels))
        if self.pointwise:
            dx = ops.reshape(self.times(dout_rows, weight), x_BHWI.shape)
            return dx, self.transposed_times(dout_rows, ops.reshape(x_BHWI, (-1, channels)))
        return self._input_gradient(x_BHWI.shape, weight, dout), self._weight_gradient(x_BHWI, dout)

    def _input_gradient(self, shape: tuple[int, ...], weight: Tensor, dout: Tensor) -> Tensor:
        """A convolution of `dout` with the taps in reverse, so that it is a gather and a product as well."""
        batch, height, width, channels = shape
        # (O, k*k, I) -> (k*k, O, I): a gather of rows of I numbers, which unlike a transpose keeps no index table.
        # It must not happen before its time, or the reordered weights of all convolutions exist at once (measured).
        by_output = after(ops.reshape(weight, (-1, channels)), dout)
        by_tap = ops.gather(by_output, _tap_major(self.out_channels, self.taps), 0)
        by_tap = ops.reshape(by_tap, (self.taps * self.out_channels, channels))
        rows_BPO = _with_zero_row(dout)
        parts = ()
        for start, stop in _parts(batch, height * width, self.taps * self.out_channels):
            index = _reverse_taps(height, width, self.kernel_size, self.stride, self.padding, start, stop)
            columns = ops.reshape(ops.gather(rows_BPO, index, 1), (-1, self.taps * self.out_channels))
            dx = self.times(columns, by_tap)
            parts = parts + (ops.reshape(dx, (batch, stop - start, channels)),)
            rows_BPO = after(rows_BPO, dx)
        dx = ops.concat(parts, 1) if len(parts) > 1 else parts[0]
        return ops.reshape(dx, shape)

    def _weight_gradient(self, x_BHWI: Tensor, dout: Tensor) -> Tensor:
        _, height, width, channels = x_BHWI.shape
        rows_BPI = _with_zero_row(after(x_BHWI, dout))
        index = _taps(height, width, self.kernel_size, self.stride, self.padding, 0, dout.shape[1] * dout.shape[2])
        columns = ops.reshape(ops.gather(rows_BPI, index, 1), (-1, self.taps * channels))
        return self.transposed_times(ops.reshape(dout, (-1, self.out_channels)), columns)


def _with_zero_row(x_BHWC: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, P + 1, C): the last row is the zero that taps outside the image read."""
    batch, height, width, channels = x_BHWC.shape
    rows = ops.reshape(x_BHWC, (batch, height * width, channels))
    return ops.concat((rows, ops.zeros((batch, 1, channels), x_BHWC.dtype)), 1)


@constexpr
def _output_size(height: int, width: int, kernel_size: int, stride: int, padding: Padding) -> tuple[int, int]:
    top, bottom, left, right = padding
    return (height + top + bottom - kernel_size) // stride + 1, (width + left + right - kernel_size) // stride + 1


@constexpr
def _parts(batch: int, pixels: int, columns: int) -> tuple[tuple[int, int], ...]:
    """Ranges of pixels whose gathered taps stay below `MAX_TAPS`."""
    step = max(1, min(pixels, MAX_TAPS // (batch * columns)))
    return tuple((start, min(start + step, pixels)) for start in range(0, pixels, step))


@constexpr
def _taps(height: int, width: int, kernel_size: int, stride: int, padding: Padding, start: int, stop: int) -> Tensor:
    """For output pixels start..stop and every tap, the input pixel it reads: (stop - start) * k * k."""
    return Tensor(_tap_table(height, width, kernel_size, stride, padding)[start:stop].reshape(-1), ms.int32)


@constexpr
def _reverse_taps(
    height: int, width: int, kernel_size: int, stride: int, padding: Padding, start: int, stop: int
) -> Tensor:
    """For input pixels start..stop and every tap, the output pixel that read it through that tap."""
    table = _tap_table(height, width, kernel_size, stride, padding)
    outside_output = table.shape[0]
    reverse = np.full((height * width + 1, table.shape[1]), outside_output)
    for tap in range(table.shape[1]):
        reverse[table[:, tap], tap] = np.arange(table.shape[0])
    return Tensor(reverse[start:stop].reshape(-1), ms.int32)


@constexpr
def _tap_major(out_channels: int, taps: int) -> Tensor:
    return Tensor(np.arange(out_channels * taps).reshape(out_channels, taps).T.reshape(-1), ms.int32)


@lru_cache(maxsize=64)
def _tap_table(height: int, width: int, kernel_size: int, stride: int, padding: Padding) -> np.ndarray:
    """(P', k * k) input pixels; P stands for the zero row."""
    top, bottom, left, right = padding
    grid = np.full((height + top + bottom, width + left + right), height * width)
    grid[top : top + height, left : left + width] = np.arange(height * width).reshape(height, width)
    windows = np.lib.stride_tricks.sliding_window_view(grid, (kernel_size, kernel_size))[::stride, ::stride]
    return windows.reshape(-1, kernel_size * kernel_size)

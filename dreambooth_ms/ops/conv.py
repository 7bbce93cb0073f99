"""Convolution. CPU: one lookup of the taps and one matrix product. Ascend: the native operator.

Shapes: B batch, H, W height and width, P = H * W pixels, I input channels, O output channels, k kernel size.
"""

from functools import lru_cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.ops import ascend
from dreambooth_ms.ops.ascend import Padding
from dreambooth_ms.ops.graph import after, interchanged, shared
from dreambooth_ms.ops.layout import StoredLayout
from dreambooth_ms.ops.linear import BiasAdd, empty_parameter, times, times_transposed, transposed_times
from dreambooth_ms.runtime.device import Formulation, formulation

# The gathered taps of one part of a convolution take at most this many numbers (128 MiB in float32).
MAX_TAPS = 1 << 25


Geometry = tuple[int, int, Padding]
"""Kernel size, stride and padding."""


def convolution(kernel_size: int, stride: int, padding: Padding) -> Any:
    """What a `Conv2d` is without its weights: image, weight as `Conv2d` stores it, bias (O,) or None -> image."""
    kind = _TapConvolution if formulation() is Formulation.CPU else _NativeConvolution
    return shared(kind, (kernel_size, stride, padding))


class Conv2d(nn.Cell):
    """Image with I channels -> image with O channels, in the dtype of x and this device's formulation.

    `padding` None keeps height and width at stride 1. On CPU the weight is stored as `StoredLayout` says.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: Padding | None = None,
        has_bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, has_bias
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding or (kernel_size // 2,) * 4
        if formulation() is Formulation.CPU:
            self.weight = empty_parameter((out_channels, kernel_size * kernel_size * in_channels))
            self.stored_layouts = {"weight": StoredLayout(kernel_size)}
        else:
            self.weight = empty_parameter((out_channels, in_channels, kernel_size, kernel_size))
            self.stored_layouts = {}
        self.convolve = convolution(kernel_size, stride, self.padding)
        if has_bias:
            self.bias = empty_parameter((out_channels,))

    def construct(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight.astype(x.dtype), self.bias.astype(x.dtype) if self.has_bias else None)


class _NativeConvolution(nn.Cell):
    """(B, I, H, W) -> (B, O, H', W') by the device's operator."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        (_, self.stride, self.padding), self.convolve = geometry, ascend.convolution

    def construct(self, x_BIHW: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
        return self.convolve(x_BIHW, weight, bias_O, self.stride, self.padding)


class _TapConvolution(nn.Cell):
    """(B, H, W, I) -> (B, H', W', O) by a product of rows of pixels."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.product = _TapProduct(geometry)
        self.bias_add = shared(BiasAdd)

    def construct(self, x_BHWI: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
        batch, height, width, _ = x_BHWI.shape
        y_NO = self.product(x_BHWI, weight)
        if bias_O is not None:
            y_NO = self.bias_add(y_NO, bias_O)
        return ops.reshape(y_NO, (batch, *_output_size(height, width, self.product.geometry), y_NO.shape[1]))


class _TapProduct(nn.Cell):
    """The linear part of a convolution: (B, H, W, I), weight -> (N, O) of the N = B * H' * W' output pixels. With its
    own backward pass: only the input and the weight are kept."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        kernel_size, stride, _ = geometry
        self.taps = kernel_size * kernel_size
        self.pointwise = kernel_size == 1 and stride == 1
        self.lookup = ops.EmbeddingLookup()
        # Its gradient is not used; if it might be sparse, those of the whole graph have no known type (measured).
        self.lookup.add_prim_attr("bprop_return_sparse", False)

    def construct(self, x_BHWI: Tensor, weight: Tensor) -> Tensor:
        batch, height, width, channels = x_BHWI.shape
        if self.pointwise:
            return times_transposed(ops.reshape(x_BHWI, (-1, channels)), weight)
        out_height, out_width = _output_size(height, width, self.geometry)
        rows_NI = ops.reshape(x_BHWI, (-1, channels))
        parts = ()
        for start, stop in _parts(batch, out_height * out_width, self.taps * channels):
            index = _taps(batch, height, width, self.geometry, start, stop)
            parts = parts + (times_transposed(self._columns(rows_NI, index), weight),)
            rows_NI = after(rows_NI, parts[-1])
        return _concat_pixels(parts, batch)

    def bprop(self, x_BHWI: Tensor, weight: Tensor, out: Tensor, dout_NO: Tensor) -> tuple[Tensor, Tensor]:
        if self.pointwise:
            dx = ops.reshape(times(dout_NO, weight), x_BHWI.shape)
            return dx, transposed_times(dout_NO, ops.reshape(x_BHWI, (-1, x_BHWI.shape[3])))
        return self._input_gradient(x_BHWI.shape, weight, dout_NO), self._weight_gradient(x_BHWI, dout_NO)

    def _input_gradient(self, shape: tuple[int, ...], weight: Tensor, dout_NO: Tensor) -> Tensor:
        """A convolution of `dout` with the taps in reverse, so that it is a gather and a product as well."""
        batch, height, width, channels = shape
        out_channels = dout_NO.shape[1]
        # (O, k*k, I) -> (k*k, O, I): a gather of rows of I numbers, which unlike a transpose keeps no index table.
        # It must not happen before its time, or the reordered weights of all convolutions exist at once (measured).
        by_output = after(ops.reshape(weight, (-1, channels)), dout_NO)
        by_tap = ops.gather(by_output, interchanged(out_channels, self.taps), 0)
        by_tap = ops.reshape(by_tap, (self.taps * out_channels, channels))
        parts = ()
        for start, stop in _parts(batch, height * width, self.taps * out_channels):
            index = _reverse_taps(batch, height, width, self.geometry, start, stop)
            parts = parts + (times(self._columns(dout_NO, index), by_tap),)
            dout_NO = after(dout_NO, parts[-1])
        return ops.reshape(_concat_pixels(parts, batch), shape)

    def _weight_gradient(self, x_BHWI: Tensor, dout_NO: Tensor) -> Tensor:
        batch, height, width, channels = x_BHWI.shape
        rows_NI = ops.reshape(after(x_BHWI, dout_NO), (-1, channels))
        index = _taps(batch, height, width, self.geometry, 0, dout_NO.shape[0] // batch)
        return transposed_times(dout_NO, self._columns(rows_NI, index))

    def _columns(self, rows_NC: Tensor, index: Tensor) -> Tensor:
        """The rows of pixels that the taps read, side by side for each output pixel; those outside the image are 0."""
        return ops.reshape(self.lookup(rows_NC, index, 0), (-1, self.taps * rows_NC.shape[1]))


def _concat_pixels(parts: tuple[Tensor, ...], batch: int) -> Tensor:
    """Rows of pixels, each part's image by image -> all pixels of the first image, then all of the second …"""
    if len(parts) == 1:
        return parts[0]
    channels = parts[0].shape[1]
    by_image = ()
    for part_NC in parts:
        by_image = by_image + (ops.reshape(part_NC, (batch, -1, channels)),)
    return ops.reshape(ops.concat(by_image, 1), (-1, channels))


@constexpr
def _output_size(height: int, width: int, geometry: Geometry) -> tuple[int, int]:
    kernel_size, stride, (top, bottom, left, right) = geometry
    return (height + top + bottom - kernel_size) // stride + 1, (width + left + right - kernel_size) // stride + 1


@constexpr
def _parts(batch: int, pixels: int, columns: int) -> tuple[tuple[int, int], ...]:
    """Ranges of pixels whose gathered taps stay below `MAX_TAPS`."""
    step = max(1, min(pixels, MAX_TAPS // (batch * columns)))
    return tuple((start, min(start + step, pixels)) for start in range(0, pixels, step))


@constexpr
def _taps(batch: int, height: int, width: int, geometry: Geometry, start: int, stop: int) -> Tensor:
    """For output pixels start..stop of every image and every tap, the input pixel of the batch that it reads.

    (B * (stop - start) * k * k,) int32; what is read outside the image is a pixel behind the batch, which is 0.
    """
    return _of_batch(_tap_table(height, width, geometry)[start:stop], batch, height * width)


@constexpr
def _reverse_taps(batch: int, height: int, width: int, geometry: Geometry, start: int, stop: int) -> Tensor:
    """The same for input pixels, and the output pixel that read it through that tap."""
    table = _tap_table(height, width, geometry)
    outputs, taps = table.shape
    reverse = np.full((height * width + 1, taps), outputs)
    for tap in range(taps):
        reverse[table[:, tap], tap] = np.arange(outputs)
    return _of_batch(reverse[start:stop], batch, outputs)


def _of_batch(table: np.ndarray, batch: int, pixels: int) -> Tensor:
    """Pixels of one image, where `pixels` stands for one outside of it -> pixels of the batch, image by image."""
    of_images = [np.where(table < pixels, table + image * pixels, batch * pixels) for image in range(batch)]
    return Tensor(np.stack(of_images).reshape(-1), ms.int32)


@lru_cache(maxsize=64)
def _tap_table(height: int, width: int, geometry: Geometry) -> np.ndarray:
    """(P', k * k) input pixels; P stands for one outside the image."""
    kernel_size, stride, (top, bottom, left, right) = geometry
    grid = np.full((height + top + bottom, width + left + right), height * width)
    grid[top : top + height, left : left + width] = np.arange(height * width).reshape(height, width)
    windows = np.lib.stride_tricks.sliding_window_view(grid, (kernel_size, kernel_size))[::stride, ::stride]
    return windows.reshape(-1, kernel_size * kernel_size)

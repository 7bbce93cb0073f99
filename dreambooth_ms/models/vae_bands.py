"""The autoencoder's decoder layer by layer in bands of rows, for pictures that are large for the memory.

Between two layers the whole image stays with the host. So a norm has the statistics of all pixels, a convolution reads
a row more above and below its band, and the picture is that of `AutoencoderKL.decode` up to the order in which float32
numbers are added. A layer's input and output exist at once, and of what is in between only a band.

Shapes: x an image of one row in this formulation's layout, C channels; I, O channels of a convolution.
"""

from collections.abc import Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.models.layers import ResnetBlock2D
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.ops import (
    AddPerChannel,
    CompiledCell,
    Conv2d,
    MultiplyPerChannel,
    channel_bias,
    convolution,
    image_axes,
    shared,
)

MAX_TAPS = 1 << 24
"""A band is as high as its convolution's gathered taps stay below so many numbers (64 MiB in float32)."""


class BandedDecoder:
    """Latents (1, C, h, w), unscaled -> picture (1, 3, H, W), about [-1, 1].

    Args:
        vae: the autoencoder; its weights are used as they are, also if they change.
        max_taps: see `MAX_TAPS`.
    """

    def __init__(self, vae: AutoencoderKL, max_taps: int = MAX_TAPS) -> None:
        self._vae, self._max_taps = vae, max_taps
        self._head = _Head(vae)
        self._axes = image_axes()
        self._cells: dict[tuple[object, ...], CompiledCell] = {}

    def __call__(self, latents_1Chw: Tensor) -> np.ndarray:
        """Decode."""
        decoder = self._vae.decoder
        x = self._head(latents_1Chw).asnumpy().copy()
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            if block.has_upsampler:
                x = self._convolved(block.upsamplers[0].conv, x, upsampling=2)
        x = self._convolved(decoder.conv_out, x, decoder.conv_norm_out)
        return np.moveaxis(x, self._axes.channels, 1)

    def _resnet(self, resnet: ResnetBlock2D, x: np.ndarray) -> np.ndarray:
        """See `ResnetBlock2D`; without a shortcut the result takes the place of the input."""
        y = self._convolved(resnet.conv1, x, resnet.norm1)
        total = self._convolved(resnet.conv_shortcut, x) if resnet.has_shortcut else x
        return self._convolved(resnet.conv2, y, resnet.norm2, onto=total)

    def _convolved(
        self,
        conv: Conv2d,
        x: np.ndarray,
        norm: nn.Cell | None = None,
        upsampling: int = 1,
        onto: np.ndarray | None = None,
    ) -> np.ndarray:
        """A convolution of the input, of its norm and SiLU, or of it enlarged; `onto` an image it is added to."""
        height, width = (x.shape[axis] * upsampling for axis in (self._axes.height, self._axes.width))
        weights = [Tensor(conv.weight.asnumpy()), Tensor(conv.bias.asnumpy())]
        if norm is not None:
            weights += [Tensor(one.astype(np.float32)) for one in self._centre_scale_shift(norm, x)]
        cell = self._cell(conv, norm is not None)
        rows = band_height(height, self._max_taps // (conv.kernel_size**2 * conv.in_channels * width))
        if onto is None:
            shape = list(x.shape)
            shape[self._axes.height], shape[self._axes.width] = height, width
            shape[self._axes.channels] = conv.out_channels
            onto = np.zeros(shape, x.dtype)
        for start in range(0, height, rows):
            read = np.arange(start - conv.kernel_size // 2, start + rows + conv.kernel_size // 2)
            band, is_inside = self._read(x, read, upsampling)
            y = cell(band, *weights) if norm is None else cell(band, is_inside, *weights)
            _rows(onto, start, start + rows, self._axes.height)[...] += y.asnumpy()
        return onto

    def _read(self, x: np.ndarray, rows: np.ndarray, upsampling: int) -> tuple[Tensor, Tensor]:
        """Some rows of an image, enlarged by repetition, zeros for those outside; and 1 or 0 for inside or outside."""
        height = x.shape[self._axes.height] * upsampling
        inside = (rows >= 0) & (rows < height)
        band = np.take(x, rows.clip(0, height - 1) // upsampling, self._axes.height)
        if upsampling > 1:
            band = band.repeat(upsampling, self._axes.width)
        is_inside = inside.reshape([-1 if axis == self._axes.height else 1 for axis in range(4)]).astype(x.dtype)
        for outside in np.flatnonzero(~inside):
            _rows(band, outside, outside + 1, self._axes.height)[...] = 0
        return Tensor(band), Tensor(is_inside)

    def _cell(self, conv: Conv2d, is_normed: bool) -> CompiledCell:
        """One for all convolutions of this kind: the weights are inputs."""
        kind = (conv.in_channels, conv.out_channels, conv.kernel_size)
        if (kind, is_normed) not in self._cells:
            self._cells[kind, is_normed] = (_NormConvolution if is_normed else _Convolution)(*kind)
        return self._cells[kind, is_normed]

    def _centre_scale_shift(self, norm: nn.Cell, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(1, C) each, such that the group norm of an image is (x - centre) * scale + shift."""
        axes = tuple(axis for axis in range(4) if axis != self._axes.channels)
        channels = x.shape[self._axes.channels]
        count = x.size // norm.num_groups

        def over_group(sums_C: np.ndarray) -> np.ndarray:
            sums = sums_C.reshape(norm.num_groups, -1).sum(1, keepdims=True)
            return np.broadcast_to(sums / count, (norm.num_groups, channels // norm.num_groups)).reshape(-1)

        mean_C = over_group(sum(band.sum(axes, dtype=np.float64) for band in self._bands(x)))
        centre = mean_C.astype(np.float32).reshape([-1 if axis == self._axes.channels else 1 for axis in range(4)])
        squares_C = sum(np.square(band - centre).sum(axes, dtype=np.float64) for band in self._bands(x))
        scale_C = norm.weight.asnumpy() / np.sqrt(over_group(squares_C) + norm.eps)
        return mean_C[None], scale_C[None], norm.bias.asnumpy()[None]

    def _bands(self, x: np.ndarray) -> Iterator[np.ndarray]:
        height = x.shape[self._axes.height]
        rows = band_height(height, self._max_taps * height // x.size)
        for start in range(0, height, rows):
            yield _rows(x, start, start + rows, self._axes.height)


def band_height(height: int, most: int) -> int:
    """The largest divisor of a height that is at most this, and at least 1: bands of one shape are one graph."""
    return next(rows for rows in range(max(1, min(height, most)), 0, -1) if height % rows == 0)


class _Head(CompiledCell):
    """The decoder's layers at the size of the latents, whose attention is over all pixels."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, latents_BChw: Tensor) -> Tensor:
        x = self.vae.post_quant_conv(self.vae.from_public_layout(latents_BChw))
        return self.vae.decoder.mid_block(self.vae.decoder.conv_in(x))


class _Convolution(CompiledCell):
    """A band with the rows beside it, weight, bias -> the band, convolved."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(auto_prefix=False)
        # Above and below the band has its neighbours; left and right ends the image.
        sides = kernel_size // 2
        self.product = convolution(in_channels, out_channels, kernel_size, 1, (0, 0, sides, sides))
        self.bias_add = channel_bias()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.bias_add(self.product(x, weight.astype(x.dtype)), bias.astype(x.dtype))


class _NormConvolution(CompiledCell):
    """The same of the band's norm and SiLU, which are zero where a row is not inside of the image."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(auto_prefix=False)
        self.convolution = _Convolution(in_channels, out_channels, kernel_size)
        self.add, self.multiply = shared(AddPerChannel), shared(MultiplyPerChannel)

    def construct(
        self,
        x: Tensor,
        is_inside: Tensor,
        weight: Tensor,
        bias: Tensor,
        centre_1C: Tensor,
        scale_1C: Tensor,
        shift_1C: Tensor,
    ) -> Tensor:
        y = self.multiply(self.add(x.astype(ms.float32), -centre_1C), scale_1C)
        y = ops.silu(self.add(y, shift_1C)).astype(x.dtype) * ops.broadcast_to(is_inside, x.shape)
        return self.convolution(y, weight, bias)


def _rows(x: np.ndarray, start: int, stop: int, axis: int) -> np.ndarray:
    return x[(slice(None),) * axis + (slice(start, stop),)]

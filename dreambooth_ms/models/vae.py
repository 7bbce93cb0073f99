"""The autoencoder of Stable Diffusion, with the module tree of diffusers' AutoencoderKL.

Shapes: B batch, C latent channels, H, W height and width of the picture, h, w those of the latents. In bands of rows: x
an image of one row in this formulation's layout, C channels; I, O channels of a convolution.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from mindspore import Tensor, mint, nn, ops

from dreambooth_ms.models.layers import LAYERS, CellMethod, ResnetBlock2D, attach
from dreambooth_ms.models.layout import Layer, vae_layout
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.ops import Conv2d, convolution, equal_parts
from dreambooth_ms.ops.layout import from_public_layout, image_axes, to_public_layout, upsample_nearest
from dreambooth_ms.runtime.device import uncompiled

ENCODER_LAYERS, DECODER_LAYERS = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")


class AutoencoderKL(nn.Cell):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, C, h, w), unscaled; or only one of the two directions."""

    title = "the autoencoder"

    def __init__(self, spec: VaeSpec, encodes: bool = True, decodes: bool = True) -> None:
        super().__init__()
        self.spec = spec
        layout = vae_layout(spec)
        if encodes:
            self.encoder = LayerChain(layout["encoder"], spec)
            self.quant_conv = Conv2d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        if decodes:
            self.post_quant_conv = Conv2d(spec.latent_channels, spec.latent_channels, 1)
            self.decoder = LayerChain(layout["decoder"], spec)
        # Names the parameters, which `attach` does not.
        public_parameters(self)

    def encode(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B, C, h, w); the log-variance is clipped to [-30, 20]."""
        moments = self.quant_conv(self.encoder(from_public_layout(pictures_B3HW)))
        mean, log_variance = equal_parts(to_public_layout(moments), 2, 1)
        return mean, ops.clamp(log_variance, -30.0, 20.0)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1]."""
        return to_public_layout(self.decoder(self.post_quant_conv(from_public_layout(latents_BChw))))

    def decode_middle(self, latents_BChw: Tensor) -> Tensor:
        """An image: `decode` as far as it is at the size of the latents, where attention is over all pixels."""
        x = self.decoder.conv_in(self.post_quant_conv(from_public_layout(latents_BChw)))
        middle = self.decoder.mid_block
        return middle.resnets[1](middle.attentions[0](middle.resnets[0](x)))


class LayerChain(nn.Cell):
    """An image through layers, each of which stands at its public name and reads the one before."""

    def __init__(self, layers: Sequence[Layer], spec: VaeSpec) -> None:
        super().__init__()
        cells = [attach(self, layer.name, LAYERS[layer.kind](layer, spec)) for layer in layers]
        self.chain = nn.CellList(cells, auto_prefix=False)

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.chain:
            x = layer(x)
        return x


class Pixels(nn.Cell):
    """In place of an autoencoder: pictures (B, C, H, W) are their latents, without a variance."""

    def encode(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures -> these and the logarithm of no variance: exp(-200) is 0 in float32."""
        return pictures_BCHW, ops.full_like(pictures_BCHW, -400.0)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """As they are; a graph has to compute something."""
        return latents_BCHW * 1.0


MAX_TAPS = 1 << 24
"""A band is as high as its convolution's gathered taps stay below so many numbers (64 MiB in float32)."""
MAX_SUMMED = 1 << 20
"""Numbers that are summed at a time, so that they stay near the processor."""


class BandedDecoder:
    """Latents (1, C, h, w), unscaled -> picture (1, 3, H, W), about [-1, 1]: layer by layer in bands of rows.

    It is for pictures that are large for the memory. Between two layers the whole image exists. So a norm has the
    statistics of all pixels, a convolution reads a row more above and below its band, and the picture is that of
    `AutoencoderKL.decode` up to the order in which float32 numbers are added. A layer's input and output exist at once,
    and of what is in between only a band. The autoencoder's weights are used as they are, also if they change.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae
        self._height, self._width, self._channels = image_axes()
        self._decode_middle = CellMethod(vae.decode_middle)

    def __call__(self, latents_1Chw: Tensor) -> np.ndarray:
        """Decode; layers above the latents' size one by one, as graphs would keep their last inputs (measured)."""
        x, decoder = self._decode_middle(latents_1Chw), self._vae.decoder
        with uncompiled():
            for block in decoder.up_blocks:
                for resnet in block.resnets:
                    x = self._resnet(resnet, x)
                if hasattr(block, "upsamplers"):
                    x = self._convolved(block.upsamplers[0].conv, x, upsampling=2)
            x = self._convolved(decoder.conv_out, x, decoder.conv_norm_out)
            return np.moveaxis(x.asnumpy(), self._channels, 1)

    def _resnet(self, resnet: ResnetBlock2D, x: Tensor) -> Tensor:
        """See `ResnetBlock2D`; the result takes the place of the input."""
        y = self._convolved(resnet.conv1, x, resnet.norm1)
        if resnet.has_shortcut:
            x = self._convolved(resnet.conv_shortcut, x, into=self._first_half(x, resnet.conv_shortcut.out_channels))
        return self._convolved(resnet.conv2, y, resnet.norm2, into=x, adds=True)

    def _first_half(self, x: Tensor, channels: int) -> Tensor | None:
        """The first half of an image's place as an image of half the channels, where its pixels are stored in order:
        what is computed of it band by band, pixel by pixel, ends there before the pixels that are still to be read."""
        batch, height, width, own_channels = x.shape
        if self._channels != 3 or own_channels != 2 * channels:
            return None
        return ops.reshape(ops.reshape(x, (2, -1))[0], (batch, height, width, channels))

    def _convolved(
        self,
        conv: Conv2d,
        x: Tensor,
        norm: nn.Cell | None = None,
        upsampling: int = 1,
        into: Tensor | None = None,
        adds: bool = False,
    ) -> Tensor:
        """A convolution of an image, of its norm and SiLU, or of it enlarged. `into` is where to write it, or what to
        add it to; that of single pixels may be written over the image itself."""
        height, width = (x.shape[axis] * upsampling for axis in (self._height, self._width))
        normalise = None if norm is None else self._norm_and_silu(norm, x)
        if into is None:
            sizes = {self._height: height, self._width: width, self._channels: conv.out_channels}
            into = mint.empty([sizes.get(axis, 1) for axis in range(4)], dtype=x.dtype)
        margin = conv.kernel_size // 2
        rows = band_height(height, MAX_TAPS // (conv.kernel_size**2 * conv.in_channels * width))
        for start in range(0, height, rows):
            first, stop = max(start - margin, 0), min(start + rows + margin, height)
            padding = first - start + margin, start + rows + margin - stop, margin, margin
            band = self._read(x, first, stop, upsampling)
            band = band if normalise is None else normalise(band)
            convolve = convolution(conv.kernel_size, 1, padding)
            y = convolve(band, conv.weight.astype(band.dtype), conv.bias.astype(band.dtype))
            place = self._rows(start, start + rows)
            into[place] = into[place] + y if adds else y
        return into

    def _read(self, x: Tensor, start: int, stop: int, upsampling: int) -> Tensor:
        """Some rows of an image, or of it enlarged to twice its size."""
        if upsampling == 1:
            return x[self._rows(start, stop)]
        enlarged = upsample_nearest()(x[self._rows(start // 2, (stop + 1) // 2)])
        return enlarged[self._rows(start % 2, start % 2 + stop - start)]

    def _rows(self, start: int, stop: int) -> tuple[slice, ...]:
        return (slice(None),) * self._height + (slice(start, stop),)

    def _norm_and_silu(self, norm: nn.Cell, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What makes of a band of an image its group norm, by the statistics of the whole image, and SiLU."""
        channels = x.shape[self._channels]
        pixel = [channels if axis == self._channels else 1 for axis in range(4)]
        pixels = tuple(axis for axis in range(4) if axis != self._channels)
        count = x.size // norm.num_groups

        def over_group(sums_C: np.ndarray) -> np.ndarray:
            means = sums_C.reshape(norm.num_groups, -1).sum(1) / count
            return np.repeat(means, channels // norm.num_groups).reshape(pixel)

        mean = over_group(sum(part.sum(pixels, dtype=np.float64) for part in self._parts(x)))
        centre = mean.astype(np.float32)
        variance = over_group(sum(np.square(part - centre).sum(pixels, dtype=np.float64) for part in self._parts(x)))
        scale = (norm.weight.asnumpy().reshape(pixel) / np.sqrt(variance + norm.eps)).astype(np.float32)
        shift = norm.bias.asnumpy().reshape(pixel)

        def normalise(band: Tensor) -> Tensor:
            y = band.asnumpy() - centre
            y *= scale
            y += shift
            return ops.silu(Tensor(y)).astype(band.dtype)

        return normalise

    def _parts(self, x: Tensor) -> Iterator[np.ndarray]:
        """An image, few rows at a time."""
        height = x.shape[self._height]
        rows = band_height(height, MAX_SUMMED * height // x.size)
        for start in range(0, height, rows):
            yield x[self._rows(start, start + rows)].asnumpy()


def band_height(height: int, most: int) -> int:
    """The largest divisor of a height that is at most this, and at least 1, so that bands are of one height."""
    return next(rows for rows in range(max(1, min(height, most)), 0, -1) if height % rows == 0)

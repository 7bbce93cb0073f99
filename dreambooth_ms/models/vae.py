"""The autoencoder of Stable Diffusion, with the module tree of diffusers' AutoencoderKL.

Shapes: B batch, C latent channels, H, W height and width of the picture, h, w those of the latents.
"""

from collections.abc import Sequence

from mindspore import Tensor, nn, ops

from dreambooth_ms.models.layers import LAYERS, attach
from dreambooth_ms.models.layout import Layer, vae_layout
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.ops import Conv2d, equal_parts
from dreambooth_ms.ops.layout import from_public_layout, to_public_layout

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
        x = self.decoder(self.post_quant_conv(from_public_layout(latents_BChw)))
        return to_public_layout(x)

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

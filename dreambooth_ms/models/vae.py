"""The autoencoder of Stable Diffusion, with the module tree of diffusers' AutoencoderKL.

Shapes: B batch, C latent channels, H, W height and width of the picture, h, w those of the latents.
"""

from mindspore import Tensor, nn, ops

from dreambooth_ms.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.models.transformer import Attention
from dreambooth_ms.ops import FromPublicLayout, ImageToTokens, TokensToImage, ToPublicLayout, conv2d, group_norm, shared
from dreambooth_ms.runtime.compiled_cell import CompiledCell

NORM_EPS = 1e-6


ENCODER_LAYERS, DECODER_LAYERS = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")


class AutoencoderKL(nn.Cell):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, C, h, w), unscaled; or only one of the two directions."""

    def __init__(self, spec: VaeSpec, encodes: bool = True, decodes: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.from_public_layout = FromPublicLayout()
        if encodes:
            self.encoder = Encoder(spec)
            self.quant_conv = conv2d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        if decodes:
            self.post_quant_conv = conv2d(spec.latent_channels, spec.latent_channels, 1)
            self.decoder = Decoder(spec)
        self.to_public_layout = ToPublicLayout()

    def encode(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B, C, h, w); the log-variance is clipped to [-30, 20]."""
        moments = self.quant_conv(self.encoder(self.from_public_layout(pictures_B3HW)))
        mean, log_variance = ops.split(self.to_public_layout(moments), self.spec.latent_channels, 1)
        return mean, ops.clamp(log_variance, -30.0, 20.0)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1]."""
        x = self.decoder(self.post_quant_conv(self.from_public_layout(latents_BChw)))
        return self.to_public_layout(x)


class VaeEncoder(CompiledCell):
    """`AutoencoderKL.encode` as a cell that can be compiled."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.encode(pictures_B3HW)


class VaeDecoder(CompiledCell):
    """`AutoencoderKL.decode` as a cell that can be compiled."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, latents_BChw: Tensor) -> Tensor:
        return self.vae.decode(latents_BChw)


class Encoder(nn.Cell):
    """Image with 3 channels -> image with 2 C channels at latent size."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        channels = spec.block_out_channels
        self.conv_in = conv2d(spec.in_channels, channels[0])
        self.down_blocks = nn.CellList(
            [EncoderBlock(spec, level, channels[max(level - 1, 0)]) for level in range(len(channels))]
        )
        self.mid_block = MidBlock(channels[-1], spec.norm_num_groups)
        self.conv_norm_out = group_norm(spec.norm_num_groups, channels[-1], NORM_EPS, silu=True)
        self.conv_out = conv2d(channels[-1], 2 * spec.latent_channels)

    def construct(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Cell):
    """Image with C channels at latent size -> image with 3 channels."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        channels = tuple(reversed(spec.block_out_channels))
        self.conv_in = conv2d(spec.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], spec.norm_num_groups)
        self.up_blocks = nn.CellList(
            [
                DecoderBlock(spec, channels[max(i - 1, 0)], width, has_upsampler=i < len(channels) - 1)
                for i, width in enumerate(channels)
            ]
        )
        self.conv_norm_out = group_norm(spec.norm_num_groups, channels[-1], NORM_EPS, silu=True)
        self.conv_out = conv2d(channels[-1], spec.in_channels)

    def construct(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class EncoderBlock(nn.Cell):
    """The layers of one resolution on the way down."""

    def __init__(self, spec: VaeSpec, level: int, in_channels: int) -> None:
        super().__init__()
        channels = spec.block_out_channels[level]
        self.resnets = _resnets(in_channels, channels, spec.layers_per_block, spec.norm_num_groups)
        self.has_downsampler = level < len(spec.block_out_channels) - 1
        if self.has_downsampler:
            self.downsamplers = nn.CellList([Downsample2D(channels, padding=(0, 1, 0, 1))])

    def construct(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.has_downsampler:
            x = self.downsamplers[0](x)
        return x


class DecoderBlock(nn.Cell):
    """The layers of one resolution on the way up."""

    def __init__(self, spec: VaeSpec, in_channels: int, channels: int, has_upsampler: bool) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, channels, spec.layers_per_block + 1, spec.norm_num_groups)
        self.has_upsampler = has_upsampler
        if has_upsampler:
            self.upsamplers = nn.CellList([Upsample2D(channels)])

    def construct(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.has_upsampler:
            x = self.upsamplers[0](x)
        return x


class MidBlock(nn.Cell):
    """Residual block, attention over all pixels, residual block."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, num_groups)
        self.attentions = nn.CellList([PixelAttention(channels, num_groups)])

    def construct(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class PixelAttention(Attention):
    """Self-attention of one head over the pixels of an image, behind a group norm and added to its input."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__(channels, channels, num_heads=1, qkv_bias=True)
        self.group_norm = group_norm(num_groups, channels, NORM_EPS)
        self.to_tokens = shared(ImageToTokens)
        self.to_image = shared(TokensToImage)

    def construct(self, x: Tensor) -> Tensor:
        tokens_BLC = self.to_tokens(self.group_norm(x))
        out_BLC = self.attend(self.to_q(tokens_BLC), self.to_k(tokens_BLC), self.to_v(tokens_BLC))
        return x + self.to_image(self.to_out[0](out_BLC), x)


def _resnets(in_channels: int, channels: int, count: int, num_groups: int) -> nn.CellList:
    return nn.CellList(
        [ResnetBlock2D(in_channels if i == 0 else channels, channels, num_groups, NORM_EPS) for i in range(count)]
    )

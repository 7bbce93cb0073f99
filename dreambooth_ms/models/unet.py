"""The denoising UNet of Stable Diffusion 1, 2 and XL, with the module tree of diffusers' UNet2DConditionModel.

Shapes: B batch, C latent channels, H, W height and width of the latents, S text tokens, E text width, T time width,
P width of pooled text, N add_time_ids.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from dreambooth_ms.models.specs import UNetSpec
from dreambooth_ms.models.transformer import Transformer2DModel
from dreambooth_ms.ops import ConcatChannels, Dense, FromPublicLayout, ToPublicLayout, conv2d, group_norm, shared


class UNet2DConditionModel(nn.Cell):
    """Noisy latents (B, C, H, W), timesteps (B,), text (B, S, E) -> prediction (B, C, H, W).

    SDXL's also takes pooled text (B, P) and add_time_ids (B, N), which are added to the time embedding. Inputs and
    prediction are float32, whatever it computes in.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.compute_dtype = ms.float32
        channels = spec.block_out_channels
        temb_dim = 4 * channels[0]
        self.from_public_layout = FromPublicLayout()
        self.time_proj = TimestepEncoding(channels[0])
        self.time_embedding = TimestepEmbedding(channels[0], temb_dim)
        self.adds_text_and_sizes = spec.addition_embed_type == "text_time"
        if self.adds_text_and_sizes:
            self.add_time_proj = TimestepEncoding(spec.addition_time_embed_dim)
            self.add_embedding = TimestepEmbedding(spec.projection_class_embeddings_input_dim, temb_dim)
        self.conv_in = conv2d(spec.in_channels, channels[0])
        self.down_blocks = nn.CellList(
            [DownBlock(spec, level, channels[max(level - 1, 0)], temb_dim) for level in range(len(channels))]
        )
        self.mid_block = MidBlock(spec, temb_dim)
        skips = _skip_channels(spec)
        self.up_blocks = nn.CellList()
        previous = channels[-1]
        for level in reversed(range(len(channels))):
            self.up_blocks.append(UpBlock(spec, level, previous, skips, temb_dim))
            previous = channels[level]
        self.conv_norm_out = group_norm(spec.norm_num_groups, channels[0], spec.norm_eps, silu=True)
        self.conv_out = conv2d(channels[0], spec.out_channels)
        self.to_public_layout = ToPublicLayout()

    @property
    def input_names(self) -> tuple[str, ...]:
        """What it takes, in order, by diffusers' names."""
        names = ("sample", "timestep", "encoder_hidden_states")
        return (*names, "text_embeds", "time_ids") if self.adds_text_and_sizes else names

    def construct(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BSE: Tensor, *pooled_and_sizes: Tensor
    ) -> Tensor:
        text_BSE = text_BSE.astype(self.compute_dtype)
        temb_BT = self.embed_time(timesteps_B, *pooled_and_sizes)
        x = self.enter(latents_BCHW)
        skips = (x,)
        for down_block in self.down_blocks:
            x, new_skips = down_block(x, temb_BT, text_BSE)
            skips = skips + new_skips
        x = self.mid_block(x, temb_BT, text_BSE)
        for up_block in self.up_blocks:
            used = up_block.num_layers
            x = up_block(x, skips[len(skips) - used :], temb_BT, text_BSE)
            skips = skips[: len(skips) - used]
        return self.leave(x)

    def embed_time(self, timesteps_B: Tensor, *pooled_and_sizes: Tensor) -> Tensor:
        """Timesteps, SDXL's pooled text and add_time_ids -> what every residual block is told, after a SiLU (B, T)."""
        dtype = self.compute_dtype
        temb_BT = self.time_embedding(self.time_proj(timesteps_B).astype(dtype))
        if self.adds_text_and_sizes:
            pooled_BP, sizes_BN = pooled_and_sizes
            encoded = self.add_time_proj(ops.reshape(sizes_BN, (-1,)))
            encoded = ops.reshape(encoded, (sizes_BN.shape[0], -1))
            temb_BT = temb_BT + self.add_embedding(ops.concat((pooled_BP, encoded), 1).astype(dtype))
        return ops.silu(temb_BT)

    def enter(self, latents_BCHW: Tensor) -> Tensor:
        """Latents -> an image with the channels of the finest resolution."""
        return self.conv_in(self.from_public_layout(latents_BCHW).astype(self.compute_dtype))

    def leave(self, x: Tensor) -> Tensor:
        """The image of the finest resolution -> the prediction (B, C, H, W)."""
        return self.to_public_layout(self.conv_out(self.conv_norm_out(x))).astype(ms.float32)


class TimestepEncoding(nn.Cell):
    """Timesteps (B,) -> cosines and sines (B, D) (Vaswani et al., 2017, with the cosines first)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.half = dim // 2
        self.frequencies = Tensor(np.exp(-math.log(10000) * np.arange(self.half) / self.half)[None], ms.float32)

    def construct(self, timesteps_B: Tensor) -> Tensor:
        batch = timesteps_B.shape[0]
        shape = (batch, self.half)
        angles = ops.broadcast_to(ops.reshape(timesteps_B.astype(ms.float32), (batch, 1)), shape) * ops.broadcast_to(
            self.frequencies, shape
        )
        return ops.concat((ops.cos(angles), ops.sin(angles)), 1)


class TimestepEmbedding(nn.Cell):
    """(B, D) -> (B, T)."""

    def __init__(self, dim: int, temb_dim: int) -> None:
        super().__init__()
        self.linear_1 = Dense(dim, temb_dim)
        self.linear_2 = Dense(temb_dim, temb_dim)

    def construct(self, encoding_BD: Tensor) -> Tensor:
        return self.linear_2(ops.silu(self.linear_1(encoding_BD)))


class DownBlock(nn.Cell):
    """The layers of one resolution on the way down; returns its output and what the way up will need."""

    def __init__(self, spec: UNetSpec, level: int, in_channels: int, temb_dim: int) -> None:
        super().__init__()
        channels = spec.block_out_channels[level]
        self.has_attention = spec.has_attention[level]
        self.has_downsampler = level < len(spec.block_out_channels) - 1
        self.num_layers = spec.layers_per_block
        self.resnets = nn.CellList(
            [
                ResnetBlock2D(
                    in_channels if i == 0 else channels, channels, spec.norm_num_groups, spec.norm_eps, temb_dim
                )
                for i in range(self.num_layers)
            ]
        )
        if self.has_attention:
            self.attentions = nn.CellList([_transformer(spec, level) for _ in range(self.num_layers)])
        if self.has_downsampler:
            self.downsamplers = nn.CellList([Downsample2D(channels, padding=(1, 1, 1, 1))])

    def construct(self, x: Tensor, temb_BT: Tensor, text_BSE: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        skips = ()
        for i in range(self.num_layers):
            x = self.resnets[i](x, temb_BT)
            if self.has_attention:
                x = self.attentions[i](x, text_BSE)
            skips = skips + (x,)
        if self.has_downsampler:
            x = self.downsamplers[0](x)
            skips = skips + (x,)
        return x, skips


class MidBlock(nn.Cell):
    """The layers of the coarsest resolution: residual block, transformer, residual block."""

    def __init__(self, spec: UNetSpec, temb_dim: int) -> None:
        super().__init__()
        channels = spec.block_out_channels[-1]
        self.resnets = nn.CellList(
            [ResnetBlock2D(channels, channels, spec.norm_num_groups, spec.norm_eps, temb_dim) for _ in range(2)]
        )
        self.attentions = nn.CellList([_transformer(spec, len(spec.block_out_channels) - 1)])

    def construct(self, x: Tensor, temb_BT: Tensor, text_BSE: Tensor) -> Tensor:
        x = self.resnets[0](x, temb_BT)
        x = self.attentions[0](x, text_BSE)
        return self.resnets[1](x, temb_BT)


class UpBlock(nn.Cell):
    """The layers of one resolution on the way up; each first takes a skip, the newest first."""

    def __init__(
        self, spec: UNetSpec, level: int, in_channels: int, skip_channels: tuple[int, ...], temb_dim: int
    ) -> None:
        super().__init__()
        channels = spec.block_out_channels[level]
        self.has_attention = spec.has_attention[level]
        self.has_upsampler = level > 0
        self.num_layers = spec.layers_per_block + 1
        first_skip = level * self.num_layers
        resnets = []
        for i in range(self.num_layers):
            skip = skip_channels[first_skip + self.num_layers - 1 - i]
            resnets.append(ResnetBlock2D(in_channels + skip, channels, spec.norm_num_groups, spec.norm_eps, temb_dim))
            in_channels = channels
        self.concat = shared(ConcatChannels)
        self.resnets = nn.CellList(resnets)
        if self.has_attention:
            self.attentions = nn.CellList([_transformer(spec, level) for _ in range(self.num_layers)])
        if self.has_upsampler:
            self.upsamplers = nn.CellList([Upsample2D(channels)])

    def construct(self, x: Tensor, skips: tuple[Tensor, ...], temb_BT: Tensor, text_BSE: Tensor) -> Tensor:
        for i in range(self.num_layers):
            x = self.resnets[i](self.concat(x, skips[self.num_layers - 1 - i]), temb_BT)
            if self.has_attention:
                x = self.attentions[i](x, text_BSE)
        if self.has_upsampler:
            x = self.upsamplers[0](x)
        return x


def _transformer(spec: UNetSpec, level: int) -> Transformer2DModel:
    return Transformer2DModel(
        spec.block_out_channels[level],
        spec.num_heads[level],
        spec.cross_attention_dim,
        spec.norm_num_groups,
        spec.use_linear_projection,
        spec.transformer_layers(level),
    )


def _skip_channels(spec: UNetSpec) -> tuple[int, ...]:
    """Channels of every skip in the order of its making: layers + 1 of them per resolution.

    The first is conv_in's; a resolution's last layer-skips are followed by its downsampler's, which belongs to the
    next resolution's group on the way up.
    """
    channels = spec.block_out_channels
    skips = [channels[0]]
    for level, width in enumerate(channels):
        skips += [width] * spec.layers_per_block
        if level < len(channels) - 1:
            skips.append(width)
    return tuple(skips)

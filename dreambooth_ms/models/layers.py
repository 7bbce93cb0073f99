"""The layers (`models.layout`) of UNet and autoencoder as cells.

Shapes: B batch, L image tokens, S text tokens, C channels.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from mindspore import Tensor, nn, ops

from dreambooth_ms.models.layout import Layer, LayerKind, time_width
from dreambooth_ms.models.specs import UNetSpec, VaeSpec
from dreambooth_ms.ops import Conv2d, Dense, GroupNorm, LayerNorm, MultiHeadAttention, average_pool, upsample_nearest
from dreambooth_ms.ops.graph import shared
from dreambooth_ms.ops.layout import add_per_channel, concat_channels, image_to_tokens, scale_and_shift, tokens_to_image
from dreambooth_ms.ops.linear import GatedGelu, activation
from dreambooth_ms.ops.norm import TokenGroupNorm
from dreambooth_ms.runtime.compiled_cell import CompiledCell


class ResnetBlock2D(nn.Cell):
    """Residual block: image[, skip to concatenate by channels][, time embedding after an activation (B, E)] -> image.

    The autoencoder's have no time embedding. One that changes the resolution does so behind its first norm.
    """

    def __init__(self, layer: Layer, spec: UNetSpec | VaeSpec) -> None:
        super().__init__()
        in_channels, out_channels = layer.in_channels, layer.out_channels
        self.has_skip, self.has_time = layer.kind is LayerKind.SKIP_RESNET, len(layer.reads) > 1
        self.scale_shifts, groups = spec.resnet_time_scale_shift == "scale_shift", spec.norm_num_groups
        self.norm1 = GroupNorm(groups, in_channels, spec.norm_eps, spec.act_fn)
        resample = {LayerKind.RESNET_DOWNSAMPLER: average_pool, LayerKind.RESNET_UPSAMPLER: upsample_nearest}
        self.resample = resample[layer.kind]() if layer.kind in resample else None
        self.conv1 = Conv2d(in_channels, out_channels)
        if self.has_time:
            self.time_emb_proj = Dense(time_width(spec), out_channels * (1 + self.scale_shifts))
        self.norm2 = GroupNorm(groups, out_channels, spec.norm_eps, "" if self.scale_shifts else spec.act_fn)
        self.act = activation(spec.act_fn)
        self.conv2 = Conv2d(out_channels, out_channels)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = Conv2d(in_channels, out_channels, kernel_size=1)
        in_middle = layer.name.startswith("mid_block.")
        self.scale = 1 / (spec.mid_block_scale_factor if in_middle else spec.resnet_out_scale_factor)

    def construct(self, x: Tensor, *skip_and_temb: Tensor) -> Tensor:
        if self.has_skip:
            x = concat_channels(x, skip_and_temb[0])
        y = self.norm1(x)
        if self.resample is not None:
            x, y = self.resample(x), self.resample(y)
        y = self.conv1(y)
        if self.has_time and not self.scale_shifts:
            y = add_per_channel(y, self.time_emb_proj(skip_and_temb[-1]))
        y = self.norm2(y)
        if self.scale_shifts:
            y = self.act(scale_and_shift(y, self.time_emb_proj(skip_and_temb[-1])))
        y = self.conv2(y)
        if self.has_shortcut:
            x = self.conv_shortcut(x)
        return x + y if self.scale == 1 else (x + y) * self.scale


class Downsample2D(nn.Cell):
    """Half the height and width, by a convolution of stride 2; the autoencoder's pads below and right only."""

    def __init__(self, layer: Layer, spec: UNetSpec | VaeSpec) -> None:
        super().__init__()
        padding = (0, 1, 0, 1) if isinstance(spec, VaeSpec) else (1, 1, 1, 1)
        self.conv = Conv2d(layer.in_channels, layer.out_channels, stride=2, padding=padding)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Cell):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, layer: Layer, _: object) -> None:
        super().__init__()
        self.upsample = upsample_nearest()
        self.conv = Conv2d(layer.in_channels, layer.out_channels)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(self.upsample(x))


class Transformer2DModel(nn.Cell):
    """Image with C channels, text (B, S, E) -> image with C channels, plus the input.

    The blocks of a deep one are layers of their own, which are put into `transformer_blocks` later.
    """

    def __init__(self, layer: Layer, spec: UNetSpec) -> None:
        super().__init__()
        channels, self.use_linear_projection = layer.out_channels, spec.use_linear_projection
        self.norm = GroupNorm(spec.norm_num_groups, channels, eps=1e-6)
        self.proj_in = Dense(channels, channels) if self.use_linear_projection else Conv2d(channels, channels, 1)
        blocks = [BasicTransformerBlock(layer, spec)] if layer.kind is LayerKind.TRANSFORMER else []
        self.transformer_blocks = nn.CellList(blocks)
        self.proj_out = Dense(channels, channels) if self.use_linear_projection else Conv2d(channels, channels, 1)

    def construct(self, x: Tensor, context_BSE: Tensor) -> Tensor:
        return self.project_out(self.transformer_blocks[0](self.project_in(x), context_BSE), x)

    def project_in(self, x: Tensor) -> Tensor:
        """An image -> the tokens (B, L, C) of the first block."""
        y = self.norm(x)
        return self.proj_in(image_to_tokens(y)) if self.use_linear_projection else image_to_tokens(self.proj_in(y))

    def project_out(self, tokens_BLC: Tensor, x: Tensor) -> Tensor:
        """The tokens of the last block, and the image that they came from -> an image."""
        if self.use_linear_projection:
            return x + tokens_to_image(self.proj_out(tokens_BLC), x)
        return x + self.proj_out(tokens_to_image(tokens_BLC, x))


class BasicTransformerBlock(nn.Cell):
    """Self-attention, cross-attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, layer: Layer, spec: UNetSpec) -> None:
        super().__init__()
        channels, num_heads = layer.out_channels, spec.num_heads[layer.level]
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, channels, num_heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, spec.cross_attention_dim, num_heads)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def construct(self, x_BLC: Tensor, context_BSE: Tensor) -> Tensor:
        y = self.norm1(x_BLC)
        x_BLC = x_BLC + self.attn1(y, y)
        x_BLC = x_BLC + self.attn2(self.norm2(x_BLC), context_BSE)
        return x_BLC + self.ff(self.norm3(x_BLC))


class Attention(nn.Cell):
    """Queries from x (B, L, C), keys and values from the context (B, S, E) -> (B, L, C)."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.to_q = Dense(channels, channels, has_bias=qkv_bias)
        self.to_k = Dense(context_dim, channels, has_bias=qkv_bias)
        self.to_v = Dense(context_dim, channels, has_bias=qkv_bias)
        self.attend = shared(MultiHeadAttention, num_heads, channels // num_heads)
        self.to_out = nn.CellList([Dense(channels, channels)])

    def construct(self, x_BLC: Tensor, context_BSE: Tensor) -> Tensor:
        out_BLC = self.attend(self.to_q(x_BLC), self.to_k(context_BSE), self.to_v(context_BSE))
        return self.to_out[0](out_BLC)


class FeedForward(nn.Cell):
    """GEGLU to four times the width, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.CellList([GEGLU(channels, 4 * channels), nn.Identity(), Dense(4 * channels, channels)])

    def construct(self, x_BLC: Tensor) -> Tensor:
        return self.net[2](self.net[0](x_BLC))


class GEGLU(nn.Cell):
    """x W_1 * gelu(x W_2) (Shazeer, 2020): (B, L, C) -> (B, L, D)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = Dense(channels, 2 * out_channels)
        self.out_channels = out_channels
        self.gated_gelu = shared(GatedGelu)

    def construct(self, x_BLC: Tensor) -> Tensor:
        y_BLE = self.proj(x_BLC)
        y_ND = self.gated_gelu(ops.reshape(y_BLE, (-1, 2 * self.out_channels)))
        return ops.reshape(y_ND, y_BLE.shape[:2] + (self.out_channels,))


class PixelAttention(Attention):
    """Self-attention of one head over the pixels of an image, behind a group norm and added to its input."""

    def __init__(self, layer: Layer, spec: VaeSpec) -> None:
        super().__init__(layer.in_channels, layer.in_channels, num_heads=1, qkv_bias=True)
        self.group_norm = GroupNorm(spec.norm_num_groups, layer.in_channels, spec.norm_eps)

    def construct(self, x: Tensor) -> Tensor:
        tokens_BLC = image_to_tokens(self.group_norm(x))
        return x + tokens_to_image(super().construct(tokens_BLC, tokens_BLC), x)


class TextAndPixelAttention(Attention):
    """Attention of an image's pixels to the tokens of a text (B, S, E) and, behind them, to each other; with
    `only_cross_attention` to the text alone. Added to the image."""

    def __init__(self, layer: Layer, spec: UNetSpec) -> None:
        channels, context = layer.out_channels, spec.cross_attention_dim
        super().__init__(channels, channels, spec.num_heads[layer.level], qkv_bias=True)
        self.sees_pixels = not spec.only_cross_attention
        if not self.sees_pixels:
            del self.to_k, self.to_v
        self.group_norm = GroupNorm(spec.norm_num_groups, channels, eps=1e-5)
        self.norm_cross = TokenGroupNorm(spec.text_groups, context, eps=1e-5) if spec.cross_attention_norm else None
        self.add_k_proj, self.add_v_proj = Dense(context, channels), Dense(context, channels)

    def construct(self, x: Tensor, context_BSE: Tensor) -> Tensor:
        if self.norm_cross is not None:
            context_BSE = self.norm_cross(context_BSE)
        tokens_BLC = image_to_tokens(self.group_norm(x))
        k, v = self.add_k_proj(context_BSE), self.add_v_proj(context_BSE)
        if self.sees_pixels:
            k, v = ops.concat((k, self.to_k(tokens_BLC)), 1), ops.concat((v, self.to_v(tokens_BLC)), 1)
        return x + tokens_to_image(self.to_out[0](self.attend(self.to_q(tokens_BLC), k, v)), x)


LAYERS: dict[LayerKind, Callable[[Layer, Any], nn.Cell]] = {
    LayerKind.CONV: lambda layer, _: Conv2d(layer.in_channels, layer.out_channels),
    LayerKind.NORM: lambda layer, spec: GroupNorm(spec.norm_num_groups, layer.in_channels, spec.norm_eps, spec.act_fn),
    **{kind: ResnetBlock2D for kind in LayerKind if "RESNET" in kind.name},
    LayerKind.TEXT_AND_PIXEL_ATTENTION: TextAndPixelAttention,
    LayerKind.DOWNSAMPLER: Downsample2D,
    LayerKind.UPSAMPLER: Upsample2D,
    LayerKind.PIXEL_ATTENTION: PixelAttention,
    LayerKind.TRANSFORMER: Transformer2DModel,
    LayerKind.TRANSFORMER_INPUT: Transformer2DModel,
    LayerKind.TRANSFORMER_BLOCK: BasicTransformerBlock,
}
"""What a layer is made by, of itself and the network's spec; what is missing is a method of the network."""


class CellMethod(CompiledCell):
    """A method of a cell as a cell of its own, which shares its layers."""

    def __init__(self, method: Any) -> None:
        super().__init__(auto_prefix=False)
        # By its name: a compiled graph that calls a bound method with *inputs is never freed (measured).
        self.owner, self.method = method.__self__, method.__name__
        self.title = getattr(self.owner, "title", method.__qualname__)

    def construct(self, *inputs: Tensor) -> Tensor:
        return getattr(self.owner, self.method)(*inputs)


def attach(root: nn.Cell, name: str, cell: Any) -> Any:
    """Put a cell at its public name in a network, where lists and blocks on the way are made with their first cell.

    Cells of a list come in order. Returns the cell.
    """
    *path, last = name.split(".")
    for part, child in pairwise((*path, last)):
        if not hasattr(root, part):
            root.insert_child_to_cell(part, nn.CellList() if child.isdigit() else nn.Cell())
        root = getattr(root, part)
    root.insert_child_to_cell(last, cell)
    return cell

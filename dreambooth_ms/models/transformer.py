"""The transformer between the UNet's convolutions. Shapes: B batch, L image tokens, S text tokens, C channels."""

from mindspore import Tensor, nn, ops

from dreambooth_ms.models.layout import Layer, LayerKind
from dreambooth_ms.models.specs import UNetSpec
from dreambooth_ms.ops import Conv2d, Dense, GatedGelu, GroupNorm, LayerNorm, MultiHeadAttention, shared
from dreambooth_ms.ops.layout import image_to_tokens, tokens_to_image


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

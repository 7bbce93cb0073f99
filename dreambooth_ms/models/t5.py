"""The encoder of T5 v1.1 (Raffel et al., 2020; Shazeer, 2020) with the module tree of transformers' T5EncoderModel.

Shapes: B texts, S tokens, D width of the states, F of the feed-forward part, K buckets, N heads, M = B * N.

States between layers are float32, and so is the last product of each feed-forward part: in float16 those of the
published model overflow.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.models.layers import attach
from dreambooth_ms.models.specs import T5Spec
from dreambooth_ms.models.words import TextEncoder
from dreambooth_ms.ops import BiasedAttention, Dense, Embedding, RmsNorm, TanhGelu, hidden_keys, shared
from dreambooth_ms.ops.linear import transposed_times


class T5EncoderModel(TextEncoder):
    """Token ids (B, S) -> normalised states (B, S, D) after the last layer; what fills up a text (token 0) has states,
    too, but with `use_attention_mask` no token sees it."""

    table = "shared"

    def __init__(self, spec: T5Spec, use_attention_mask: bool = False) -> None:
        super().__init__()
        self.spec, self.use_attention_mask = spec, use_attention_mask
        self.shared = Embedding(spec.vocab_size, spec.d_model)
        attach(self, "encoder.block", nn.CellList([T5Block(spec) for _ in range(spec.num_layers)]))
        # All layers attend with the bias of the first.
        name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
        self.position_bias = attach(self, name, PositionBias(spec))
        attach(self, "encoder.final_layer_norm", RmsNorm(spec.d_model, spec.layer_norm_epsilon))

    def read(self, ids_BS: Tensor, ends: tuple[Tensor, ...], skip: int) -> tuple[Tensor, ...]:
        """What a denoiser reads: (states (B, S, D),)."""
        bias_MSS = self.position_bias(*ids_BS.shape)
        if self.use_attention_mask:
            visible_BS = (ids_BS != self.spec.pad_token_id).astype(ms.float32)
            bias_MSS = bias_MSS + hidden_keys(visible_BS, self.spec.num_heads)
        x_BSD = self.shared(ids_BS).astype(ms.float32)
        for block in self.encoder.block:
            x_BSD = block(x_BSD, bias_MSS)
        return (self.encoder.final_layer_norm(x_BSD),)


class T5Block(nn.Cell):
    """Self-attention without a scale, and feed-forward, each behind a norm and added to its input.

    States (B, S, D) float32, what is added to scores (M, S, S) -> (B, S, D) float32.
    """

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        width, inner = spec.d_model, spec.num_heads * spec.d_kv
        for name in ("q", "k", "v"):
            attach(self, f"layer.0.SelfAttention.{name}", Dense(width, inner, has_bias=False))
        attach(self, "layer.0.SelfAttention.o", Dense(inner, width, has_bias=False))
        attach(self, "layer.0.layer_norm", RmsNorm(width, spec.layer_norm_epsilon))
        for name in ("wi_0", "wi_1"):
            attach(self, f"layer.1.DenseReluDense.{name}", Dense(width, spec.d_ff, has_bias=False))
        attach(self, "layer.1.DenseReluDense.wo", Dense(spec.d_ff, width, has_bias=False))
        attach(self, "layer.1.layer_norm", RmsNorm(width, spec.layer_norm_epsilon))
        self.attend = shared(BiasedAttention, spec.num_heads, spec.d_kv, 1.0)
        self.activation = shared(TanhGelu)

    def construct(self, x_BSD: Tensor, bias_MSS: Tensor) -> Tensor:
        own, y_BSD = self.layer[0].SelfAttention, self.layer[0].layer_norm(x_BSD)
        y_BSD = own.o(self.attend(own.q(y_BSD), own.k(y_BSD), own.v(y_BSD), bias_MSS))
        x_BSD = x_BSD + y_BSD.astype(ms.float32)
        own, y_BSD = self.layer[1].DenseReluDense, self.layer[1].layer_norm(x_BSD)
        gate_BSF = self.activation(own.wi_0(y_BSD).astype(ms.float32))
        return x_BSD + own.wo(gate_BSF * own.wi_1(y_BSD).astype(ms.float32))


class PositionBias(Embedding):
    """What is added to scores for the distance of two tokens: numbers of texts and of tokens -> (M, S, S) float32."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__(spec.relative_attention_num_buckets, spec.num_heads)
        self.max_distance = spec.relative_attention_max_distance

    def construct(self, batch: int, length: int) -> Tensor:
        in_bucket = in_buckets(length, self.weight.shape[0], self.max_distance)
        bias_1P = ops.reshape(transposed_times(self.weight.astype(ms.float32), in_bucket), (1, -1))
        return ops.reshape(ops.broadcast_to(bias_1P, (batch, bias_1P.shape[1])), (-1, length, length))


@constexpr
def in_buckets(length: int, count: int, max_distance: int) -> Tensor:
    """1 where the distance of a query to a key is in a bucket, 0 elsewhere: (K, S * S) float32. A product with it is a
    lookup, and so is its gradient.

    There are buckets for each sign, exact below a quarter of them, then in logarithmic steps up to `max_distance`
    (Raffel et al., 2020, section 2.1).
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact, steps = count // 2, count // 4, np.abs(distance)
    # In float32, as transformers does: at powers of 2 the last bit decides.
    far = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (far * np.float32(half - exact)).astype(int), half - 1)
    buckets = half * (distance > 0) + np.where(steps < exact, steps, far)
    return Tensor(buckets.reshape(1, -1) == np.arange(count)[:, None], ms.float32)

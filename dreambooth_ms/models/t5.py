"""The encoder of T5 v1.1 (Raffel et al., 2020; Shazeer, 2020) with the module tree of transformers' T5EncoderModel.

Shapes: B texts, S tokens, D width of the states, K buckets, N heads, M = B * N. States between layers are float32, and
so is the last product of each feed-forward part: in float16 those of the published model overflow.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.models.clip import ExtendedEmbedding
from dreambooth_ms.models.specs import T5Spec
from dreambooth_ms.ops import BiasedAttention, Dense, Embedding, RmsNorm, TanhGelu, hidden_keys, shared
from dreambooth_ms.ops.linear import transposed_times


class T5EncoderModel(nn.Cell):
    """Token ids (B, S) -> normalised states (B, S, D) after the last layer; what fills up a text has states, too.

    Args:
        spec: its sizes.
        use_attention_mask: whether no token sees what fills up a text (token 0).
    """

    most_skipped = 0
    """How many layers `read` can leave out."""

    def __init__(self, spec: T5Spec, use_attention_mask: bool = False) -> None:
        super().__init__()
        self.spec, self.use_attention_mask = spec, use_attention_mask
        self.shared = Embedding(spec.vocab_size, spec.d_model)
        self.encoder = T5Stack(spec)

    def construct(self, ids_BS: Tensor) -> Tensor:
        return self.read(ids_BS, (), 0)[0]

    def read(self, ids_BS: Tensor, ends: tuple[Tensor, ...], skip: int) -> tuple[Tensor, ...]:
        """What a denoiser reads, (states (B, S, D),); it pools nothing, and leaves out no layer."""
        hidden_MSS = None
        if self.use_attention_mask:
            visible_BS = (ids_BS != self.spec.pad_token_id).astype(ms.float32)
            hidden_MSS = hidden_keys(visible_BS, self.spec.num_heads)
        return (self.encoder(self.shared(ids_BS).astype(ms.float32), hidden_MSS),)

    @property
    def words(self) -> Embedding | ExtendedEmbedding:
        """The table of tokens."""
        return self.shared

    def add_words(self, rows_WD: np.ndarray) -> None:
        """Let ids from the size of the vocabulary on stand for these vectors."""
        self.shared = ExtendedEmbedding(self.shared, rows_WD)

    def is_read(self, parameter: str, skip: int) -> bool:
        """Whether what `read` yields depends on a parameter."""
        return True


class T5Stack(nn.Cell):
    """States (B, S, D), and a bias that hides keys or None -> (B, S, D). The first layer's bias is that of all."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.block = nn.CellList([T5Block(spec, number == 0) for number in range(spec.num_layers)])
        self.final_layer_norm = RmsNorm(spec.d_model, spec.layer_norm_epsilon)

    def construct(self, x_BSD: Tensor, hidden_MSS: Tensor | None) -> Tensor:
        batch, length, _ = x_BSD.shape
        bias_MSS = self.block[0].layer[0].SelfAttention.position_bias(batch, length)
        if hidden_MSS is not None:
            bias_MSS = bias_MSS + hidden_MSS
        for block in self.block:
            x_BSD = block(x_BSD, bias_MSS)
        return self.final_layer_norm(x_BSD)


class T5Block(nn.Cell):
    """Self-attention and feed-forward."""

    def __init__(self, spec: T5Spec, is_first: bool) -> None:
        super().__init__()
        self.layer = nn.CellList([T5LayerSelfAttention(spec, is_first), T5LayerFF(spec)])

    def construct(self, x_BSD: Tensor, bias_MSS: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x_BSD, bias_MSS))


class T5LayerSelfAttention(nn.Cell):
    """Behind a norm, and added to its input."""

    def __init__(self, spec: T5Spec, is_first: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(spec, is_first)
        self.layer_norm = RmsNorm(spec.d_model, spec.layer_norm_epsilon)

    def construct(self, x_BSD: Tensor, bias_MSS: Tensor) -> Tensor:
        return x_BSD + self.SelfAttention(self.layer_norm(x_BSD), bias_MSS).astype(ms.float32)


class T5Attention(nn.Cell):
    """Multi-head self-attention without a scale: (B, S, D), bias (M, S, S) -> (B, S, D)."""

    def __init__(self, spec: T5Spec, has_bias: bool) -> None:
        super().__init__()
        inner = spec.num_heads * spec.d_kv
        self.q = Dense(spec.d_model, inner, has_bias=False)
        self.k = Dense(spec.d_model, inner, has_bias=False)
        self.v = Dense(spec.d_model, inner, has_bias=False)
        self.o = Dense(inner, spec.d_model, has_bias=False)
        self.attend = shared(BiasedAttention, spec.num_heads, spec.d_kv, 1.0)
        self.num_heads, self.max_distance = spec.num_heads, spec.relative_attention_max_distance
        if has_bias:
            self.relative_attention_bias = Embedding(spec.relative_attention_num_buckets, spec.num_heads)

    def construct(self, x_BSD: Tensor, bias_MSS: Tensor) -> Tensor:
        return self.o(self.attend(self.q(x_BSD), self.k(x_BSD), self.v(x_BSD), bias_MSS))

    def position_bias(self, batch: int, length: int) -> Tensor:
        """What is added to scores for the distances of the tokens, (M, S, S) float32."""
        bias_KN = self.relative_attention_bias.weight.astype(ms.float32)
        bias = transposed_times(bias_KN, _is_in_bucket(length, bias_KN.shape[0], self.max_distance))
        bias = ops.broadcast_to(ops.reshape(bias, (1, -1)), (batch, self.num_heads * length * length))
        return ops.reshape(bias, (-1, length, length))


class T5LayerFF(nn.Cell):
    """Behind a norm, and added to its input."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(spec)
        self.layer_norm = RmsNorm(spec.d_model, spec.layer_norm_epsilon)

    def construct(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.DenseReluDense(self.layer_norm(x_BSD))


class T5DenseGatedActDense(nn.Cell):
    """The feed-forward part of a layer: (B, S, D) -> (B, S, D) float32."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.wi_0 = Dense(spec.d_model, spec.d_ff, has_bias=False)
        self.wi_1 = Dense(spec.d_model, spec.d_ff, has_bias=False)
        self.wo = Dense(spec.d_ff, spec.d_model, has_bias=False)
        self.activation = shared(TanhGelu)

    def construct(self, x_BSD: Tensor) -> Tensor:
        return self.wo(self.activation(self.wi_0(x_BSD).astype(ms.float32)) * self.wi_1(x_BSD).astype(ms.float32))


def position_buckets(length: int, count: int, max_distance: int) -> np.ndarray:
    """The bucket of each query's distance to each key, (S, S) int: of its sign, and exact below a quarter of the
    buckets, then in logarithmic steps up to `max_distance` (Raffel et al., 2020, section 2.1)."""
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = count // 2, count // 4
    # In float32, as transformers does: at 8, 16, 32 and so on the last bit decides.
    far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact))
    far = exact + (far / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)).astype(int)
    steps = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(far, half - 1))
    return half * (distance > 0) + steps


@constexpr
def _is_in_bucket(length: int, count: int, max_distance: int) -> Tensor:
    """(K, S * S) float32: 1 where a distance is in a bucket. A product with it is a lookup, and so is its gradient."""
    buckets = position_buckets(length, count, max_distance).reshape(1, -1)
    return Tensor(buckets == np.arange(count)[:, None], ms.float32)

"""XLM-R (Conneau et al., 2020) with a linear layer behind it (Chen et al., 2022), as AltDiffusion has it, with the
module tree of FlagAI's RobertaSeriesModelWithTransformation.

Shapes: B texts, S tokens, D width of the layers, E of what it gives, N heads, M = B * N.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.models.layers import attach
from dreambooth_ms.models.specs import RobertaSpec, TransformerSpec
from dreambooth_ms.models.words import TextEncoder
from dreambooth_ms.ops import BiasedAttention, Dense, Embedding, Gelu, LayerNorm, hidden_keys, look_up, part, shared
from dreambooth_ms.ops.linear import times


class RobertaSeriesModelWithTransformation(TextEncoder):
    """Token ids (B, S) -> projected states (B, S, E); what fills up a text has some, too."""

    table = "roberta.embeddings.word_embeddings"

    def __init__(self, spec: RobertaSpec) -> None:
        super().__init__()
        self.spec, width, layers = spec, spec.transformer.hidden_size, spec.transformer.num_hidden_layers
        # The pre-transformation reads the states before the last layer, which is only for its teacher.
        self.layers_read = layers - spec.has_pre_transformation
        attach(self, "roberta.embeddings", RobertaEmbeddings(spec))
        attach(self, "roberta.encoder.layer", nn.CellList([RobertaLayer(spec.transformer) for _ in range(layers)]))
        self.transformation = Dense(width, spec.project_dim)
        if spec.has_pre_transformation:
            self.transformation_pre = Dense(width, spec.project_dim)
            self.pre_LN = LayerNorm(width, spec.transformer.layer_norm_eps)

    def read(self, ids_BS: Tensor, ends: tuple[Tensor, ...], skip: int) -> tuple[Tensor, ...]:
        """What a denoiser reads: (states (B, S, E),)."""
        visible_BS, bias_MSS = (ids_BS != self.spec.pad_token_id).astype(ms.float32), None
        if self.spec.use_attention_mask:
            bias_MSS = hidden_keys(visible_BS, self.spec.transformer.num_attention_heads)
        x_BSD = self.roberta.embeddings(ids_BS, visible_BS)
        for number, layer in enumerate(self.roberta.encoder.layer):
            if number < self.layers_read:
                x_BSD = layer(x_BSD, bias_MSS)
        if self.spec.has_pre_transformation:
            return (self.transformation_pre(self.pre_LN(x_BSD)),)
        return (self.transformation(x_BSD),)

    def is_read(self, parameter: str, skip: int) -> bool:
        unread = ("transformation.", f"roberta.encoder.layer.{self.layers_read}.")
        return not (self.spec.has_pre_transformation and parameter.startswith(unread))


class RobertaEmbeddings(nn.Cell):
    """A vector per token plus one per position and one for all, normalised, in the dtype that the tower computes in."""

    def __init__(self, spec: RobertaSpec) -> None:
        super().__init__()
        width = spec.transformer.hidden_size
        self.compute_dtype, self.pad = ms.float32, spec.pad_token_id
        self.word_embeddings = Embedding(spec.vocab_size, width)
        self.position_embeddings = Embedding(spec.max_position_embeddings, width)
        self.token_type_embeddings = Embedding(spec.type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, spec.transformer.layer_norm_eps)

    def construct(self, ids_BS: Tensor, visible_BS: Tensor) -> Tensor:
        # Positions count what is visible; what is not has that of the token that fills up.
        counts_BS = times(visible_BS, _up_to_here(ids_BS.shape[1])) * visible_BS
        positions_BSD = look_up(self.position_embeddings.weight, counts_BS.astype(ms.int32) + self.pad)
        x_BSD = self.word_embeddings(ids_BS).astype(ms.float32) + positions_BSD.astype(ms.float32)
        type_1D = part(self.token_type_embeddings.weight, 0, 1).astype(ms.float32)
        return self.LayerNorm(x_BSD + ops.broadcast_to(type_1D, x_BSD.shape)).astype(self.compute_dtype)


class RobertaLayer(nn.Cell):
    """Self-attention and feed-forward, each added to its input before a norm: (B, S, D), bias or None -> (B, S, D)."""

    def __init__(self, tower: TransformerSpec) -> None:
        super().__init__()
        width, inner, eps = tower.hidden_size, tower.intermediate_size, tower.layer_norm_eps
        for name in ("query", "key", "value"):
            attach(self, f"attention.self.{name}", Dense(width, width))
        attach(self, "attention.output.dense", Dense(width, width))
        attach(self, "attention.output.LayerNorm", LayerNorm(width, eps))
        attach(self, "intermediate.dense", Dense(width, inner))
        attach(self, "output.dense", Dense(inner, width))
        attach(self, "output.LayerNorm", LayerNorm(width, eps))
        head_dim = width // tower.num_attention_heads
        self.attend = shared(BiasedAttention, tower.num_attention_heads, head_dim, head_dim**-0.5)
        self.activation = shared(Gelu)

    def construct(self, x_BSD: Tensor, bias_MSS: Tensor | None) -> Tensor:
        inputs, output = self.attention.self, self.attention.output
        y_BSD = self.attend(inputs.query(x_BSD), inputs.key(x_BSD), inputs.value(x_BSD), bias_MSS)
        x_BSD = output.LayerNorm(x_BSD + output.dense(y_BSD))
        return self.output.LayerNorm(x_BSD + self.output.dense(self.activation(self.intermediate.dense(x_BSD))))


@constexpr
def _up_to_here(length: int) -> Tensor:
    """(S, S) float32, by which a product of rows is their running sums."""
    return Tensor(np.triu(np.ones((length, length))), ms.float32)

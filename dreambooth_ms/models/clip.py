"""CLIP (Radford et al., 2021) with the module tree of transformers' CLIPModel and its text models.

Shapes: B batch, S text tokens, P image patches, D width of a tower, E width of the shared space.
"""

import re

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.models.specs import TABLE, UNSAID_END, ClipSpec, ClipTextSpec, ClipVisionSpec, TransformerSpec
from dreambooth_ms.models.words import TextEncoder
from dreambooth_ms.ops import Conv2d, Dense, Embedding, LayerNorm, MultiHeadAttention, part, shared
from dreambooth_ms.ops.layout import from_public_layout, image_to_tokens
from dreambooth_ms.ops.linear import Gelu, QuickGelu, empty_parameter


class CLIPTextModel(TextEncoder):
    """Token ids (B, S) -> normalised hidden states (B, S, D); of one that pools, what `read` yields.

    With a projection it pools the text, as SDXL's second one does. With `last_layer` `read` yields the normalised
    states, as SD 1 and 2 take them, else those before the last layer without a norm, as SDXL does, and any that pools.
    """

    table = TABLE

    def __init__(self, spec: ClipTextSpec, last_layer: bool = True) -> None:
        super().__init__()
        self.spec, self.pools = spec, spec.projection_dim is not None
        self.last_layer = last_layer and not self.pools
        self.text_model = TextTransformer(spec)
        if self.pools:
            # Without it, its parameters would have the names of SDXL's first encoder's.
            self.name_prefix = "text_encoder_2."
            self.text_projection = Dense(spec.transformer.hidden_size, spec.projection_dim, has_bias=False)

    def construct(self, ids_BS: Tensor, *ends: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.read(ids_BS, ends, 0) if self.pools else self.text_model(ids_BS)

    def read(self, ids_BS: Tensor, ends: tuple[Tensor, ...], skip: int) -> tuple[Tensor, ...]:
        """What a denoiser reads: states (B, S, D) with the work of `skip` layers less, and pooled text (B, E) of all.

        The first of `ends` (B, S) is 1 at each text's end token and 0 elsewhere.
        """
        if self.last_layer:
            return (self.text_model.final_layer_norm(self.text_model.states(ids_BS, skip)[0]),)
        states_BSD, last_BSD = self.text_model.states(ids_BS, skip + 1)
        if not self.pools:
            return (states_BSD,)
        return states_BSD, self.text_projection(_at_end(self.text_model.final_layer_norm(last_BSD), ends[0]))

    @property
    def most_skipped(self) -> int:
        return self.spec.transformer.num_hidden_layers - (1 if self.last_layer else 2)

    def is_read(self, parameter: str, skip: int) -> bool:
        """Whether what `read` yields depends on a parameter: pooled text does on all."""
        if self.pools or not parameter.startswith(("text_model.encoder.", "text_model.final_layer_norm.")):
            return True
        layer = re.search(r"layers\.(\d+)", parameter)
        return int(layer[1]) <= self.most_skipped - skip if layer else self.last_layer


class CLIPModel(nn.Cell):
    """Both towers, which encode images and texts as unit vectors (B, E) of one space."""

    title = "the CLIP model"

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.text_model = TextTransformer(spec.text)
        self.vision_model = VisionTransformer(spec.vision)
        self.visual_projection = Dense(spec.vision.transformer.hidden_size, spec.projection_dim, has_bias=False)
        self.text_projection = Dense(spec.text.transformer.hidden_size, spec.projection_dim, has_bias=False)
        self.logit_scale = empty_parameter(())

    def construct(self, ids_BS: Tensor, end_BS: Tensor, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Texts and images -> (B, E), (B, E). `end_BS` is 1 at each text's end token and 0 elsewhere."""
        return self.encode_text(ids_BS, end_BS), self.encode_image(pictures_B3HW)

    def encode_text(self, ids_BS: Tensor, end_BS: Tensor) -> Tensor:
        """Texts and where they end -> unit vectors (B, E)."""
        return unit(self.text_projection(_at_end(self.text_model(ids_BS), end_BS)))

    def encode_image(self, pictures_B3HW: Tensor) -> Tensor:
        """Pictures, normalised as this model expects them -> unit vectors (B, E)."""
        return unit(self.visual_projection(self.vision_model(pictures_B3HW)))


class TextTransformer(nn.Cell):
    """Token ids (B, S) -> (B, S, D). Tokens see only the ones before them."""

    def __init__(self, spec: ClipTextSpec) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(spec)
        self.encoder = ClipEncoder(spec.transformer, causal=True)
        self.final_layer_norm = LayerNorm(spec.transformer.hidden_size, spec.transformer.layer_norm_eps)

    def construct(self, ids_BS: Tensor) -> Tensor:
        return self.final_layer_norm(self.states(ids_BS, 0)[1])

    def states(self, ids_BS: Tensor, skip: int) -> tuple[Tensor, Tensor]:
        """The states before the last `skip` layers, and after all; neither is normalised."""
        return self.encoder(self.embeddings(ids_BS), skip)


class TextEmbeddings(nn.Cell):
    """A vector per token plus one per position, in the dtype that the whole tower then computes in."""

    def __init__(self, spec: ClipTextSpec) -> None:
        super().__init__()
        self.compute_dtype = ms.float32
        self.token_embedding = Embedding(spec.vocab_size, spec.transformer.hidden_size)
        self.position_embedding = Embedding(spec.max_position_embeddings, spec.transformer.hidden_size)

    def construct(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.token_embedding(ids_BS)
        positions_SD = part(self.position_embedding.weight, 0, x_BSD.shape[1])
        return (x_BSD + ops.broadcast_to(positions_SD, x_BSD.shape)).astype(self.compute_dtype)


class VisionTransformer(nn.Cell):
    """Pictures (B, 3, H, W) -> (B, D), read at the class token."""

    def __init__(self, spec: ClipVisionSpec) -> None:
        super().__init__()
        width, eps = spec.transformer.hidden_size, spec.transformer.layer_norm_eps
        self.embeddings = VisionEmbeddings(spec)
        # The public name has this spelling.
        self.pre_layrnorm = LayerNorm(width, eps)
        self.encoder = ClipEncoder(spec.transformer, causal=False)
        self.post_layernorm = LayerNorm(width, eps)

    def construct(self, pictures_B3HW: Tensor) -> Tensor:
        _, hidden_BPD = self.encoder(self.pre_layrnorm(self.embeddings(pictures_B3HW)), 0)
        return self.post_layernorm(hidden_BPD[:, 0])


class VisionEmbeddings(nn.Cell):
    """The class token, then a vector per patch; plus one per position."""

    def __init__(self, spec: ClipVisionSpec) -> None:
        super().__init__()
        width, size = spec.transformer.hidden_size, spec.patch_size
        self.class_embedding = empty_parameter((width,))
        self.patch_embedding = Conv2d(3, width, size, stride=size, padding=(0, 0, 0, 0), has_bias=False)
        self.position_embedding = Embedding((spec.image_size // size) ** 2 + 1, width)

    def construct(self, pictures_B3HW: Tensor) -> Tensor:
        patches_BPD = image_to_tokens(self.patch_embedding(from_public_layout(pictures_B3HW)))
        return behind_class_token(patches_BPD, self.class_embedding, self.position_embedding.weight)


def behind_class_token(patches_BPD: Tensor, token: Tensor, positions: Tensor) -> Tensor:
    """Patches -> (B, 1 + P, D): the class token before them, and what stands for each place added."""
    batch, _, width = patches_BPD.shape
    class_B1D = ops.broadcast_to(ops.reshape(token, (1, 1, width)), (batch, 1, width))
    x_BPD = ops.concat((class_B1D, patches_BPD), 1)
    return x_BPD + ops.broadcast_to(positions, x_BPD.shape)


class ClipEncoder(nn.Cell):
    """Pre-norm transformer layers: (B, S, D) -> the states before the last `skip` layers, and after all, (B, S, D)."""

    def __init__(self, spec: TransformerSpec, causal: bool) -> None:
        super().__init__()
        self.layers = nn.CellList([ClipEncoderLayer(spec, causal) for _ in range(spec.num_hidden_layers)])

    def construct(self, x_BSD: Tensor, skip: int) -> tuple[Tensor, Tensor]:
        first_skipped, early_BSD = len(self.layers) - skip, x_BSD
        for number, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD)
            if number < first_skipped:
                early_BSD = x_BSD
        return early_BSD, x_BSD


class ClipEncoderLayer(nn.Cell):
    """Self-attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, spec: TransformerSpec, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(spec.hidden_size, spec.layer_norm_eps)
        self.self_attn = ClipAttention(spec.hidden_size, spec.num_attention_heads, causal)
        self.layer_norm2 = LayerNorm(spec.hidden_size, spec.layer_norm_eps)
        self.mlp = ClipMlp(spec)

    def construct(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.layer_norm1(x_BSD))
        return x_BSD + self.mlp(self.layer_norm2(x_BSD))


class ClipAttention(nn.Cell):
    """Multi-head self-attention: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.q_proj = Dense(width, width)
        self.k_proj = Dense(width, width)
        self.v_proj = Dense(width, width)
        self.attend = shared(MultiHeadAttention, num_heads, width // num_heads, causal)
        self.out_proj = Dense(width, width)

    def construct(self, x_BSD: Tensor) -> Tensor:
        return self.out_proj(self.attend(self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)))


class ClipMlp(nn.Cell):
    """The feed-forward part of a layer."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.fc1 = Dense(spec.hidden_size, spec.intermediate_size)
        self.activation = shared(QuickGelu) if spec.hidden_act == "quick_gelu" else shared(Gelu)
        self.fc2 = Dense(spec.intermediate_size, spec.hidden_size)

    def construct(self, x_BSD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_BSD)))


def end_positions(ids_BS: np.ndarray, eos_token_id: int) -> np.ndarray:
    """1.0 at each text's first end token, 0.0 elsewhere: (B, S) float32."""
    first = ids_BS.argmax(1) if eos_token_id == UNSAID_END else (ids_BS == eos_token_id).argmax(1)
    return np.eye(ids_BS.shape[1], dtype=np.float32)[first]


def _at_end(hidden_BSD: Tensor, end_BS: Tensor) -> Tensor:
    batch, length, width = hidden_BSD.shape
    end_B1S = ops.reshape(end_BS, (batch, 1, length)).astype(hidden_BSD.dtype)
    return ops.reshape(ops.bmm(end_B1S, hidden_BSD), (batch, width))


def unit(x_BE: Tensor) -> Tensor:
    """Vectors of length 1, in the same directions."""
    norm_B1 = ops.sqrt((x_BE * x_BE).sum(1, keepdims=True))
    return x_BE / ops.broadcast_to(norm_B1, x_BE.shape).astype(ms.float32)

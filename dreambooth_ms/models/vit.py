"""A vision transformer (Dosovitskiy et al., 2021), as DINO trained it (Caron et al., 2021), with the module tree of
transformers' ViTModel. Its layers are those of CLIP's towers under other names.

Shapes: B batch, P image patches, D width.
"""

from mindspore import Tensor, nn

from dreambooth_ms.models.clip import ClipEncoder, behind_class_token, unit
from dreambooth_ms.models.layers import attach
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.specs import ClipVisionSpec
from dreambooth_ms.ops import Conv2d, LayerNorm
from dreambooth_ms.ops.layout import from_public_layout, image_to_tokens
from dreambooth_ms.ops.linear import empty_parameter

_NAMES = {
    "layer_norm1": "layernorm_before", "layer_norm2": "layernorm_after",
    "self_attn.q_proj": "attention.attention.query", "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value", "self_attn.out_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
"""Modules of a layer of CLIP, and what they are called here."""


class ViTModel(nn.Cell):
    """Encodes pictures as unit vectors (B, D), read at the class token; without transformers' pooler."""

    title = "the DINO model"

    def __init__(self, spec: ClipVisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = ViTEmbeddings(spec)
        transformer = ClipEncoder(spec.transformer, causal=False)
        for number, layer in enumerate(transformer.layers):
            for inner, name in _NAMES.items():
                attach(self, f"encoder.layer.{number}.{name}", layer.get_sub_cell(inner))
        self.layernorm = LayerNorm(spec.transformer.hidden_size, spec.transformer.layer_norm_eps)
        # Last, so that every cell is found by its public name first.
        self.transformer = transformer
        public_parameters(self)

    def encode_image(self, pictures_B3HW: Tensor) -> Tensor:
        """Pictures, normalised as this model expects them -> unit vectors (B, D)."""
        _, hidden_BPD = self.transformer(self.embeddings(pictures_B3HW), 0)
        return unit(self.layernorm(hidden_BPD[:, 0]))


class ViTEmbeddings(nn.Cell):
    """The class token, then a vector per patch; plus one per position."""

    def __init__(self, spec: ClipVisionSpec) -> None:
        super().__init__()
        width, size = spec.transformer.hidden_size, spec.patch_size
        self.cls_token = empty_parameter((1, 1, width))
        self.position_embeddings = empty_parameter((1, (spec.image_size // size) ** 2 + 1, width))
        attach(self, "patch_embeddings.projection", Conv2d(3, width, size, stride=size, padding=(0, 0, 0, 0)))

    def construct(self, pictures_B3HW: Tensor) -> Tensor:
        patches_BPD = image_to_tokens(self.patch_embeddings.projection(from_public_layout(pictures_B3HW)))
        return behind_class_token(patches_BPD, self.cls_token, self.position_embeddings)

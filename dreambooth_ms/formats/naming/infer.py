"""The sizes of a model's networks, from the names and shapes of a file.

Shapes do not show the number of attention heads, the groups of the group norms or the size of the pictures; these are
the family's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from dreambooth_ms.formats.naming.formats import Format, spell
from dreambooth_ms.formats.naming.slots import Shape
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import PUBLISHED_MODELS, ClipTextSpec, Family, ModelSpec, UNetSpec, VaeSpec

HEAD_WIDTH = 64
"""Channels of an attention head in every family but SD 1, whose UNet has 8 heads at every resolution."""


@dataclass(frozen=True)
class StoredModel:
    """The shapes of a file, asked for by public name."""

    stored: Mapping[str, Shape]
    form: Format
    model: ModelSpec
    """A model with the same names as far as they are asked for."""

    def shape(self, name: str) -> Shape | None:
        """The public shape of a parameter, or None if the file does not hold it."""
        for slot in spell(self.form, name, self.model):
            if slot.name in self.stored:
                return slot.public_shape(self.stored[slot.name])
        return None

    def size(self, name: str, axis: int = 0) -> int:
        """One side of a parameter; 0 if the file does not hold it."""
        shape = self.shape(name)
        return shape[axis] if shape and len(shape) > axis else 0

    def count(self, pattern: str) -> int:
        """How many names of a pattern with {} for a number are there, from 0 on."""
        return next(i for i in count() if self.shape(pattern.format(i)) is None)


def infer_model(stored: Mapping[str, Shape], form: Format, family: Family) -> ModelSpec:
    """The networks of a file by its cleaned names and shapes; parts that it lacks are the published ones."""
    published = next(model for model in PUBLISHED_MODELS if model.family is family)
    model = replace(published, unet=_infer_unet(StoredModel(stored, form, published)))
    file = StoredModel(stored, form, model)
    inferred: dict[str, Any] = {"vae": infer_vae(file)} if file.shape("vae.encoder.conv_in.weight") else {}
    for part in ("text_encoder", "text_encoder_2"):
        tower = getattr(model, part)
        if tower and file.shape(f"{part}.text_model.embeddings.token_embedding.weight"):
            inferred[part] = _infer_text(file, part, tower)
    model = replace(model, **inferred)
    likely = with_channels(published, model.unet.in_channels, model.unet.out_channels)
    return likely if model_shapes(model) == model_shapes(likely) else model


def with_channels(model: ModelSpec, in_channels: int, out_channels: int) -> ModelSpec:
    """A model whose UNet takes and gives other numbers of channels, as one for inpainting does."""
    return replace(model, unet=replace(model.unet, in_channels=in_channels, out_channels=out_channels))


def _infer_unet(file: StoredModel) -> UNetSpec:
    # The finest resolution's names are the same for any number of layers; the others' are not.
    unet = replace(file.model.unet, layers_per_block=file.count("unet.down_blocks.0.resnets.{}.norm1.weight"))
    file = replace(file, model=replace(file.model, unet=unet))
    levels = 1 + file.count("unet.down_blocks.{}.downsamplers.0.conv.weight")
    channels = tuple(file.size(f"unet.down_blocks.{level}.resnets.0.conv1.weight") for level in range(levels))
    block = "unet.{}.attentions.0.transformer_blocks"
    depths = [
        file.count(block.format(place) + ".{}.norm1.weight")
        for place in (*(f"down_blocks.{level}" for level in range(levels)), "mid_block")
    ]
    layers = tuple(max(depth, 1) for depth in (*depths[:-2], depths[-1]))
    heads = (8,) * levels if file.model.family is Family.SD1 else tuple(max(c // HEAD_WIDTH, 1) for c in channels)
    added = file.size("unet.add_embedding.linear_1.weight", axis=1) or None
    return replace(
        unet,
        block_out_channels=channels,
        has_attention=tuple(depth > 0 for depth in depths[:-1]),
        num_heads=heads,
        cross_attention_dim=file.size(f"{block.format('mid_block')}.0.attn2.to_k.weight", axis=1),
        use_linear_projection=len(file.shape("unet.mid_block.attentions.0.proj_in.weight") or ()) == 2,
        in_channels=file.size("unet.conv_in.weight", axis=1),
        out_channels=file.size("unet.conv_out.weight"),
        transformer_layers_per_block=layers if len(set(layers)) > 1 else layers[0],
        addition_embed_type="text_time" if added else None,
        projection_class_embeddings_input_dim=added,
    )


def infer_vae(file: StoredModel) -> VaeSpec:
    """The autoencoder of a file, which may be alone in it. Names begin with the format's prefix for this part."""
    levels = file.count("vae.encoder.down_blocks.{}.resnets.0.norm1.weight")
    return replace(
        file.model.vae,
        block_out_channels=tuple(
            file.size(f"vae.encoder.down_blocks.{level}.resnets.0.conv1.weight") for level in range(levels)
        ),
        layers_per_block=file.count("vae.encoder.down_blocks.0.resnets.{}.norm1.weight"),
        in_channels=file.size("vae.encoder.conv_in.weight", axis=1),
        latent_channels=file.size("vae.encoder.conv_out.weight") // 2,
    )


def _infer_text(file: StoredModel, part: str, published: ClipTextSpec) -> ClipTextSpec:
    tower = f"{part}.text_model"
    layers = file.count(tower + ".encoder.layers.{}.layer_norm1.weight")
    is_whole = file.model.family is Family.SD2 and file.form is Format.STABILITY
    projection = file.size(f"{part}.text_projection.weight") if part == "text_encoder_2" or is_whole else 0
    if is_whole and projection:
        # Of a whole tower SD 2 does not use the last layer.
        layers, projection = layers - 1, 0
    words, width = (file.size(f"{tower}.embeddings.token_embedding.weight", axis) for axis in (0, 1))
    return replace(
        published,
        transformer=replace(
            published.transformer,
            hidden_size=width,
            intermediate_size=file.size(f"{tower}.encoder.layers.0.mlp.fc1.weight"),
            num_hidden_layers=layers,
            num_attention_heads=max(width // HEAD_WIDTH, 1),
        ),
        vocab_size=words,
        max_position_embeddings=file.size(f"{tower}.embeddings.position_embedding.weight"),
        eos_token_id=words - 1,
        projection_dim=projection or None,
    )

"""What a file holds, told from the names and shapes of its tensors alone.

Shapes do not show the number of attention heads, the groups of the group norms or the size of the pictures; these are
the family's own.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from dreambooth_ms.errors import WeightError, count_of, show_names
from dreambooth_ms.formats.naming import TABLES
from dreambooth_ms.formats.naming.formats import VAE_PREFIX, Format, naming_of, spell
from dreambooth_ms.formats.naming.plan import Naming, Shape, unwrapped
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import PUBLISHED_MODELS, SD_15, SDXL_BASE, ClipTextSpec, Family, ModelSpec, UNetSpec

HEAD_WIDTH = 64
"""Channels of an attention head in every family but SD 1, whose UNet has 8 heads at every resolution."""

OTHER_METHODS: dict[str, str] = TABLES["other_methods"]
_CHANGES = {kind: re.compile(pattern) for kind, pattern in TABLES["change_marks"].items()}
EMBEDDING, CUSTOM_DIFFUSION = _CHANGES
_UPDATES = rf"\.(?:{'|'.join(name for name in TABLES['update_factors'] if name != 'alpha')})(?:\.|$)"
_OTHER_KINDS = dict(TABLES["other_kinds"])
_OTHER_KINDS["a LoRA"] = "|".join((_OTHER_KINDS["a LoRA"], _UPDATES, *OTHER_METHODS.values()))


@dataclass(frozen=True)
class Recognition:
    """A model in a file."""

    form: Format
    model: ModelSpec
    """A published one if all sizes agree, else with the sizes of the file."""
    naming: Naming
    prediction_type: str | None
    """"epsilon" or "v_prediction"; None if the names do not tell."""
    notes: tuple[str, ...]
    """What a user should know about it, one sentence each."""


def recognise_model(stored: Mapping[str, Shape], source: str) -> Recognition:
    """Format, family and sizes of a model, by names and shapes of a file's tensors; of a folder in diffusers' layout
    with the part and a dot before the names. WeightError if it is something else, named where it is known."""
    cleaned = {unwrapped(name): shape for name, shape in stored.items()}
    form = _form(cleaned)
    if form is None:
        raise WeightError(f"{source}: this is {other_kind(stored)}; expected a model of SD 1.x, SD 2.x or SDXL")
    model = infer_model(cleaned, form, _family(cleaned, form))
    naming = naming_of(form, model)
    is_open = model.family is Family.SD2 or "edm_mean" in cleaned
    # Fine-tuned models that predict velocity say so by a tensor that holds nothing.
    prediction_type = "v_prediction" if "v_pred" in cleaned else None if is_open else "epsilon"
    return Recognition(form, model, naming, prediction_type, tuple(_notes(cleaned, model, naming, prediction_type)))


def recognise_vae(stored: Mapping[str, Shape], source: str) -> Recognition:
    """Format, sizes and naming of an autoencoder that is alone in a file; the rest of the model is SD 1.5's.
    WeightError if it is something else."""
    names = [unwrapped(name) for name in stored]
    forms = matching(TABLES["vae_marks"], names)
    if not forms:
        raise WeightError(f"{source}: this is {other_kind(stored)}; expected an autoencoder (VAE) of Stable Diffusion")
    form = Format[forms[0]]
    prefix = "vae." if form is Format.DIFFUSERS else VAE_PREFIX
    shapes = {prefix + unwrapped(name): shape for name, shape in stored.items()}
    model = _with_vae(StoredModel(shapes, form, SD_15))
    naming = replace(naming_of(form, model), prefix=prefix)
    return Recognition(form, model, naming, None, ())


def other_kind(names: Iterable[str]) -> str:
    """What a file is, as far as its names tell: for a message to someone who expected another kind."""
    held = [unwrapped(name) for name in names]
    if _form(held):
        return "a whole model"
    if change := kind_of_change(held):
        return change
    if kinds := matching(_OTHER_KINDS, held):
        return kinds[0]
    return f"of an unknown kind (it holds {show_names(sorted(held)[:3]) or 'nothing'})"


def kind_of_change(names: Iterable[str]) -> str | None:
    """EMBEDDING, or CUSTOM_DIFFUSION with or without words; None for what holds anything else."""
    held = list(names)
    if len(held) == 1 and word_in(held[0], ""):
        return EMBEDDING
    found = {next((kind for kind, mark in _CHANGES.items() if mark.search(name)), None) for name in held}
    return None if None in found else next((kind for kind in (CUSTOM_DIFFUSION, EMBEDDING) if kind in found), None)


def word_in(name: str, file: str) -> str | None:
    """The word whose vectors a name stands for, in a file of this name; None if it stands for anything else."""
    own = unwrapped(name)
    match = _CHANGES[EMBEDDING].search(own)
    return (match["word"] or file) if match else None if "." in own else own


def matching(patterns: Mapping[str, str], names: Collection[str]) -> list[str]:
    """The keys of those patterns that any of the names fits."""
    return [kind for kind, pattern in patterns.items() if any(map(re.compile(pattern).search, names))]


def _form(names: Collection[str]) -> Format | None:
    first = (*matching(TABLES["model_marks"], names), "OTHER")[0]
    return None if first == "OTHER" else Format[first]


def _family(stored: Mapping[str, Shape], form: Format) -> Family:
    """SDXL adds pooled text to the time; SD 1 and SD 2 differ in the projections of their transformers."""
    file = StoredModel(stored, form, SDXL_BASE)
    added = file.shape("unet.add_embedding.linear_1.weight")
    if added is None:
        return Family.SD2 if len(file.shape("unet.mid_block.attentions.0.proj_in.weight") or ()) == 2 else Family.SD1
    found = matching(TABLES["sdxl_marks"], stored)
    return Family[found[0]] if found else Family.SDXL_REFINER if added[1:] == (2560,) else Family.SDXL


def _notes(stored: Mapping[str, Shape], model: ModelSpec, naming: Naming, prediction_type: str | None) -> Iterator[str]:
    if model.family is Family.SD2 and prediction_type is None:
        yield "Names do not tell whether an SD 2.x model predicts noise (512 px) or velocity (768 px)."
    if "edm_mean" in stored:
        yield "Playground v2.5: its latents have a mean and deviation of their own, in the same file."
    if use := TABLES["special_inputs"].get(model.unet.in_channels):
        yield f"Its UNet takes {model.unet.in_channels} channels: a model for {use}."
    if averages := {slot.name for slot in naming.averages.values()} & stored.keys():
        yield f"Moving averages (EMA) of {count_of(len(averages), 'weight')} are there besides the weights."
    if with_channels(model, 4, 4) not in PUBLISHED_MODELS:
        yield "Its sizes are not those of a published model; heads and norm groups are assumed."


@dataclass(frozen=True)
class StoredModel:
    """The shapes of a file, asked for by public name."""

    stored: Mapping[str, Shape]
    form: Format
    model: ModelSpec
    """A model with the same names as far as they are asked for."""

    def shape(self, name: str) -> Shape | None:
        """The public shape of a parameter, or None if the file does not hold it."""
        slots = (slot for slot in spell(self.form, name, self.model) if slot.name in self.stored)
        return next((slot.public_shape(self.stored[slot.name]) for slot in slots), None)

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
    if file.shape("vae.encoder.conv_in.weight"):
        model = _with_vae(file)
    for part in ("text_encoder", "text_encoder_2"):
        tower = getattr(model, part)
        if tower and file.shape(f"{part}.text_model.embeddings.token_embedding.weight"):
            inferred: dict[str, Any] = {part: _infer_text(file, part, tower)}
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
    places = [*map("down_blocks.{}".format, range(levels)), "mid_block"]
    depths = [file.count(block.format(place) + ".{}.norm1.weight") for place in places]
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


def _with_vae(file: StoredModel) -> ModelSpec:
    """The model with the autoencoder of a file, which may be alone in it: its names begin with the format's prefix."""
    levels = range(file.count("vae.encoder.down_blocks.{}.resnets.0.norm1.weight"))
    vae = replace(
        file.model.vae,
        block_out_channels=tuple(file.size(f"vae.encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in levels),
        layers_per_block=file.count("vae.encoder.down_blocks.0.resnets.{}.norm1.weight"),
        in_channels=file.size("vae.encoder.conv_in.weight", axis=1),
        latent_channels=file.size("vae.encoder.conv_out.weight") // 2,
    )
    return replace(file.model, vae=vae)


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
        # What follows it in a longer table are new words.
        eos_token_id=min(words, published.vocab_size) - 1,
        projection_dim=projection or None,
    )

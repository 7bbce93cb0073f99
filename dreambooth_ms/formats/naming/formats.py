"""The naming of a model in a format: diffusers' folders, Stability's single files, mindone's MindSpore checkpoints.

Stability's names are LDM's in Stable Diffusion 1 and 2, and SGM's in SDXL. LDM counts the UNet's blocks through all
resolutions: `input_blocks.<n>` holds one residual block (0) and its transformer (1), or a downsampler (0.op);
`output_blocks.<n>` likewise, with the upsampler as the last of its block. The decoder of the autoencoder counts
resolutions from the finest, diffusers from the coarsest.

mindone's SDXL example keeps Stability's names and only calls parameters as MindSpore's layers do: `gamma` and `beta` in
a norm, `embedding_table` in an embedding. Its SD 1 and SD 2 examples wrap the UNet's convolutions in a cell, name the
layers of a residual block, and have a text tower of their own for both versions.
"""

import math
import re
from dataclasses import replace
from enum import Enum
from functools import lru_cache

from dreambooth_ms.formats.naming import TABLES
from dreambooth_ms.formats.naming.plan import Layout, Naming, Shape, Slot
from dreambooth_ms.models.parameter_shapes import model_shapes, text_shapes
from dreambooth_ms.models.specs import Family, ModelSpec, UNetSpec, VaeSpec, at_level


class Format(Enum):
    """How the parameters of a whole model are named."""

    DIFFUSERS = "diffusers"
    """A folder with a file per part; a name here is the part, a dot, and the name in the part's file."""
    STABILITY = "stability"
    """One file, in LDM naming for SD 1 and 2 and in SGM naming for SDXL."""
    MINDONE = "mindone"
    """One MindSpore checkpoint, as mindone's examples for SD 1, SD 2 and SDXL write it."""


# What CLIP's training caps the temperature at (Radford et al., 2021, section 2.5). No network here reads it.
LOGIT_SCALE = math.log(100)

VAE_PREFIX = "first_stage_model."
_OPENCLIP = ".model."
"""What the places of OpenCLIP's text encoders end in."""

_NAMES = TABLES["stability"]
_IN_A_BLOCK = re.compile(
    r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_IN_A_TOWER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(?:self_attn\.([qkv])_proj|(.+))\.(weight|bias)")


@lru_cache(maxsize=16)
def naming_of(form: Format, model: ModelSpec) -> Naming:
    """The naming of a model, as a whole, in a format."""
    shapes = model_shapes(model)
    extra = {name: shape for name, shape in _unused_shapes(form, model).items() if name not in shapes}
    places = {name: spell(form, name, model) for name in shapes | extra}
    constants = [name for name in extra if name.endswith("logit_scale") and model.family is not Family.SD2]
    return Naming(
        shapes=shapes | extra,
        places=places,
        averages=_averages(form, places),
        optional=frozenset(extra),
        constants=dict.fromkeys(constants, LOGIT_SCALE),
    )


def spell(form: Format, name: str, model: ModelSpec) -> list[Slot]:
    """Where a format keeps a public parameter: first the place it is written to, then others that readers meet. Empty
    if the format has no place for it."""
    if form is Format.DIFFUSERS or model.family.name not in TABLES["towers"]:
        # Others are kept in folders alone.
        return _diffusers_slots(name) if form is Format.DIFFUSERS else []
    if form is Format.STABILITY:
        return _stability_slots(name, model)
    is_sd = model.family in (Family.SD1, Family.SD2)
    if is_sd and name.startswith("text_encoder."):
        return _mindone_text_slots(name)
    slots = [_with_mindone_parameter(name, slot) for slot in _stability_slots(name, model)]
    return [_mindone_sd_slot(name, slot) for slot in slots] if is_sd else slots


def _diffusers_slots(name: str) -> list[Slot]:
    part, _, inner = name.partition(".")
    slots = [Slot(name)]
    if match := re.fullmatch(r"(vae\..+\.attentions\.0)\.(to_[qkv]|to_out\.0)\.(\w+)", name):
        slots.append(Slot(f"{match[1]}.{TABLES['old_vae'][match[2]]}.{match[3]}"))
    if inner.startswith("text_model."):
        # transformers 5.6 gave up this level of CLIPTextModel.
        slots.append(Slot(f"{part}.{inner.removeprefix('text_model.')}"))
    return slots


def _stability_slots(name: str, model: ModelSpec) -> list[Slot]:
    part, _, inner = name.partition(".")
    layer, _, parameter = inner.rpartition(".")
    if part == "unet":
        return [Slot(f"model.diffusion_model.{unet_layer(layer, model.unet)}.{parameter}")]
    if part == "vae":
        # LDM's attention over pixels is made of 1x1 convolutions.
        is_matrix = ".attentions." in layer and not layer.endswith("group_norm") and parameter == "weight"
        layout = Layout.CONVOLUTION if is_matrix else Layout.AS_IS
        return [Slot(f"{VAE_PREFIX}{_vae_layer(layer, model.vae)}.{parameter}", layout)]
    prefix = TABLES["towers"][model.family.name][part]
    if prefix.endswith(_OPENCLIP):
        slot = _openclip_slot(inner)
        return [replace(slot, name=prefix + slot.name)]
    # Some old files lack this level of the text tower.
    return [Slot(prefix + inner), Slot(prefix + inner.removeprefix("text_model."))]


def _averages(form: Format, places: dict[str, list[Slot]]) -> dict[str, Slot]:
    """LDM keeps them under flattened names without dots; mindone under a prefix. Only the UNet has them."""
    if form is Format.DIFFUSERS:
        return {}
    names = {name: slots[0].name for name, slots in places.items() if name.startswith("unet.")}
    if form is Format.MINDONE:
        return {name: Slot(f"ema.{stored}") for name, stored in names.items()}
    return {name: Slot(f"model_ema.{stored.removeprefix('model.').replace('.', '')}") for name, stored in names.items()}


def _unused_shapes(form: Format, model: ModelSpec) -> dict[str, Shape]:
    """What OpenCLIP's towers hold besides: a temperature, and in SD 2 the last layer and a projection, all unused. SD 2
    reads the text before the last layer, so the public text encoder ends there, as mindone's does."""
    shapes: dict[str, Shape] = {}
    if form is Format.DIFFUSERS or (form is Format.MINDONE and model.family is Family.SD2):
        return shapes
    for part, prefix in TABLES["towers"].get(model.family.name, {}).items():
        tower = getattr(model, part)
        if tower and prefix.endswith(_OPENCLIP):
            shapes[f"{part}.logit_scale"] = ()
            if model.family is Family.SD2:
                layers, width = tower.transformer.num_hidden_layers, tower.transformer.hidden_size
                longer = replace(tower.transformer, num_hidden_layers=layers + 1)
                whole = text_shapes(replace(tower, transformer=longer, projection_dim=width))
                shapes |= {f"{part}.{name}": shape for name, shape in whole.items()}
    return shapes


def unet_layer(layer: str, spec: UNetSpec) -> str:
    """The name of a layer of diffusers' UNet, such as "down_blocks.0.resnets.0.norm1", within LDM's."""
    match = _IN_A_BLOCK.fullmatch(layer)
    if not match:
        return _NAMES["unet"][layer]
    way, level, kind, index, rest = match.groups()
    if kind == "resnets":
        rest = _NAMES["unet_resnets"][rest]
    if way == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    # A way up has one residual block more in each resolution; on the way down the downsampler fills its place.
    last = at_level(spec.layers_per_block, 0)
    number = int(level) * (last + 1) + (last if kind.endswith("samplers") else int(index))
    if kind == "downsamplers":
        return f"input_blocks.{1 + number}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{number}.{2 if spec.has_attention[-1 - int(level)] else 1}.conv"
    block = f"input_blocks.{1 + number}" if way == "down" else f"output_blocks.{number}"
    return f"{block}.{1 if kind == 'attentions' else 0}.{rest}"


def _vae_layer(layer: str, spec: VaeSpec) -> str:
    side, _, inner = layer.partition(".")
    match = _IN_A_BLOCK.fullmatch(inner)
    if not match:
        return f"{side}.{_NAMES['vae'].get(inner, inner)}".rstrip(".")
    way, level, kind, index, rest = match.groups()
    if way == "mid":
        place = "mid.attn_1" if kind == "attentions" else f"mid.block_{int(index) + 1}"
    else:
        counted = int(level) if way == "down" else len(spec.block_out_channels) - 1 - int(level)
        place = f"{way}.{counted}." + (f"block.{index}" if kind == "resnets" else f"{way}sample")
    return f"{side}.{place}.{_NAMES['vae'].get(rest, rest)}"


def _openclip_slot(name: str) -> Slot:
    """The place of a parameter of transformers' text tower in OpenCLIP's, whose q, k and v are one matrix."""
    if name == "text_projection.weight":
        return Slot("text_projection", Layout.TRANSPOSED)
    match = _IN_A_TOWER.fullmatch(name)
    if not match:
        return Slot(_NAMES["openclip"][name])
    index, letter, layer, parameter = match.groups()
    path = f"transformer.resblocks.{index}"
    if letter:
        return Slot(f"{path}.attn.in_proj_{parameter}", block="qkv".index(letter), blocks=3)
    return Slot(f"{path}.{_NAMES['openclip_layers'][layer]}.{parameter}")


def _with_mindone_parameter(name: str, slot: Slot) -> Slot:
    """The place of a parameter with the name that it has in MindSpore's layers."""
    layer, parameter = name.split(".")[-2:]
    names: dict[str, str] = next((names for kind, names in TABLES["mindone"].items() if kind in layer), {})
    return replace(slot, name=re.sub(rf"(?<=\.){parameter}$", names.get(parameter, parameter), slot.name))


def _mindone_sd_slot(name: str, slot: Slot) -> Slot:
    """The place of a parameter of UNet or autoencoder in a checkpoint for SD 1 or SD 2."""
    path, _, parameter = slot.name.rpartition(".")
    path = re.sub(r"((?:in|out)_layers)\.0$", r"\1_norm", path)
    path = re.sub(r"((?:in|out)_layers)\.[23]$", r"\1_conv", path)
    layer = name.split(".")[-2]
    is_wrapped = name.startswith("unet.") and layer.startswith("conv") and "norm" not in layer
    return replace(slot, name=f"{path}{'.conv' if is_wrapped else ''}.{parameter}")


def _mindone_text_slots(name: str) -> list[Slot]:
    """The place of a parameter of the text tower in a checkpoint for SD 1 or SD 2, if it has one."""
    prefix, inner = "cond_stage_model.transformer.", name.partition(".")[2]
    if inner == "text_model.embeddings.token_embedding.weight":
        return [Slot(f"{prefix}embedding_table")]
    slot = _openclip_slot(inner)
    if slot.name in ("text_projection", "logit_scale"):
        return []
    slot = _with_mindone_parameter(name, slot)
    path = slot.name.replace("transformer.", "transformer_layer.").replace("in_proj_", "in_proj.")
    return [replace(slot, name=prefix + path.replace(".mlp.", ".").replace(".attn.", ".attn.attn."))]

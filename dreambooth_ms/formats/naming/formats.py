"""The naming of a model in a format."""

import math
import re
from dataclasses import replace
from enum import Enum
from functools import lru_cache

from dreambooth_ms.formats.naming import mindone, stability
from dreambooth_ms.formats.naming.plan import Naming
from dreambooth_ms.formats.naming.slots import Shape, Slot
from dreambooth_ms.formats.naming.tables import TABLES
from dreambooth_ms.models.parameter_shapes import clip_text_shapes, model_shapes
from dreambooth_ms.models.specs import Family, ModelSpec


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

_OPENCLIP = ".model."
"""What the places of OpenCLIP's text encoders end in."""


@lru_cache(maxsize=16)
def naming_of(form: Format, model: ModelSpec) -> Naming:
    """The naming of a model, as a whole, in a format."""
    shapes = model_shapes(model)
    extra = {name: shape for name, shape in _unused_shapes(form, model).items() if name not in shapes}
    everything = shapes | extra
    places = {name: spell(form, name, model) for name in everything}
    return Naming(
        shapes=everything,
        places=places,
        averages=_averages(form, places),
        optional=frozenset(extra),
        constants={
            name: LOGIT_SCALE for name in extra if name.endswith("logit_scale") and model.family is not Family.SD2
        },
    )


def spell(form: Format, name: str, model: ModelSpec) -> list[Slot]:
    """Where a format keeps a public parameter: first the place it is written to, then others that readers meet.

    Empty if the format has no place for it.
    """
    if form is Format.DIFFUSERS:
        return _diffusers_slots(name)
    if form is Format.STABILITY:
        return _stability_slots(name, model)
    is_sd = model.family in (Family.SD1, Family.SD2)
    if is_sd and name.startswith("text_encoder."):
        slot = mindone.sd_text_slot(name)
        return [slot] if slot else []
    change = mindone.sd_slot if is_sd else mindone.sdxl_slot
    return [change(name, slot) for slot in _stability_slots(name, model)]


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
    if part == "unet":
        return [stability.unet_slot(inner, model.unet)]
    if part == "vae":
        return [stability.vae_slot(inner, model.vae)]
    prefix = TABLES["towers"][model.family.name][part]
    if prefix.endswith(_OPENCLIP):
        slot = stability.openclip_slot(inner)
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
    """What OpenCLIP's towers hold besides: a temperature, and in SD 2 the last layer and a projection, all unused.

    SD 2 reads the text before the last layer, so the public text encoder ends there, as mindone's does.
    """
    shapes: dict[str, Shape] = {}
    if form is Format.DIFFUSERS or (form is Format.MINDONE and model.family is Family.SD2):
        return shapes
    for part, prefix in TABLES["towers"][model.family.name].items():
        tower = getattr(model, part)
        if tower and prefix.endswith(_OPENCLIP):
            shapes[f"{part}.logit_scale"] = ()
            if model.family is Family.SD2:
                layers, width = tower.transformer.num_hidden_layers, tower.transformer.hidden_size
                longer = replace(tower.transformer, num_hidden_layers=layers + 1)
                whole = clip_text_shapes(replace(tower, transformer=longer, projection_dim=width))
                shapes |= {f"{part}.{name}": shape for name, shape in whole.items()}
    return shapes

"""How each format names the factors of a LoRA.

The update of a layer's weight W (O, I) is alpha / r * B A with A (r, I) and B (O, r) (Hu et al., 2021, section 4.1);
for a convolution A is (r, I, K, K) and B (O, r, 1, 1). The public names are the layer's with `.lora_A.weight`,
`.lora_B.weight` and `.alpha`, behind the part and a dot.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import Enum
from functools import lru_cache

from dreambooth_ms.formats.naming.formats import Format, spell
from dreambooth_ms.formats.naming.plan import unwrapped
from dreambooth_ms.formats.naming.slots import Shape, Slot
from dreambooth_ms.formats.naming.stability import unet_layer
from dreambooth_ms.formats.naming.tables import TABLES
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import Family, ModelSpec


class LoraFormat(Enum):
    """Formats of a LoRA: what is written. All of them are read alike."""

    DIFFUSERS = "diffusers"
    """`unet.<layer>.lora.down.weight`, `text_encoder.<layer>.lora_linear_layer.down.weight`."""
    DIFFUSERS_PEFT = "diffusers with peft's names"
    """`unet.<layer>.lora_A.weight`."""
    DIFFUSERS_PROCESSORS = "diffusers before 0.22"
    """`unet.<attention>.processor.to_q_lora.down.weight`: only attention has a place."""
    PEFT = "peft"
    """`base_model.model.<layer>.lora_A.weight`: one part per folder, and its name is not in the file."""
    KOHYA = "kohya"
    """`lora_unet_<layer, underscores for dots>.lora_down.weight`, in SGM's layer names for SDXL, with alphas."""
    KOHYA_DIFFUSERS = "kohya with diffusers' layers"
    """The same, in diffusers' layer names for SDXL too."""
    MINDONE = "mindone"
    """The layer's name in mindone's checkpoint and `.lora_A.weight` (SDXL) or `.lora_down.weight` (SD 1 and SD 2)."""


FACTORS = DOWN, UP, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The networks that can be adapted, by the names of their folders, in the order of files."""

_DOTTED, _UNDERSCORED = TABLES["lora_dotted"], TABLES["lora_underscored"]
# How names of factors end: in the words of peft, kohya, diffusers or its attention processors; with a number, or the
# name of the adapter that peft puts in while a model is loaded.
_FACTOR = re.compile(
    r"(?:\.lora(?:_linear_layer)?[._]|_lora\.)(?:(?P<down>A|down)|B|up)(?:_\d+)?(?:(?:\.[^.]+)?\.weight)?$"
)
_PROCESSORS = (re.compile(r"(?<=\.to_out)\.0$"), ""), (re.compile(r"(?<=\.self_attn\.)(\w+)_proj$"), r"to_\1")
"""What diffusers' attention processors called the layers of attention."""


def lora_layers(model: ModelSpec, parts: tuple[str, ...] | None = None) -> dict[str, Shape]:
    """Every layer that can be adapted, by its part, a dot and its name, with the shape of its weight.

    Only of some parts, or of all that LoRAs are made for, which the autoencoder is not.
    """
    wanted = PARTS if parts is None else parts
    return {
        name.removesuffix(".weight"): shape
        for name, shape in model_shapes(model).items()
        if name.endswith(".weight")
        and not name.endswith("_embedding.weight")
        and len(shape) > 1
        and name.partition(".")[0] in wanted
    }


def factor_shapes(weight: Shape, rank: int) -> tuple[Shape, Shape]:
    """The shapes of A and B for a layer's weight."""
    return (rank, *weight[1:]), (weight[0], rank, *(1 for _ in weight[2:]))


def lora_slots(form: LoraFormat, layers: Iterable[str], model: ModelSpec) -> dict[str, Slot]:
    """Where a format keeps the factors of some layers of a model; what it has no place for is left out."""
    return {f"{layer}.{factor}": slot for layer in layers for factor, slot in _slots(form, layer, model).items()}


def split_name(name: str) -> tuple[str, str]:
    """A name in a file -> what it calls the layer, and which factor it is; the name itself and "" if it is none."""
    plain = unwrapped(name).replace(".processor.", ".").replace("_orig_mod_", "")
    if match := _FACTOR.search(plain):
        return plain[: match.start()], DOWN if match["down"] else UP
    path, dot, last = plain.rpartition(".")
    return (path, ALPHA) if dot and last == ALPHA else (plain, "")


@lru_cache(maxsize=16)
def layers_by_path(model: ModelSpec, parts: tuple[str, ...] | None = None) -> Mapping[str, tuple[str, ...]]:
    """What layers are called in files, whoever wrote them -> the layers.

    Where it is several, they are one layer there: A is common to them, and B has a block of rows for each. Of one part
    alone, names may leave out which it is, as peft's do.
    """
    bare = ("",) if parts is not None and len(parts) == 1 else ()
    found, joined = dict[str, tuple[str, ...]](), dict[str, dict[int, str]]()
    for layer in lora_layers(model, parts):
        found |= dict.fromkeys(_paths(layer, model, bare), (layer,))
        for slot in spell(Format.MINDONE, f"{layer}.weight", model):
            if slot.name.endswith(".weight"):
                joined.setdefault(slot.name.removesuffix(".weight"), {})[slot.block] = layer
    return found | {path: tuple(blocks[number] for number in sorted(blocks)) for path, blocks in joined.items()}


def _paths(layer: str, model: ModelSpec, bare: tuple[str, ...]) -> set[str]:
    part, _, inner = layer.partition(".")
    weights = (slot.name for slot in spell(Format.DIFFUSERS, f"{layer}.weight", model))
    names = {weight.removeprefix(f"{part}.").removesuffix(".weight") for weight in weights}
    if part == "unet":
        names.add(unet_layer(inner, model.unet))
    names |= {pattern.sub(other, name) for pattern, other in _PROCESSORS for name in names}
    dotted = {prefix + name for prefix in (*_DOTTED[part], *bare) for name in names}
    return dotted | {prefix + name.replace(".", "_") for prefix in _UNDERSCORED[part] for name in names}


def _slots(form: LoraFormat, layer: str, model: ModelSpec) -> dict[str, Slot]:
    """Where a format keeps the factors of a layer; empty where it has no place for it."""
    part, _, inner = layer.partition(".")
    match form:
        case LoraFormat.DIFFUSERS_PEFT:
            return _pair(layer, DOWN, UP)
        case LoraFormat.PEFT:
            return _pair(f"base_model.model.{inner}", DOWN, UP)
        case LoraFormat.DIFFUSERS_PROCESSORS if part == "unet":
            found = re.fullmatch(r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?", layer)
            return _pair(f"{found[1]}.processor.to_{found[2]}_lora", "down.weight", "up.weight") if found else {}
        case LoraFormat.DIFFUSERS | LoraFormat.DIFFUSERS_PROCESSORS:
            return _pair(f"{layer}.{'lora' if part == 'unet' else 'lora_linear_layer'}", "down.weight", "up.weight")
        case LoraFormat.MINDONE:
            # Of SDXL's second text encoder only the output projections have a place: q, k and v are one parameter
            # there. In SD 1 and SD 2 they are one layer, so A is common to the three and B has a block for each.
            place = next(iter(spell(Format.MINDONE, f"{layer}.weight", model)), Slot(""))
            if not place.name.endswith(".weight"):
                return {}
            ends = () if model.family in (Family.SD1, Family.SD2) else (DOWN, UP)
            slots = _pair(place.name.removesuffix(".weight"), *ends)
            return {**slots, UP: replace(place, name=slots[UP].name)}
    is_stability = form is LoraFormat.KOHYA and part == "unet" and model.unet.addition_embed_type
    prefix = "lora_te_" if part == "text_encoder" and not model.text_encoder_2 else _UNDERSCORED[part][0]
    path = prefix + (unet_layer(inner, model.unet) if is_stability else inner).replace(".", "_")
    return {**_pair(path), ALPHA: Slot(f"{path}.{ALPHA}")}


def _pair(path: str, down: str = "lora_down.weight", up: str = "lora_up.weight") -> dict[str, Slot]:
    return {DOWN: Slot(f"{path}.{down}"), UP: Slot(f"{path}.{up}")}

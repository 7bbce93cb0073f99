"""How each format names the factors of a LoRA.

The update of a layer's weight W (O, I) is alpha / r * B A with A (r, I) and B (O, r) (Hu et al., 2021, section 4.1);
for a convolution A is (r, I, K, K) and B (O, r, 1, 1). The public names are the layer's with `.lora_A.weight`,
`.lora_B.weight` and `.alpha`, behind the part and a dot.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import Enum
from functools import lru_cache

from dreambooth_ms.formats.naming import mindone
from dreambooth_ms.formats.naming.formats import Format, spell
from dreambooth_ms.formats.naming.plan import unwrapped
from dreambooth_ms.formats.naming.slots import Shape, Slot
from dreambooth_ms.formats.naming.stability import UNET_PREFIX, unet_slot
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


DOWN, UP, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"

# How names of layers begin in files: with dots, or with underscores for dots as kohya and LyCORIS write them.
# OneTrainer says clip_l, ComfyUI diffusion_model and text_encoders; kohya says te where there is one encoder and te1
# where there are two, and diffusers te1 for both.
_DOTTED = {
    "unet": ("unet.", "diffusion_model.", "model.diffusion_model.", ""),
    "text_encoder": (
        *("text_encoder.", "clip_l.", "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
        "cond_stage_model.transformer.",
    ),
    "text_encoder_2": ("text_encoder_2.", "clip_g.", "text_encoders.clip_g.transformer."),
}
_UNDERSCORED = {
    "unet": ("lora_unet_", "lycoris_unet_", "lycoris_"),
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
}
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
    wanted = ("unet", "text_encoder", "text_encoder_2") if parts is None else parts
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
    slots: Slots = {}
    for layer in layers:
        part, _, inner = layer.partition(".")
        slots |= {f"{layer}.{factor}": slot for factor, slot in _RULES[form](part, inner, model).items()}
    return slots


def split_name(name: str) -> tuple[str, str]:
    """A name in a file -> what it calls the layer, and which factor it is; the name itself and "" if it is none."""
    plain = mindone.clean(unwrapped(name)).replace(".processor.", ".").replace("_orig_mod_", "")
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
    names = {slot.name.removeprefix(f"{part}.") for slot in spell(Format.DIFFUSERS, f"{layer}.weight", model)}
    if part == "unet":
        names.add(unet_slot(f"{inner}.weight", model.unet).name.removeprefix(UNET_PREFIX))
    names = {name.removesuffix(".weight") for name in names}
    names |= {pattern.sub(other, name) for pattern, other in _PROCESSORS for name in names}
    dotted = {prefix + name for prefix in (*_DOTTED[part], *bare) for name in names}
    return dotted | {prefix + name.replace(".", "_") for prefix in _UNDERSCORED[part] for name in names}


Slots = dict[str, Slot]
"""By factor; empty where there is no place for the layer."""
Rule = Callable[[str, str, ModelSpec], Slots]
"""From part, layer and model to the places of the factors."""


def _pair(path: str, down: str = "down.weight", up: str = "up.weight") -> Slots:
    return {DOWN: Slot(f"{path}.{down}"), UP: Slot(f"{path}.{up}")}


def _diffusers(part: str, layer: str, model: ModelSpec) -> Slots:
    return _pair(f"{part}.{layer}.{'lora' if part == 'unet' else 'lora_linear_layer'}")


def _diffusers_processors(part: str, layer: str, model: ModelSpec) -> Slots:
    if part != "unet":
        return _diffusers(part, layer, model)
    match = re.fullmatch(r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?", layer)
    return _pair(f"unet.{match[1]}.processor.to_{match[2]}_lora") if match else {}


def _kohya(part: str, layer: str, model: ModelSpec) -> Slots:
    if part == "unet" and model.unet.addition_embed_type:
        layer = unet_slot(f"{layer}.weight", model.unet).name.removeprefix(UNET_PREFIX).removesuffix(".weight")
    return _kohya_diffusers(part, layer, model)


def _kohya_diffusers(part: str, layer: str, model: ModelSpec) -> Slots:
    prefix = "lora_te_" if part == "text_encoder" and not model.text_encoder_2 else _UNDERSCORED[part][0]
    path = prefix + layer.replace(".", "_")
    return {**_pair(path, "lora_down.weight", "lora_up.weight"), ALPHA: Slot(f"{path}.{ALPHA}")}


def _mindone(part: str, layer: str, model: ModelSpec) -> Slots:
    """Of SDXL's second text encoder only the output projections have a place: q, k and v are one parameter there.

    In SD 1 and SD 2 they are one layer, so A is common to the three and B has a block of rows for each.
    """
    places = spell(Format.MINDONE, f"{part}.{layer}.weight", model)
    if not places or not places[0].name.endswith(".weight"):
        return {}
    path, is_sd = places[0].name.removesuffix(".weight"), model.family in (Family.SD1, Family.SD2)
    slots = _pair(path, "lora_down.weight", "lora_up.weight") if is_sd else _pair(path, DOWN, UP)
    return {**slots, UP: replace(slots[UP], block=places[0].block, blocks=places[0].blocks)}


_RULES: dict[LoraFormat, Rule] = {
    LoraFormat.DIFFUSERS: _diffusers,
    LoraFormat.DIFFUSERS_PEFT: lambda part, layer, model: _pair(f"{part}.{layer}", DOWN, UP),
    LoraFormat.DIFFUSERS_PROCESSORS: _diffusers_processors,
    LoraFormat.PEFT: lambda part, layer, model: _pair(f"base_model.model.{layer}", DOWN, UP),
    LoraFormat.KOHYA: _kohya,
    LoraFormat.KOHYA_DIFFUSERS: _kohya_diffusers,
    LoraFormat.MINDONE: _mindone,
}

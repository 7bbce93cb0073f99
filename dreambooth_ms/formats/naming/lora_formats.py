"""How each format names the factors of a LoRA.

The update of a layer's weight W (O, I) is alpha / r * B A with A (r, I) and B (O, r) (Hu et al., 2021, section 4.1);
for a convolution A is (r, I, K, K) and B (O, r, 1, 1). The public names are the layer's with `.lora_A.weight`,
`.lora_B.weight` and `.alpha`, behind the part and a dot.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from functools import lru_cache

from dreambooth_ms.formats.naming import mindone
from dreambooth_ms.formats.naming.formats import Format, spell
from dreambooth_ms.formats.naming.plan import Naming
from dreambooth_ms.formats.naming.slots import Shape, Slot
from dreambooth_ms.formats.naming.stability import UNET_PREFIX
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import Family, ModelSpec


class LoraFormat(Enum):
    """Formats of a LoRA. Those of one library are read alike, and differ in what is written."""

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

_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
# The name of the adapter that peft puts in while a model is loaded, and the level that diffusers' attention once had.
_INSERTIONS = re.compile(r"(?<=\.lora_[AB])\.[^.]+(?=\.weight$)|\.processor(?=\.)")


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


@lru_cache(maxsize=32)
def lora_naming(form: LoraFormat, model: ModelSpec, parts: tuple[str, ...] | None = None) -> Naming:
    """The naming of every factor that a LoRA for a model, or for some of its parts, can have, for reading.

    PEFT's names fit several parts, so there it must be one.
    """
    layers, shapes = lora_layers(model, parts), dict[str, Shape]()
    for layer, weight in layers.items():
        down, up = factor_shapes(weight, rank=1)
        shapes |= {f"{layer}.{DOWN}": down, f"{layer}.{UP}": up, f"{layer}.{ALPHA}": ()}
    own, others = next((formats, others) for formats, others in _LIBRARIES if form in formats)
    rules = (*(rule for sibling, rule in own.items() if sibling is not form), *others)
    return Naming(
        shapes=shapes,
        slots=_slots(own[form], layers, model),
        spellings=tuple(_slots(rule, layers, model) for rule in rules),
        optional=frozenset(shapes),
        clean=mindone.clean if form is LoraFormat.MINDONE else lambda name: _INSERTIONS.sub("", name),
    )


def lora_slots(form: LoraFormat, layers: Iterable[str], model: ModelSpec) -> dict[str, Slot]:
    """Where a format keeps the factors of some layers of a model; what it has no place for is left out."""
    return _slots(next(formats[form] for formats, _ in _LIBRARIES if form in formats), layers, model)


Slots = dict[str, Slot]
"""By factor; empty where there is no place for the layer."""
Rule = Callable[[str, str, ModelSpec], Slots]
"""From part, layer and model to the places of the factors."""


def _slots(rule: Rule, layers: Iterable[str], model: ModelSpec) -> Slots:
    slots: Slots = {}
    for layer in layers:
        part, _, inner = layer.partition(".")
        slots |= {f"{layer}.{factor}": slot for factor, slot in rule(part, inner, model).items()}
    return slots


def _pair(path: str, down: str = "down.weight", up: str = "up.weight") -> Slots:
    return {DOWN: Slot(f"{path}.{down}"), UP: Slot(f"{path}.{up}")}


def _diffusers(part: str, layer: str, model: ModelSpec) -> Slots:
    return _pair(f"{part}.{layer}.{'lora' if part == 'unet' else 'lora_linear_layer'}")


def _diffusers_processors(part: str, layer: str, model: ModelSpec) -> Slots:
    if part != "unet":
        return _diffusers(part, layer, model)
    match = re.fullmatch(r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?", layer)
    return _pair(f"unet.{match[1]}.processor.to_{match[2]}_lora") if match else {}


def _diffusers_text_attention(part: str, layer: str, model: ModelSpec) -> Slots:
    match = re.fullmatch(r"(.+\.self_attn)\.(q|k|v|out)_proj", layer)
    return _pair(f"{part}.{match[1]}.to_{match[2]}_lora") if match else {}


def _without_part(rule: Rule) -> Rule:
    """Files of the UNet's attention processors alone begin without the part."""

    def shorter(part: str, layer: str, model: ModelSpec) -> Slots:
        slots = rule(part, layer, model) if part == "unet" else {}
        return {factor: Slot(slot.name.removeprefix("unet.")) for factor, slot in slots.items()}

    return shorter


def _kohya(part: str, layer: str, model: ModelSpec) -> Slots:
    if part == "unet" and model.unet.addition_embed_type:
        stored = spell(Format.STABILITY, f"unet.{layer}.weight", model)[0].name
        layer = stored.removeprefix(UNET_PREFIX).removesuffix(".weight")
    return _kohya_diffusers(part, layer, model)


def _kohya_diffusers(part: str, layer: str, model: ModelSpec) -> Slots:
    prefix = "lora_te_" if part == "text_encoder" and not model.text_encoder_2 else _KOHYA_PREFIXES[part]
    path = prefix + layer.replace(".", "_")
    return {**_pair(path, "lora_down.weight", "lora_up.weight"), ALPHA: Slot(f"{path}.{ALPHA}")}


def _kohya_other_encoder(part: str, layer: str, model: ModelSpec) -> Slots:
    """kohya says "te" where there is one encoder and "te1" where there are two; diffusers writes "te1" for both."""
    said, other = ("lora_te1_", "lora_te_") if model.text_encoder_2 else ("lora_te_", "lora_te1_")
    slots = _kohya(part, layer, model) if part == "text_encoder" else {}
    return {factor: Slot(other + slot.name.removeprefix(said)) for factor, slot in slots.items()}


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


_LIBRARIES: tuple[tuple[dict[LoraFormat, Rule], tuple[Rule, ...]], ...] = (
    (
        {
            LoraFormat.DIFFUSERS: _diffusers,
            LoraFormat.DIFFUSERS_PEFT: lambda part, layer, model: _pair(f"{part}.{layer}", DOWN, UP),
            LoraFormat.DIFFUSERS_PROCESSORS: _diffusers_processors,
        },
        (
            lambda part, layer, model: {ALPHA: Slot(f"{part}.{layer}.{ALPHA}")},
            _diffusers_text_attention,
            lambda part, layer, model: _pair(f"{part}.{layer}.lora"),
            *(_without_part(_diffusers_processors), _without_part(_diffusers)),
        ),
    ),
    ({LoraFormat.PEFT: lambda part, layer, model: _pair(f"base_model.model.{layer}", DOWN, UP)}, ()),
    ({LoraFormat.KOHYA: _kohya, LoraFormat.KOHYA_DIFFUSERS: _kohya_diffusers}, (_kohya_other_encoder,)),
    ({LoraFormat.MINDONE: _mindone}, ()),
)
"""The formats of each library, which are read together, and what readers meet besides and nobody writes any more."""

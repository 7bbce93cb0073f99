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


DOWN, UP, ALPHA = FACTORS = "lora_A.weight", "lora_B.weight", "alpha"

_LIBRARIES = (
    (LoraFormat.DIFFUSERS, LoraFormat.DIFFUSERS_PEFT, LoraFormat.DIFFUSERS_PROCESSORS),
    (LoraFormat.PEFT,),
    (LoraFormat.KOHYA, LoraFormat.KOHYA_DIFFUSERS),
    (LoraFormat.MINDONE,),
)
SIBLINGS = {form: tuple(other for other in own if other is not form) for own in _LIBRARIES for form in own}
"""The formats that are read together with each."""

_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
# The name of the adapter that peft puts in while a model is loaded, and the level that diffusers' attention once had.
_INSERTIONS = re.compile(r"(?<=\.lora_[AB])\.[^.]+(?=\.weight$)|\.processor(?=\.)")


def lora_layers(model: ModelSpec, parts: tuple[str, ...] | None = None) -> dict[str, Shape]:
    """Every layer that can be adapted, by its part, a dot and its name, with the shape of its weight.

    Args:
        model: the model.
        parts: only of these parts; None for all that LoRAs are made for, which the autoencoder is not.
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
    """The naming of every factor that a LoRA for a model can have, for reading and writing.

    Args:
        form: the format.
        model: the model that the LoRA is for.
        parts: only for these parts. PEFT's names fit several, so there it must be one.
    """
    layers = lora_layers(model, parts)
    shapes: dict[str, Shape] = {}
    for layer, weight in layers.items():
        down, up = factor_shapes(weight, rank=1)
        shapes |= {f"{layer}.{DOWN}": down, f"{layer}.{UP}": up, f"{layer}.{ALPHA}": ()}
    return Naming(
        shapes=shapes,
        slots=lora_slots(form, layers, model),
        spellings=(
            *(lora_slots(sibling, layers, model) for sibling in SIBLINGS[form]),
            *_other_spellings(form, layers, model),
        ),
        optional=frozenset(shapes),
        clean=mindone.clean if form is LoraFormat.MINDONE else _without_insertions,
    )


def lora_slots(form: LoraFormat, layers: Iterable[str], model: ModelSpec) -> dict[str, Slot]:
    """Where a format keeps the factors of some layers of a model; what it has no place for is left out."""
    rule = _RULES[form]
    slots: dict[str, Slot] = {}
    for layer in layers:
        part, _, inner = layer.partition(".")
        # Not every format has an alpha.
        slots |= {f"{layer}.{factor}": slot for factor, slot in zip(FACTORS, rule(part, inner, model), strict=False)}
    return slots


def _other_spellings(form: LoraFormat, layers: dict[str, Shape], model: ModelSpec) -> list[dict[str, Slot]]:
    """What readers meet and nobody writes any more, or not as a rule."""
    if form in (LoraFormat.KOHYA, LoraFormat.KOHYA_DIFFUSERS):
        return [_first_encoder_under_its_other_name(layers, model)]
    if form in (LoraFormat.PEFT, LoraFormat.MINDONE):
        return []
    ways = ((DOWN, "down"), (UP, "up"))
    attention = {
        f"{path}.{letter}_proj.{factor}": Slot(f"{path}.to_{letter}_lora.{way}.weight")
        for path in dict.fromkeys(layer.rpartition(".")[0] for layer in layers)
        if path.endswith(".self_attn")
        for letter in ("q", "k", "v", "out")
        for factor, way in ways
    }
    return [
        {f"{layer}.{ALPHA}": Slot(f"{layer}.{ALPHA}") for layer in layers},
        attention,
        {f"{layer}.{factor}": Slot(f"{layer}.lora.{way}.weight") for layer in layers for factor, way in ways},
        _without_part(lora_slots(LoraFormat.DIFFUSERS_PROCESSORS, layers, model)),
        _without_part(lora_slots(LoraFormat.DIFFUSERS, layers, model)),
    ]


def _first_encoder_under_its_other_name(layers: dict[str, Shape], model: ModelSpec) -> dict[str, Slot]:
    """kohya says "te" where there is one encoder and "te1" where there are two; diffusers writes "te1" for both."""
    others = {"lora_te": "lora_te1", "lora_te1": "lora_te"}
    slots = {}
    for name, slot in lora_slots(LoraFormat.KOHYA, layers, model).items():
        encoder, _, rest = slot.name.partition("_text_")
        if encoder in others:
            slots[name] = Slot(f"{others[encoder]}_text_{rest}")
    return slots


def _without_part(slots: dict[str, Slot]) -> dict[str, Slot]:
    """Files of the UNet's attention processors alone begin without the part."""
    return {
        name: Slot(slot.name.removeprefix("unet.")) for name, slot in slots.items() if slot.name.startswith("unet.")
    }


def _named(path: str, *endings: str) -> tuple[Slot, ...]:
    return tuple(Slot(f"{path}.{ending}") for ending in endings)


def _diffusers(part: str, layer: str, model: ModelSpec) -> tuple[Slot, ...]:
    kind = "lora" if part == "unet" else "lora_linear_layer"
    return _named(f"{part}.{layer}.{kind}", "down.weight", "up.weight")


def _diffusers_peft(part: str, layer: str, model: ModelSpec) -> tuple[Slot, ...]:
    return _named(f"{part}.{layer}", DOWN, UP)


def _diffusers_processors(part: str, layer: str, model: ModelSpec) -> tuple[Slot, ...]:
    if part != "unet":
        return _diffusers(part, layer, model)
    match = re.fullmatch(r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?", layer)
    return _named(f"unet.{match[1]}.processor.to_{match[2]}_lora", "down.weight", "up.weight") if match else ()


def _peft(part: str, layer: str, model: ModelSpec) -> tuple[Slot, ...]:
    return _named(f"base_model.model.{layer}", DOWN, UP)


def _kohya(part: str, layer: str, model: ModelSpec) -> tuple[Slot, ...]:
    if part == "unet" and model.unet.addition_embed_type:
        stored = spell(Format.STABILITY, f"unet.{layer}.weight", model)[0].name
        layer = stored.removeprefix(UNET_PREFIX).removesuffix(".weight")
    return _kohya_diffusers(part, layer, model)


def _kohya_diffusers(part: str, layer: str, model: ModelSpec) -> tuple[Slot, ...]:
    prefix = "lora_te_" if part == "text_encoder" and not model.text_encoder_2 else _KOHYA_PREFIXES[part]
    return _named(prefix + layer.replace(".", "_"), "lora_down.weight", "lora_up.weight", "alpha")


def _mindone(part: str, layer: str, model: ModelSpec) -> tuple[Slot, ...]:
    """Of SDXL's second text encoder only the output projections have a place: q, k and v are one parameter there.

    In SD 1 and SD 2 they are one layer, so A is common to the three and B has a block of rows for each.
    """
    places = spell(Format.MINDONE, f"{part}.{layer}.weight", model)
    if not places or not places[0].name.endswith(".weight"):
        return ()
    is_sd = model.family in (Family.SD1, Family.SD2)
    endings = ("lora_down.weight", "lora_up.weight") if is_sd else (DOWN, UP)
    down, up = _named(places[0].name.removesuffix(".weight"), *endings)
    return down, replace(up, block=places[0].block, blocks=places[0].blocks)


_RULES: dict[LoraFormat, Callable[[str, str, ModelSpec], tuple[Slot, ...]]] = {
    LoraFormat.DIFFUSERS: _diffusers,
    LoraFormat.DIFFUSERS_PEFT: _diffusers_peft,
    LoraFormat.DIFFUSERS_PROCESSORS: _diffusers_processors,
    LoraFormat.PEFT: _peft,
    LoraFormat.KOHYA: _kohya,
    LoraFormat.KOHYA_DIFFUSERS: _kohya_diffusers,
    LoraFormat.MINDONE: _mindone,
}
"""From part, layer and model to the places of A, B and alpha: none if the format has no place for the layer."""


def _without_insertions(name: str) -> str:
    return _INSERTIONS.sub("", name)

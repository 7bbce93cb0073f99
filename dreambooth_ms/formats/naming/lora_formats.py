"""How each format names the factors of a LoRA, and of other updates.

The update of a layer's weight W (O, I) is alpha / r * B A with A (r, I) and B (O, r) (Hu et al., 2021, section 4.1);
for a convolution A is (r, I, K, K) and B (O, r, 1, 1). The public names are the layer's with `.lora_A.weight`,
`.lora_B.weight` and `.alpha`, behind the part and a dot; `update_kinds` has the names of other factors.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from dreambooth_ms.errors import WeightError, count_of, show_names
from dreambooth_ms.formats.naming import TABLES, update_kinds
from dreambooth_ms.formats.naming.formats import Format, naming_of, spell, unet_layer
from dreambooth_ms.formats.naming.plan import Naming, Report, Shape, Slot, WritePlan, found_slot, locate, unwrapped
from dreambooth_ms.formats.naming.recognise import OTHER_METHODS, kind_of_change, matching, other_kind, word_in
from dreambooth_ms.formats.naming.update_kinds import ALPHA, BIAS, COLUMNS, DOWN, MAGNITUDE, MID, OF_BIAS, UP, WEIGHT
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import PUBLISHED_MODELS, Family, ModelSpec


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


class OtherFormat(Enum):
    """Formats of adapters that are no LoRAs. What they hold is told from the names, whoever wrote them."""

    CUSTOM_DIFFUSION = "a Custom Diffusion file"
    """Whole weights of cross-attention: by diffusers `<attention>.processor.to_k_custom_diffusion.weight`, by the
    paper's authors `unet.<layer>.weight` or the same in LDM's names; or u and v, whose product is added to them."""
    EMBEDDING = "a textual inversion embedding"
    """Vectors of new words alone."""


AdapterFormat: TypeAlias = LoraFormat | OtherFormat

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The networks that can be adapted, by the names of their folders, in the order of files."""

ALL_FACTORS = (DOWN, UP, *dict.fromkeys(TABLES["update_factors"].values()), "ia3", WEIGHT, BIAS)
"""What a layer may have, whatever its kind."""

HELD: Mapping[LoraFormat, Mapping[str, str]] = {form: TABLES["held_factors"][form.name] for form in LoraFormat}
"""The factors that each format has a place for, and what they are called there."""

_DOTTED, _UNDERSCORED = TABLES["lora_dotted"], TABLES["lora_underscored"]
# How names of factors end: in the words of peft, kohya, diffusers or its attention processors; with a number, or the
# name of the adapter that peft puts in while a model is loaded.
_FACTOR = re.compile(
    r"(?:\.lora(?:_linear_layer)?[._]|_lora\.)(?:(?P<down>A|down)|B|up)(?:_\d+)?(?:(?:\.[^.]+)?\.weight)?$"
)
_OTHER_FACTOR = re.compile(rf"\.(?P<factor>{'|'.join(TABLES['update_factors'])})(?:\.default)?(?:\.weight)?$")
_PROCESSORS = (re.compile(r"(?<=\.to_out)\.0$"), ""), (re.compile(r"(?<=\.self_attn\.)(\w+)_proj$"), r"to_\1")
"""What diffusers' attention processors called the layers of attention."""


@dataclass(frozen=True)
class LoraPlan:
    """What is read from where."""

    form: AdapterFormat
    models: tuple[ModelSpec, ...]
    """The models that it fits: several if it adapts only what these have in common."""
    layers: Mapping[str, Mapping[str, Slot]]
    """By part, a dot and the layer's public name: where the file has each of its factors. Not every file has ALPHA."""
    report: Report

    @property
    def family(self) -> str:
        """The family of the first of its models, in words."""
        return self.models[0].family.value

    def read(self, tensor: Callable[[str], np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        """The factors of every adapted layer; `tensor` gives the file's tensor of a name, in any dtype."""

        def value(factor: str, slot: Slot) -> np.ndarray:
            own = slot.restore(tensor(slot.name))
            return own.reshape(-1) if factor == MAGNITUDE else own

        return {layer: {one: value(one, slot) for one, slot in slots.items()} for layer, slots in self.layers.items()}


def recognise_lora(
    stored: Mapping[str, Shape],
    source: str,
    models: Iterable[ModelSpec] = PUBLISHED_MODELS,
    parts: tuple[str, ...] | None = None,
    base: str = "",
    otherwise: str = "",
) -> LoraPlan:
    """The format of a LoRA, which models it is for, and how it is read.

    `parts` is the one that a file of PEFT is for, where its folder says so. For the message: the file or folder, that
    of the only model it may be for, and what to do if none fits. WeightError if it is no LoRA, one by another method,
    or one that fits none of the models: the nearest is named.
    """
    names = [unwrapped(name) for name in stored]
    if methods := matching(OTHER_METHODS, names):
        used = " and ".join(methods)
        raise WeightError(f"{source}: trained with {used}, which is not supported; use a LoRA of factors A and B")
    form, kind = lora_format(stored), "a LoRA"
    if isinstance(form, OtherFormat):
        # Layers that compression left nothing of are in the file, empty.
        changed = {name: shape for name, shape in stored.items() if 0 not in shape}
        kind, stored = form.value, {name: shape for name, shape in changed.items() if word_in(name, "") is None}
    elif not any(re.search(r"lora[._]", name) or _OTHER_FACTOR.search(name) for name in names):
        raise WeightError(f"{source}: this is {other_kind(stored)}; expected a LoRA")
    if kinds := matching(TABLES["lora_for_others"], names):
        raise WeightError(f"{source}: this is a LoRA for {kinds[0]}; expected one for SD 1.x, SD 2.x or SDXL")
    plans = _plans(form, models, stored, parts)
    if fitting := [plan for plan in plans if plan.report.fits]:
        return replace(fitting[0], models=tuple(dict.fromkeys(model for plan in fitting for model in plan.models)))
    if not plans:
        raise WeightError(f"{source}: {kind} of {' and '.join(parts or ())}, which this model does not have")
    families = dict.fromkeys(plan.family for plan in plans)
    others = _plans(form, (model for model in PUBLISHED_MODELS if model.family.value not in families), stored, parts)
    if own := next((plan.family for plan in others if plan.report.fits), None):
        raise WeightError(f"{source}: this is {kind} for {own}; expected one for {' or '.join(families)}")
    nearest = min(plans, key=lambda plan: plan.report.count)
    target = f"{kind} of {nearest.family}" + (f" in the naming of {form.value}" if kind == "a LoRA" else "")
    nearest.report.check(source, f"{target} for {base}" if base else target, otherwise)
    raise AssertionError("what fits was returned")


def lora_format(names: Iterable[str]) -> AdapterFormat:
    """The format of an adapter's names, whatever they name."""
    held = list(names)
    if change := kind_of_change(map(unwrapped, held)):
        return OtherFormat(change)
    return LoraFormat[(*matching(TABLES["lora_marks"], held), "DIFFUSERS")[0]]


def read_plan(
    form: AdapterFormat, model: ModelSpec, stored: Mapping[str, Shape], parts: tuple[str, ...] | None = None
) -> LoraPlan:
    """Where the factors of every adapted layer are, with a report of what does not fit the model. `parts` are those
    that it may adapt; one where the names do not tell it, as in PEFT's files."""
    weights, by_path = lora_layers(model, parts), layers_by_path(model, parts)
    split = split_change if isinstance(form, OtherFormat) else split_name
    ia3 = {name.removesuffix("on_input") + "weight" for name in stored if name.endswith(".on_input")}

    def held_by(name: str) -> dict[str, Slot]:
        path, factor = (split_name(name.removesuffix("weight") + "on_input")[0], "ia3") if name in ia3 else split(name)
        found = by_path.get(path, ()) if factor else ()
        held = [layer for layer in found if factor not in OF_BIAS or f"{layer}.{BIAS}" in model_shapes(model)]
        # A is common to them, and B has a block of rows for each.
        whole = Slot(name, blocks=len(held) if factor == UP else 1)
        return {f"{layer}.{factor}": replace(whole, block=i % whole.blocks) for i, layer in enumerate(held)}

    places, unknown = locate(stored, held_by, (f"{layer}.{factor}" for layer in weights for factor in ALL_FACTORS))
    if form is LoraFormat.MINDONE:
        # mindone may save the adapted layers' own weights besides.
        unknown = naming_of(Format.MINDONE, model).locate(unknown)[1]
    layers, misshaped, missing = {}, [], []
    for name, weight in weights.items():
        found = {factor: places[f"{name}.{factor}"][0] for factor in ALL_FACTORS if f"{name}.{factor}" in places}
        if not found:
            continue
        try:
            if fitting := _as_found(found, weight, stored):
                layers[name] = fitting
                continue
        except KeyError as error:
            missing.append(f"{name}.{error.args[0]}")
            continue
        shapes = " and ".join(str(stored[slot.name]) for slot in found.values())
        own = f"update by {shapes}" if update_kinds.kind_of(found) else f"update of several kinds ({', '.join(found)})"
        misshaped.append(f"{name}: a weight of {weight} has no {own}")
    return LoraPlan(form, (model,), layers, Report.of(places, missing, unknown, misshaped))


def write_plan(
    form: LoraFormat, model: ModelSpec, layers: Mapping[str, Collection[str]], source: str = ""
) -> WritePlan:
    """What each tensor of a file is made of, for the layers that are adapted, in their order, each with its factors.

    The pieces are the public names of factors. Where a format keeps one A for several layers (`Assembly.shared`), these
    must have one, and all be there (`shared_layers`). `source` is the LoRA, for the message. WeightError if there are
    layers, or kinds of updates, that the format has no place for.
    """
    parts = {layer.partition(".")[0] for layer in layers}
    assert form is not LoraFormat.PEFT or len(parts) == 1, "a folder is a part's"
    if strange := _strange(form, layers):
        titles = " and ".join(dict.fromkeys(update_kinds.title_of(layers[layer]) for layer in strange))
        others = [other.name.lower() for other in LoraFormat if not _strange(other, layers)]
        remedy = f"choose --format {' or '.join(others)}, or make" if others else "make"
        said = f"{count_of(len(strange), 'layer')} of {titles} have no place in the naming of {form.value}"
        raise WeightError(f"{source}: {said}; {remedy} it a LoRA by --rank")
    slots = lora_slots(form, layers, model)
    naming = Naming(shapes={}, places={name: [slot] for name, slot in slots.items()})
    plan = naming.write_plan([f"{layer}.{factor}" for layer, own in layers.items() for factor in own])
    if homeless := [n for n in layers if not {f"{n}.{DOWN}", f"{n}.{UP}"}.isdisjoint(plan.left_out)]:
        raise WeightError(
            f"{source}: a LoRA in the naming of {form.value} has no place for {len(homeless)} of "
            f"{count_of(len(layers), 'layer')} ({show_names(homeless)}); choose another format, or adapt other layers"
        )
    return plan


def _strange(form: LoraFormat, layers: Mapping[str, Collection[str]]) -> list[str]:
    """The layers whose factors a format has no place for. In peft's formats a network has one kind."""
    kinds = {(layer.partition(".")[0], update_kinds.title_of(own)) for layer, own in layers.items()}
    is_mixed = form in (LoraFormat.PEFT, LoraFormat.DIFFUSERS_PEFT) and len(kinds) > len({part for part, _ in kinds})
    held = {*HELD[form], *(update_kinds.BESIDE if form is LoraFormat.PEFT else (ALPHA,))}
    return [layer for layer, own in layers.items() if is_mixed or not set(own) <= held]


def shared_layers(form: LoraFormat, model: ModelSpec) -> list[list[str]]:
    """The layers of a model that have the same A in a format, group by group."""
    groups: dict[str, list[str]] = {}
    for name, slot in lora_slots(form, lora_layers(model), model).items():
        if name.endswith(f".{DOWN}"):
            groups.setdefault(slot.name, []).append(name.removesuffix(f".{DOWN}"))
    return [group for group in groups.values() if len(group) > 1]


def _plans(
    form: AdapterFormat, models: Iterable[ModelSpec], stored: Mapping[str, Shape], parts: tuple[str, ...] | None
) -> list[LoraPlan]:
    """The plan for each model, and if none fits, for each text encoder alone, whose names may not tell the part."""
    held = [model for model in models if not parts or any(getattr(model, part) for part in parts)]
    plans = [read_plan(form, model, stored, parts) for model in held]
    if parts is None and not any(plan.report.fits for plan in plans):
        plans += [read_plan(form, m, stored, (part,)) for m in held for part in PARTS[1:] if getattr(m, part)]
    return plans


def _as_found(found: Mapping[str, Slot], weight: Shape, stored: Mapping[str, Shape]) -> dict[str, Slot] | None:
    """The layer's slots as the file has them; None if their shapes make no update of the weight. Raises as `fits`."""
    slots, norms = dict(found), found.get(MAGNITUDE)
    # peft's (1, O, 1, 1) are of rows.
    if norms and stored[norms.name][:2] == (1, weight[1]) and "magnitude" not in norms.name:
        slots[COLUMNS] = slots.pop(MAGNITUDE)
    shapes, kind = {factor: stored[slot.name] for factor, slot in slots.items()}, update_kinds.kind_of(slots)
    if not kind or math.prod(shapes.get(ALPHA, ())) != 1:
        return None
    if kind != "lora":
        return slots if update_kinds.fits(kind, shapes, weight) else None
    rank, points = next(iter(shapes[DOWN]), 0), tuple(1 for _ in weight[2:])
    expected = {DOWN: (rank, *weight[1:]), UP: (weight[0], rank, *points)}
    if MID in found:
        expected |= {DOWN: (rank, weight[1], *points), MID: (rank, rank, *weight[2:])}
    own = {factor: found_slot(found[factor], shape, shapes[factor]) for factor, shape in expected.items()}
    if not (rank and update_kinds.norms_fit(shapes, weight) and all(own.values())):
        return None
    return {**slots, **{factor: slot for factor, slot in own.items() if slot}}


def lora_layers(model: ModelSpec, parts: tuple[str, ...] | None = None) -> dict[str, Shape]:
    """Every layer that can be adapted, by its part, a dot and its name, with the shape of its weight. Only of some
    parts, or of all that LoRAs are made for, which the autoencoder is not."""
    wanted, weight = PARTS if parts is None else parts, re.compile(r".+(?<!_embedding)\.weight")
    return {
        name.removesuffix(".weight"): shape
        for name, shape in model_shapes(model).items()
        if weight.fullmatch(name) and len(shape) > 1 and name.partition(".")[0] in wanted
    }


def lora_slots(form: LoraFormat, layers: Iterable[str], model: ModelSpec) -> dict[str, Slot]:
    """Where a format keeps the factors of some layers of a model; what it has no place for is left out."""
    return {f"{layer}.{factor}": slot for layer in layers for factor, slot in _slots(form, layer, model).items()}


def split_name(name: str) -> tuple[str, str]:
    """A name in a file -> what it calls the layer, and which factor it is; the name itself and "" if it is none."""
    plain = unwrapped(name).replace(".processor.", ".").replace("_orig_mod_", "")
    if match := _FACTOR.search(plain):
        return plain[: match.start()], DOWN if match["down"] else UP
    if match := _OTHER_FACTOR.search(plain):
        return plain[: match.start()], TABLES["update_factors"][match["factor"]]
    return plain, ""


def split_change(name: str) -> tuple[str, str]:
    """The same for a name in a file without A and B."""
    plain = unwrapped(name).replace(".processor.", ".").replace("_custom_diffusion", "")
    path, _, last = plain.rpartition(".")
    return path.removesuffix(".weight"), TABLES["change_factors"].get(last, "")


@lru_cache(maxsize=16)
def layers_by_path(model: ModelSpec, parts: tuple[str, ...] | None = None) -> Mapping[str, tuple[str, ...]]:
    """What layers are called in files, whoever wrote them -> the layers. Where it is several, they are one layer there:
    A is common to them, and B has a block of rows for each. Of one part alone, names may leave out which it is, as
    peft's do."""
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
    if part == "unet" and not model.unet.simple_blocks:
        names.add(unet_layer(inner, model.unet))
    names |= {pattern.sub(other, name) for pattern, other in _PROCESSORS for name in names}
    dotted = {prefix + name for prefix in (*_DOTTED[part], *bare) for name in names}
    return dotted | {prefix + name.replace(".", "_") for prefix in _UNDERSCORED[part] for name in names}


def _slots(form: LoraFormat, layer: str, model: ModelSpec) -> dict[str, Slot]:
    """Where a format keeps the factors of a layer; empty where it has no place for it."""
    part, _, inner = layer.partition(".")
    path, names, blocks = layer, HELD[form], {}
    match form:
        case LoraFormat.PEFT:
            path = f"base_model.model.{inner}"
        case LoraFormat.DIFFUSERS_PROCESSORS if part == "unet":
            found = re.fullmatch(r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?", layer)
            path = f"{found[1]}.processor.to_{found[2]}_lora" if found else ""
        case LoraFormat.DIFFUSERS | LoraFormat.DIFFUSERS_PROCESSORS:
            path = f"{layer}.{'lora' if part == 'unet' else 'lora_linear_layer'}"
        case LoraFormat.MINDONE:
            # Of SDXL's second text encoder only the output projections have a place: q, k and v are one parameter
            # there. In SD 1 and SD 2 they are one layer, so A is common to the three and B has a block for each.
            place = next(iter(spell(Format.MINDONE, f"{layer}.weight", model)), Slot(""))
            path = place.name.removesuffix(".weight") if place.name.endswith(".weight") else ""
            names = names if model.family in (Family.SD1, Family.SD2) else {DOWN: DOWN, UP: UP}
            blocks = {UP: replace(place, name=f"{path}.{names[UP]}")}
        case LoraFormat.KOHYA | LoraFormat.KOHYA_DIFFUSERS:
            is_xl = model.unet.addition_embed_type == "text_time"
            is_stability = form is LoraFormat.KOHYA and part == "unet" and is_xl
            prefix = "lora_te_" if part == "text_encoder" and not model.text_encoder_2 else _UNDERSCORED[part][0]
            path = prefix + (unet_layer(inner, model.unet) if is_stability else inner).replace(".", "_")
    return {factor: Slot(f"{path}.{name}") for factor, name in names.items()} | blocks if path else {}

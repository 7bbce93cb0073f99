"""LoRAs of any format: which layers of which parts a file adapts, where their tensors are, and where they go."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from dreambooth_ms.errors import WeightError, count_of
from dreambooth_ms.formats.naming import lora_formats
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.lora_formats import ALPHA, DOWN, FACTORS, PARTS, UP, LoraFormat
from dreambooth_ms.formats.naming.plan import Naming, WritePlan, duplicates, locate, unwrapped
from dreambooth_ms.formats.naming.recognise import OTHER_METHODS, matching, other_kind
from dreambooth_ms.formats.naming.report import Report, show_names
from dreambooth_ms.formats.naming.slots import Shape, Slot, slot_as_found
from dreambooth_ms.formats.naming.tables import TABLES
from dreambooth_ms.models.specs import PUBLISHED_MODELS, ModelSpec


@dataclass(frozen=True)
class LoraPlan:
    """What is read from where."""

    form: LoraFormat
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
        return {
            layer: {factor: slot.restore(tensor(slot.name)) for factor, slot in slots.items()}
            for layer, slots in self.layers.items()
        }


def recognise_lora(
    stored: Mapping[str, Shape],
    source: str,
    models: Iterable[ModelSpec] = PUBLISHED_MODELS,
    parts: tuple[str, ...] | None = None,
    base: str = "",
    otherwise: str = "",
) -> LoraPlan:
    """The format of a LoRA, which models it is for, and how it is read.

    `parts` is the one that a file of PEFT is for, where its folder says so; `source` is the file or folder, `base`
    that of the only model it may be for, and `otherwise` what to do if none fits, for the message.

    Raises:
        WeightError: no LoRA, one by another method, or one that fits none of the models: the nearest is named.
    """
    names = [unwrapped(name) for name in stored]
    if methods := matching(OTHER_METHODS, names):
        used = " and ".join(methods)
        raise WeightError(f"{source}: trained with {used}, which is not supported; use a LoRA of factors A and B")
    if not any(re.search(r"lora[._]", name) for name in names):
        raise WeightError(f"{source}: this is {other_kind(stored)}; expected a LoRA")
    if kinds := matching(TABLES["lora_for_others"], names):
        raise WeightError(f"{source}: this is a LoRA for {kinds[0]}; expected one for SD 1.x, SD 2.x or SDXL")
    form = lora_format(stored)
    plans = _plans(form, models, stored, parts)
    fitting = [plan for plan in plans if plan.report.fits]
    if fitting:
        return replace(fitting[0], models=tuple(dict.fromkeys(model for plan in fitting for model in plan.models)))
    if not plans:
        raise WeightError(f"{source}: a LoRA of {' and '.join(parts or ())}, which this model does not have")
    families = dict.fromkeys(plan.family for plan in plans)
    others = _plans(form, (model for model in PUBLISHED_MODELS if model.family.value not in families), stored, parts)
    if own := next((plan.family for plan in others if plan.report.fits), None):
        raise WeightError(f"{source}: this is a LoRA for {own}; expected one for {' or '.join(families)}")
    nearest = min(plans, key=lambda plan: plan.report.count)
    target = f"a LoRA of {nearest.family} in the naming of {form.value}"
    nearest.report.check(source, f"{target} for {base}" if base else target, otherwise)
    raise AssertionError("what fits was returned")


def lora_format(names: Iterable[str]) -> LoraFormat:
    """The format of a LoRA's names, whatever they name."""
    return LoraFormat[(*matching(TABLES["lora_marks"], list(names)), "DIFFUSERS")[0]]


def read_plan(
    form: LoraFormat, model: ModelSpec, stored: Mapping[str, Shape], parts: tuple[str, ...] | None = None
) -> LoraPlan:
    """Where the factors of every adapted layer are, with a report of what does not fit the model.

    `parts` are those that it may adapt; one where the names do not tell it, as in PEFT's files.
    """
    weights, layers_by_path = lora_formats.lora_layers(model, parts), lora_formats.layers_by_path(model, parts)

    def held_by(name: str) -> dict[str, Slot]:
        path, factor = lora_formats.split_name(name)
        held = layers_by_path.get(path, ()) if factor else ()
        # A is common to them, and B has a block of rows for each.
        whole = Slot(name, blocks=len(held) if factor == UP else 1)
        return {f"{layer}.{factor}": replace(whole, block=i % whole.blocks) for i, layer in enumerate(held)}

    places, unknown = locate(stored, held_by, (f"{layer}.{factor}" for layer in weights for factor in FACTORS))
    if form is LoraFormat.MINDONE:
        # mindone may save the adapted layers' own weights besides.
        unknown = naming_of(Format.MINDONE, model).locate(unknown)[1]
    layers, misshaped, missing = {}, [], []
    for name, weight in weights.items():
        found = {factor: places[f"{name}.{factor}"][0] for factor in FACTORS if f"{name}.{factor}" in places}
        lacking = [f"{name}.{factor}" for factor in (DOWN, UP) if found and factor not in found]
        missing += lacking
        if not found or lacking:
            continue
        if fitting := _as_found(found, weight, stored):
            layers[name] = fitting
        else:
            shapes = " and ".join(str(stored[slot.name]) for slot in found.values())
            misshaped.append(f"{name}: a weight of {weight} has no update by {shapes}")
    report = Report(tuple(missing), unknown, tuple(misshaped), duplicates(places))
    return LoraPlan(form, (model,), layers, report)


def write_plan(form: LoraFormat, model: ModelSpec, layers: Iterable[str], source: str = "") -> WritePlan:
    """What each tensor of a file is made of, for the layers that are adapted, in their order.

    The pieces are the public names of factors. Where a format keeps one A for several layers (`Assembly.shared`), these
    must have one, and all be there (`shared_layers`). Layers are named by part, a dot and the public name; `source` is
    the LoRA, for the message.

    Raises:
        WeightError: layers that the format has no place for.
    """
    held = list(layers)
    assert form is not LoraFormat.PEFT or len({layer.partition(".")[0] for layer in held}) == 1, "a folder is a part's"
    slots = lora_formats.lora_slots(form, held, model)
    naming = Naming(shapes={}, places={name: [slot] for name, slot in slots.items()})
    plan = naming.write_plan([f"{layer}.{factor}" for layer in held for factor in FACTORS])
    homeless = [layer for layer in held if not {f"{layer}.{DOWN}", f"{layer}.{UP}"}.isdisjoint(plan.left_out)]
    if homeless:
        raise WeightError(
            f"{source}: a LoRA in the naming of {form.value} has no place for {len(homeless)} of "
            f"{count_of(len(held), 'layer')} ({show_names(homeless)}); choose another format, or adapt other layers"
        )
    return plan


def shared_layers(form: LoraFormat, model: ModelSpec) -> list[list[str]]:
    """The layers of a model that have the same A in a format, group by group."""
    groups: dict[str, list[str]] = {}
    for name, slot in lora_formats.lora_slots(form, lora_formats.lora_layers(model), model).items():
        if name.endswith(f".{DOWN}"):
            groups.setdefault(slot.name, []).append(name.removesuffix(f".{DOWN}"))
    return [group for group in groups.values() if len(group) > 1]


def _plans(
    form: LoraFormat, models: Iterable[ModelSpec], stored: Mapping[str, Shape], parts: tuple[str, ...] | None
) -> list[LoraPlan]:
    """The plan for each model, and if none fits, for each text encoder alone, whose names may not tell the part."""
    held = [model for model in models if not parts or any(getattr(model, part) for part in parts)]
    plans = [read_plan(form, model, stored, parts) for model in held]
    if parts is None and not any(plan.report.fits for plan in plans):
        plans += [read_plan(form, m, stored, (part,)) for m in held for part in PARTS[1:] if getattr(m, part)]
    return plans


def _as_found(found: Mapping[str, Slot], weight: Shape, stored: Mapping[str, Shape]) -> dict[str, Slot] | None:
    """The layer's slots as the file has them; None if their shapes make no update of the weight."""
    rank = next(iter(stored[found[DOWN].name]), 0)
    down_shape, up_shape = lora_formats.factor_shapes(weight, rank)
    down = slot_as_found(found[DOWN], down_shape, stored[found[DOWN].name])
    up = slot_as_found(found[UP], up_shape, stored[found[UP].name])
    if not rank or not down or not up or (ALPHA in found and math.prod(stored[found[ALPHA].name]) != 1):
        return None
    return {**found, DOWN: down, UP: up}

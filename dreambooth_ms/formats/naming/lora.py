"""LoRAs of any format: which layers of which parts a file adapts, its factors, and the file for given factors."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.lora_formats import (
    ALPHA,
    DOWN,
    UP,
    LoraFormat,
    factor_shapes,
    lora_layers,
    lora_naming,
)
from dreambooth_ms.formats.naming.plan import Naming, WritePlan
from dreambooth_ms.formats.naming.recognise import other_kind
from dreambooth_ms.formats.naming.report import Report
from dreambooth_ms.formats.naming.slots import Shape, Slot, slot_as_found
from dreambooth_ms.models.specs import PUBLISHED_MODELS, Family, ModelSpec

# Methods whose tensors stand beside or instead of A and B, so that reading these alone would give another update.
_OTHER_METHODS = {
    "DoRA": r"\.dora_scale$|lora_magnitude_vector",
    "LoHa": r"\.hada_w[12]",
    "LoKr": r"\.lokr_w[12]",
    "LoCon with a third factor": r"\.lora_mid\.",
    "IA3": r"\.on_input$",
    "a trained bias": r"lora_(?:B|up)(?:\.[^.]+)?\.bias$",
}
_OTHER_MODELS = {
    "Flux": r"(?:double|single)_blocks[._]\d+[._]|single_transformer_blocks[._]",
    "SD 3 or another diffusion transformer": r"joint_blocks[._]\d+[._]|^transformer\.",
}
_MARKS = {
    LoraFormat.KOHYA: ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"),
    LoraFormat.PEFT: ("base_model.model.",),
    LoraFormat.MINDONE: ("model.diffusion_model.", "cond_stage_model.", "conditioner."),
}


@dataclass(frozen=True)
class LoraLayer:
    """Where the factors of a layer are in a file."""

    down: Slot
    """A, (r, I) or (r, I, K, K)."""
    up: Slot
    """B, (O, r) or (O, r, 1, 1)."""
    alpha: str | None
    """The name of the scalar in the file; None if it has none."""
    rank: int


@dataclass(frozen=True)
class LoraPlan:
    """What is read from where."""

    form: LoraFormat
    model: ModelSpec
    """The model whose layers these are."""
    layers: Mapping[str, LoraLayer]
    """By part, a dot and the layer's public name."""
    report: Report

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur."""
        return tuple(sorted({layer.rank for layer in self.layers.values()}))

    def notes(self) -> list[str]:
        """What is assumed, one sentence each."""
        without = sum(layer.alpha is None for layer in self.layers.values())
        if not without:
            return []
        if self.form is LoraFormat.MINDONE and self.model.family in (Family.SD1, Family.SD2):
            return ["mindone's SD LoRAs have a scale of 1: alpha is the rank."]
        ranks = ", ".join(map(str, self.ranks))
        return [f"{without} of {len(self.layers)} layers have no alpha in the file: it is taken as the rank ({ranks})."]


@dataclass(frozen=True)
class LoraRecognition:
    """A LoRA in a file."""

    plan: LoraPlan
    """How it is read for the first of the models."""
    models: tuple[ModelSpec, ...]
    """The models that it fits: several if it adapts only what these have in common."""


@dataclass(frozen=True)
class Factors:
    """The update alpha / r * B A of one layer."""

    down: np.ndarray
    """A, (r, I) or (r, I, K, K)."""
    up: np.ndarray
    """B, (O, r) or (O, r, 1, 1)."""
    alpha: float | None = None
    """None means the rank, a scale of 1."""

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    def update(self) -> np.ndarray:
        """alpha / r * B A in float32, in the shape of the layer's weight: (O, I) or (O, I, K, K)."""
        down, up = self.down.astype(np.float32), self.up.astype(np.float32)
        product = up.reshape(up.shape[0], self.rank) @ down.reshape(self.rank, -1)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return np.float32(scale) * product.reshape(up.shape[0], *down.shape[1:])


def recognise_lora(
    stored: Mapping[str, Shape],
    source: str,
    models: Iterable[ModelSpec] = PUBLISHED_MODELS,
    parts: tuple[str, ...] | None = None,
) -> LoraRecognition:
    """The format of a LoRA, and which models it is for.

    Args:
        stored: names and shapes of the file's tensors.
        source: the file or folder, for the message.
        models: the models it may be for.
        parts: the one part that a file of PEFT is for, where its folder tells.

    Raises:
        WeightError: no LoRA, one by another method, or one that fits none of the models: the nearest is named.
    """
    for method, pattern in _OTHER_METHODS.items():
        if any(re.search(pattern, name) for name in stored):
            raise WeightError(f"{source}: trained with {method}, which is not supported; use a LoRA of factors A and B")
    if not any(re.search(r"lora[._]", name) for name in stored):
        raise WeightError(f"{source}: this is {other_kind(stored)}; expected a LoRA")
    for other, pattern in _OTHER_MODELS.items():
        if any(re.search(pattern, name) for name in stored):
            raise WeightError(f"{source}: this is a LoRA for {other}; expected one for SD 1.x, SD 2.x or SDXL")
    form = lora_format(stored)
    plans = [plan for model in models for plan in _plans(form, model, stored, parts)]
    fitting = [plan for plan in plans if plan.report.fits]
    if not plans:
        raise WeightError(f"{source}: a LoRA of {' and '.join(parts or ())}, which this model does not have")
    if not fitting:
        families = {plan.model.family for plan in plans}
        others = [model for model in PUBLISHED_MODELS if model.family not in families]
        own = _family_by_names(form, stored, parts, others)
        if own:
            wanted = " or ".join(family.value for family in families)
            raise WeightError(f"{source}: this is a LoRA for {own.value}; expected one for {wanted}")
        nearest = min(plans, key=lambda plan: plan.report.count)
        nearest.report.check(source, f"a LoRA of {nearest.model.family.value} in the naming of {form.value}")
    return LoraRecognition(fitting[0], tuple(plan.model for plan in fitting))


def lora_format(names: Iterable[str]) -> LoraFormat:
    """The format of a LoRA's names, whatever they name."""
    listed = list(names)
    found = (form for form, marks in _MARKS.items() if any(name.startswith(marks) for name in listed))
    return next(found, LoraFormat.DIFFUSERS)


def read_plan(
    form: LoraFormat, model: ModelSpec, stored: Mapping[str, Shape], parts: tuple[str, ...] | None = None
) -> LoraPlan:
    """Where the factors of every adapted layer are, with a report of what does not fit the model.

    Args:
        form: the format.
        model: the model it is for.
        stored: names and shapes of the file's tensors.
        parts: the parts it may adapt; one for PEFT, whose files do not name it.
    """
    places, unknown = lora_naming(form, model, parts).locate(stored)
    if form is LoraFormat.MINDONE:
        # mindone may save the adapted layers' own weights besides.
        unknown = naming_of(Format.MINDONE, model).locate(unknown)[1]
    layers, misshaped, missing = {}, [], []
    for name, weight in lora_layers(model, parts).items():
        found = {factor: places[f"{name}.{factor}"][0] for factor in (DOWN, UP, ALPHA) if f"{name}.{factor}" in places}
        if not found:
            continue
        missing += [f"{name}.{factor}" for factor in (DOWN, UP) if factor not in found]
        if DOWN in found and UP in found:
            layer = _layer(found, weight, stored)
            if layer:
                layers[name] = layer
            else:
                shapes = " and ".join(str(stored[slot.name]) for slot in found.values())
                misshaped.append(f"{name}: a weight of {weight} has no update by {shapes}")
    duplicate = [f"{name}: {' and '.join(s.name for s in slots)}" for name, slots in places.items() if len(slots) > 1]
    return LoraPlan(form, model, layers, Report(tuple(missing), unknown, tuple(misshaped), tuple(duplicate)))


def read_factors(
    plan: LoraPlan, tensor: Callable[[str], np.ndarray], number: Callable[[str], float]
) -> dict[str, Factors]:
    """The factors of every adapted layer.

    Args:
        plan: where they are.
        tensor: the file's tensor of a name, in any dtype.
        number: the value of a scalar of a name.
    """
    return {
        name: Factors(
            down=layer.down.restore(tensor(layer.down.name)),
            up=layer.up.restore(tensor(layer.up.name)),
            alpha=None if layer.alpha is None else number(layer.alpha),
        )
        for name, layer in plan.layers.items()
    }


def write_plan(form: LoraFormat, model: ModelSpec, layers: Iterable[str]) -> WritePlan:
    """What each tensor of a file is made of, for the layers that are adapted.

    The pieces are the public names of factors. Where a format keeps one A for several layers (`Assembly.shared`), these
    must have one: `name_factors` sees to it.

    Raises:
        WeightError: layers that the format has no place for.
    """
    return _write_plan(form, _naming_for(form, model, layers), list(layers))


def name_factors(form: LoraFormat, model: ModelSpec, factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    """The tensors of a file in a format, in the order of the model.

    A format that keeps no alpha in the tensors (all but kohya's) must keep it beside them (`lora_settings`), or cannot
    (mindone's): there the scale is multiplied into B. bfloat16 must come as float32.

    Args:
        form: the format.
        model: the model that the LoRA is for.
        factors: by part, a dot and the layer's public name.

    Raises:
        WeightError: layers that the format has no place for.
    """
    naming = _naming_for(form, model, factors)
    if form is LoraFormat.MINDONE:
        factors = _with_common_down(naming, {name: folded(layer) for name, layer in factors.items()})
    plan = _write_plan(form, naming, list(factors))
    values: dict[str, np.ndarray] = {}
    for name, layer in factors.items():
        values[f"{name}.{DOWN}"], values[f"{name}.{UP}"] = layer.down, layer.up
        values[f"{name}.{ALPHA}"] = np.array(layer.rank if layer.alpha is None else layer.alpha, np.float32)
    return {
        stored: assembly.build([values[piece] for piece in assembly.pieces])
        for stored, assembly in plan.tensors.items()
    }


def folded(layer: Factors) -> Factors:
    """The same update with alpha = r: the scale alpha / r goes into B. Unchanged to the bit if it is 1 already."""
    if layer.alpha is None or layer.alpha == layer.rank:
        return replace(layer, alpha=float(layer.rank))
    assert np.issubdtype(layer.up.dtype, np.floating), "a bit pattern cannot be scaled"
    up = (layer.up.astype(np.float32) * np.float32(layer.alpha / layer.rank)).astype(layer.up.dtype)
    return Factors(layer.down, up, float(layer.rank))


def _plans(
    form: LoraFormat, model: ModelSpec, stored: Mapping[str, Shape], parts: tuple[str, ...] | None
) -> list[LoraPlan]:
    if form is not LoraFormat.PEFT:
        return [read_plan(form, model, stored)]
    there = ["unet", *(part for part in ("text_encoder", "text_encoder_2") if getattr(model, part))]
    return [read_plan(form, model, stored, (part,)) for part in there if parts is None or part in parts]


def _family_by_names(
    form: LoraFormat, stored: Mapping[str, Shape], parts: tuple[str, ...] | None, models: Iterable[ModelSpec]
) -> Family | None:
    """The family of the model that has all the names of a LoRA: with its sizes too, or else with others."""
    plans = [plan for model in models for plan in _plans(form, model, stored, parts)]
    named = [plan for plan in plans if not plan.report.missing and not plan.report.unexpected]
    named.sort(key=lambda plan: len(plan.report.misshaped))
    return named[0].model.family if named else None


def _layer(found: Mapping[str, Slot], weight: Shape, stored: Mapping[str, Shape]) -> LoraLayer | None:
    """The layer's slots as the file has them; None if their shapes make no update of the weight."""
    stored_down = stored[found[DOWN].name]
    rank = stored_down[0] if stored_down else 0
    down_shape, up_shape = factor_shapes(weight, rank)
    down = slot_as_found(found[DOWN], down_shape, stored_down)
    up = slot_as_found(found[UP], up_shape, stored[found[UP].name])
    alpha = found.get(ALPHA)
    if not rank or not down or not up or (alpha and stored[alpha.name] not in ((), (1,))):
        return None
    return LoraLayer(down, up, alpha.name if alpha else None, rank)


def _naming_for(form: LoraFormat, model: ModelSpec, layers: Iterable[str]) -> Naming:
    parts = tuple(dict.fromkeys(layer.partition(".")[0] for layer in layers))
    assert form is not LoraFormat.PEFT or len(parts) == 1, "a PEFT folder holds one part"
    return lora_naming(form, model, parts)


def _write_plan(form: LoraFormat, naming: Naming, layers: list[str]) -> WritePlan:
    plan = naming.write_plan([f"{layer}.{factor}" for layer in layers for factor in (DOWN, UP, ALPHA)])
    homeless = [layer for layer in layers if not {f"{layer}.{DOWN}", f"{layer}.{UP}"}.isdisjoint(plan.left_out)]
    if homeless:
        more = f" and {len(homeless) - 3} more" if len(homeless) > 3 else ""
        raise WeightError(
            f"a LoRA in the naming of {form.value} has no place for {len(homeless)} of {len(layers)} layers "
            f"({', '.join(homeless[:3])}{more}); choose another format, or adapt other layers"
        )
    return plan


def _with_common_down(naming: Naming, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates, with one A for the layers that the format keeps as one.

    Their different A are stacked, and each B is widened by zeros for the rows of the others; what is not adapted gets
    a B of zeros.
    """
    groups: dict[str, list[str]] = {}
    for name, slot in naming.slots.items():
        if name.endswith(f".{DOWN}"):
            groups.setdefault(slot.name, []).append(name.removesuffix(f".{DOWN}"))
    common: dict[str, Factors] = {}
    for group in groups.values():
        adapted = {name: factors[name] for name in group if name in factors}
        if len(group) == 1 or not adapted:
            common |= adapted
        else:
            common |= _stacked(group, adapted)
    return {**factors, **common}


def _stacked(group: list[str], adapted: Mapping[str, Factors]) -> dict[str, Factors]:
    members = list(adapted.values())
    out = members[0].up.shape[0]
    if all(np.array_equal(members[0].down, other.down) for other in members[1:]):
        down, starts = members[0].down, dict.fromkeys(adapted, 0)
    else:
        down = np.concatenate([layer.down for layer in members])
        ends = np.cumsum([layer.rank for layer in members])
        starts = {name: int(end) - layer.rank for (name, layer), end in zip(adapted.items(), ends, strict=True)}
    stacked = {}
    for name in group:
        up = np.zeros((out, down.shape[0]), members[0].up.dtype)
        if name in adapted:
            up[:, starts[name] : starts[name] + adapted[name].rank] = adapted[name].up
        stacked[name] = Factors(down, up, float(down.shape[0]))
    return stacked

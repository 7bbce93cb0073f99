"""What peft and diffusers keep beside the tensors of updates: ranks, alphas, and what else decides on a formula.

peft writes one set of settings per folder (adapter_config.json), diffusers one per part into the file's metadata; the
names are the same. `rank_pattern` and `alpha_pattern` hold the exceptions by layer. Here layers are named without their
part, and `source` is the file or folder, for messages: a WeightError where settings are damaged.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from dreambooth_ms.adapters.formulas import NEUMANN_TERMS, factorised
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.naming.update_kinds import ALPHA, DOWN, MAGNITUDE, TERMS, UP, Shape, kind_of, rank_of

TRAINED_KEY = "dreambooth_ms_lora"
"""Where a file's metadata keeps rank and alpha as they were trained, if the factors are folded ones."""

Settings = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]

_LARGEST = 3.4e38
"""Of float32, in which updates are added."""
_MOST_TERMS = 1000


def as_set(tensors: Tensors, settings: Settings, layer: str, source: str) -> Tensors:
    """A layer's tensors, with what its part's settings say of it in them: alpha, and how a rotation is made of them;
    WeightError also if they do not fit these."""
    rank = rank_of(tensors)
    if DOWN in tensors and settings.get("use_dora") and MAGNITUDE not in tensors:
        raise WeightError(f"{source}: use_dora, but {layer} has no lora_magnitude_vector; download it again")
    if "oft_R" in tensors:
        return _rotation(tensors, settings, source)
    if ALPHA in tensors or not (rank or "lokr_w1" in tensors):
        return tensors
    alpha = settings_alpha(settings, layer, rank or 1, source)
    if alpha is None:
        return tensors
    if rank:
        return {**tensors, ALPHA: np.array(alpha)}
    # peft scales a product of two whole factors, too.
    rank = _said(settings, "r", "rank_pattern", layer, source)
    return {**tensors, "lokr_w1": tensors["lokr_w1"] * np.float32(alpha / _number(rank, "r", source))}


def _rotation(tensors: Tensors, settings: Settings, source: str) -> Tensors:
    """OFT's triangles, bounded, with the terms of their series where these are not peft's default."""
    rotations, terms = tensors["oft_R"], settings.get("num_cayley_neumann_terms", NEUMANN_TERMS)
    if not isinstance(terms, int) or not 0 < terms <= _MOST_TERMS:
        said = f"num_cayley_neumann_terms {terms!r} is not a number from 1 to {_MOST_TERMS}"
        raise WeightError(f"{source}: {said}; download it again")
    if settings.get("coft"):
        # Before each step of a training, but not after the last.
        most = _number(settings.get("eps", 6e-5), "eps", source) / math.sqrt(len(rotations))
        norms = math.sqrt(2) * np.linalg.norm(rotations.astype(np.float32), axis=1, keepdims=True)
        rotations = rotations * np.minimum(1, most / np.maximum(norms, np.float32(1e-30)))
    terms = terms if settings.get("use_cayley_neumann", True) else 0
    return {**tensors, "oft_R": rotations} | ({TERMS: np.array(terms)} if terms != NEUMANN_TERMS else {})


def _number(value: Any, name: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise WeightError(f"{source}: {name} {value!r} is not a number above 0; download it again")
    return value


def as_trained(tensors: Tensors, settings: Settings, layer: str, source: str) -> Tensors:
    """Folded factors with the rank and alpha that settings say of the layer; as they are where they do not fit it. The
    update stays the same, but for the rounding of B where the scale is no power of two."""
    held, rank = len(tensors[DOWN]), _said(settings, "r", "rank_pattern", layer, source)
    alpha = settings_alpha(settings, layer, held, source)
    fits = isinstance(rank, int) and 0 < rank <= held and float(tensors.get(ALPHA, held)) == held
    if not (fits and alpha) or tensors[UP][:, rank:].any():
        return tensors
    up = tensors[UP][:, :rank]
    if alpha != rank:
        up = up.astype(np.float32) / np.float32(alpha / rank)
    return {**tensors, DOWN: tensors[DOWN][:rank], UP: up, ALPHA: np.array(alpha)}


def settings_alpha(settings: Settings, layer: str, rank: int, source: str) -> float | None:
    """The alpha of a layer by its part's settings, such that its scale is alpha / r; None if they do not say.
    WeightError also for settings under which the factors mean something else."""
    if settings.get("lora_bias"):
        raise WeightError(f"{source}: trained with lora_bias, which is not supported; use a LoRA of factors A and B")
    alpha = _said(settings, "lora_alpha" if "lora_alpha" in settings else "alpha", "alpha_pattern", layer, source)
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST:
        raise WeightError(f"{source}: lora_alpha {alpha!r} is not a number; download it again")
    # Rank-stabilised LoRA scales by alpha / sqrt(r) (Kalajdzievski, 2023, eq. 4).
    return float(alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)


def peft_settings(
    layers: Mapping[str, Tensors], weights: Mapping[str, Shape], modules: Collection[str], source: str
) -> dict[str, Any]:
    """The settings of a part whose updates are of one kind: of the tensors of its layers, the shapes of their weights,
    and the names of all its modules. WeightError if none make peft give tensors these shapes."""
    kind, names = kind_of(next(iter(layers.values()))), {name for own in layers.values() for name in own}
    if kind == "oft":
        scale, own = {"target_modules": shortest_ends(layers, modules)}, _rotations(layers, weights)
    else:
        # By a rank as large as a layer peft leaves both factors of a Kronecker product whole.
        ranks = {layer: rank_of(own) or max(weights[layer]) for layer, own in layers.items()}
        alphas = {layer: own[ALPHA] if rank_of(own) else ranks[layer] for layer, own in layers.items()}
        scale = lora_settings({layer: (rank, float(alphas[layer])) for layer, rank in ranks.items()}, modules)
        own = {"use_dora": MAGNITUDE in names}
    if kind in ("hada", "lokr"):
        scale = {name: value for name, value in scale.items() if not name.startswith("use_")}
        scale["alpha"] = scale.pop("lora_alpha")
        own = _kronecker(layers, weights, ranks) if kind == "lokr" else {}
        own["use_effective_conv2d"] = not {"hada_t1", "lokr_t2"}.isdisjoint(names)
    if None in own.values():
        remedy = "choose --format kohya, or make it a LoRA by --rank"
        raise WeightError(f"{source}: no settings of peft give factors of these sizes; {remedy}")
    return scale | own


def _kronecker(layers: Mapping[str, Tensors], weights: Mapping[str, Shape], ranks: Mapping[str, int]) -> dict[str, Any]:
    """By which rule peft makes two factors of weights, and of which of them products; None where it does not."""
    both = any("lokr_w1_a" in own for own in layers.values())

    def made(layer: str, factor: int) -> tuple[object, ...]:
        first, second = zip(*(factorised(side, factor) for side in weights[layer][:2]), strict=True)
        return first, both and ranks[layer] < max(first) / 2, ranks[layer] < max(second) / 2

    shapes = {
        layer: own["lokr_w1"].shape if "lokr_w1" in own else (len(own["lokr_w1_a"]), own["lokr_w1_b"].shape[1])
        for layer, own in layers.items()
    }
    held = {layer: (shapes[layer], "lokr_w1_a" in own, "lokr_w2_a" in own) for layer, own in layers.items()}
    tried = (-1, *range(1, 1 + max(map(max, shapes.values()))))
    fitting = (factor for factor in tried if all(made(layer, factor) == own for layer, own in held.items()))
    return {"decompose_both": both, "decompose_factor": next(fitting, None)}


def _rotations(layers: Mapping[str, Tensors], weights: Mapping[str, Shape]) -> dict[str, int | None]:
    """By which side or number of blocks, and how, peft makes these rotations; None where it cannot."""
    columns = {layer: math.prod(weights[layer][1:]) for layer in layers}
    sides = {layer: math.isqrt(2 * own["oft_R"].shape[1]) + 1 for layer, own in layers.items()}
    terms = {int(own.get(TERMS, NEUMANN_TERMS)) for own in layers.values()}
    shared = all(len(own["oft_R"]) == 1 for own in layers.values())
    own = {"block_share": shared, "use_cayley_neumann": terms != {0}, "num_cayley_neumann_terms": max(terms) or 5}
    counts = {layer: columns[layer] // side for layer, side in sides.items()}
    for name, other, found in (("oft_block_size", "r", sides), ("r", "oft_block_size", counts)):
        for number in sorted(set(found.values())) if len(terms) == 1 else ():
            if all(_nearest_divisor(columns[layer], number) == one for layer, one in found.items()):
                return {**own, name: number, other: 0}
    return {"r": None}


def _nearest_divisor(number: int, wanted: int) -> int:
    """As peft takes it, the lower one of two."""
    divisors = (one for one in range(1, number + 1) if number % one == 0)
    return min(divisors, key=lambda one: (abs(one - wanted), one))


def lora_settings(layers: Mapping[str, tuple[int, float]], modules: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a part's LoRAs, by the rank and alpha of each layer, and the names of all modules.

    Layers are named by the ends of their names: full names differ between versions of transformers.
    """
    (rank, _), (alpha, _) = (Counter(one).most_common(1)[0] for one in zip(*layers.values(), strict=True))
    # By both at once, because older versions of peft look for a layer in both patterns by one key.
    alike = {both: [layer for layer, own in layers.items() if own == both] for both in dict.fromkeys(layers.values())}
    ends = {both: shortest_ends(own, layers) for both, own in alike.items()}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": shortest_ends(layers, modules),
        "rank_pattern": {end: own for (own, _), named in ends.items() if own != rank for end in named},
        "alpha_pattern": {end: own for (_, own), named in ends.items() if own != alpha for end in named},
        "use_dora": False,
        "use_rslora": False,
    }


def shortest_ends(layers: Collection[str], modules: Collection[str]) -> list[str]:
    """The shortest ends of names that fit some layers and no other module."""
    others = {end for name in set(modules).difference(layers) for end in _ends(name)}
    return sorted({next((end for end in _ends(layer) if end not in others), layer) for layer in layers})


def _ends(name: str) -> list[str]:
    """The ends of a name, from its last word to all of it. None begins with a number, which alone says nothing."""
    words = name.split(".")
    return [".".join(words[start:]) for start in reversed(range(len(words))) if not words[start].isdigit()]


def _said(settings: Settings, key: str, pattern: str, layer: str, source: str) -> Any:
    """What settings say of a layer, by the first key of a pattern that its name ends with, or of all layers. peft takes
    regular expressions in patterns, this only names."""
    exceptions = settings.get(pattern) or {}
    if not isinstance(exceptions, dict):
        raise WeightError(f"{source}: {pattern} is not an object; download it again")
    for end, value in exceptions.items():
        if not re.fullmatch(r"\w+(?:\.\w+)*", end):
            raise WeightError(f"{source}: {pattern} {end!r} is not the name of a layer, which is not supported")
        if f".{layer}".endswith(f".{end}") and value is not None:
            return value
    return settings.get(key)

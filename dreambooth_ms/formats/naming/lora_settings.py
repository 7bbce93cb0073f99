"""Rank and alpha of a LoRA as peft and diffusers keep them beside the tensors.

peft writes one set of settings per folder (adapter_config.json), diffusers one per part into the file's metadata; the
names are the same. `rank_pattern` and `alpha_pattern` hold the exceptions by layer.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from dreambooth_ms.errors import WeightError

Settings = Mapping[str, Any]

_LARGEST = 3.4e38
"""Of float32, in which updates are added."""


def settings_alpha(settings: Settings, layer: str, rank: int, source: str) -> float | None:
    """The alpha of a layer by its part's settings, such that its scale is alpha / r; None if they do not say.

    The layer is named without the part; `source` is the file, for the message.

    Raises:
        WeightError: settings that are not numbers, or under which the factors mean something else.
    """
    for method in ("use_dora", "lora_bias"):
        if settings.get(method):
            raise WeightError(f"{source}: trained with {method}, which is not supported; use a LoRA of factors A and B")
    alpha = _said(settings, "lora_alpha", "alpha_pattern", layer, source)
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST:
        raise WeightError(f"{source}: lora_alpha {alpha!r} is not a number; download it again")
    # Rank-stabilised LoRA scales by alpha / sqrt(r) (Kalajdzievski, 2023, eq. 4).
    return float(alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)


def settings_rank(settings: Settings, layer: str, source: str) -> int:
    """The rank of a layer by its part's settings; 0 if they do not say."""
    rank = _said(settings, "r", "rank_pattern", layer, source)
    return rank if isinstance(rank, int) and rank > 0 else 0


def lora_settings(layers: Mapping[str, tuple[int, float]], modules: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a part.

    Layers are named by the ends of their names: full names differ between versions of transformers.

    Args:
        layers: rank and alpha by the layer's public name, without the part.
        modules: the names of all modules of the part.
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
    """What settings say of a layer, by the first key of a pattern that its name ends with, or of all layers.

    peft takes regular expressions in patterns, this only names.
    """
    exceptions = settings.get(pattern) or {}
    if not isinstance(exceptions, dict):
        raise WeightError(f"{source}: {pattern} is not an object; download it again")
    for end, value in exceptions.items():
        if not re.fullmatch(r"\w+(?:\.\w+)*", end):
            raise WeightError(f"{source}: {pattern} {end!r} is not the name of a layer, which is not supported")
        if f".{layer}".endswith(f".{end}") and value is not None:
            return value
    return settings.get(key)

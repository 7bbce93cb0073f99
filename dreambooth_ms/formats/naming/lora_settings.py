"""Rank and alpha of a LoRA as peft and diffusers keep them beside the tensors.

peft writes one set of settings per folder (adapter_config.json), diffusers one per part into the file's metadata; the
names are the same. `rank_pattern` and `alpha_pattern` hold the exceptions by layer.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
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
    alpha = _exception(settings.get("alpha_pattern") or {}, layer, source)
    alpha = settings.get("lora_alpha") if alpha is None else alpha
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST:
        raise WeightError(f"{source}: lora_alpha {alpha!r} is not a number; download it again")
    # Rank-stabilised LoRA scales by alpha / sqrt(r) (Kalajdzievski, 2023, eq. 4).
    return float(alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)


def lora_settings(
    layers: Mapping[str, tuple[int, float]], target_modules: Iterable[str] | None = None
) -> dict[str, Any]:
    """The settings of a part.

    Args:
        layers: rank and alpha by the layer's public name, without the part.
        target_modules: the ends of these names; None for the names themselves.
    """
    rank = Counter(rank for rank, _ in layers.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in layers.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers if target_modules is None else target_modules),
        "rank_pattern": {layer: own for layer, (own, _) in layers.items() if own != rank},
        "alpha_pattern": {layer: own for layer, (_, own) in layers.items() if own != alpha},
        "use_dora": False,
        "use_rslora": False,
        "lora_bias": False,
    }


def _exception(pattern: Any, layer: str, source: str) -> Any:
    """The value of the first key that a layer's name ends with. peft takes regular expressions, this only names."""
    if not isinstance(pattern, dict):
        raise WeightError(f"{source}: alpha_pattern is not an object; download it again")
    for key, value in pattern.items():
        if not re.fullmatch(r"\w+(?:\.\w+)*", key):
            raise WeightError(f"{source}: alpha_pattern {key!r} is not the name of a layer, which is not supported")
        if f".{layer}".endswith(f".{key}"):
            return value
    return None

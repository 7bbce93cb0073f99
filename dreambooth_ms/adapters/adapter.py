"""What a training changes in a frozen model, as a value: for each network, an update for each of some layers.

A kind of update is a formula in `adapters.formulas`, or a class, and a row in `formats.naming.update_kinds`. Here is a
LoRA's: alpha / r * B A
(Hu et al., 2021, section 4.1). Its scale stands in settings beside the tensors, or in the factors for formats whose
readers take it for 1. peft writes one set of settings per folder (adapter_config.json), diffusers one per part into the
file's metadata; the names are the same. `rank_pattern` and `alpha_pattern` hold the exceptions by layer.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dreambooth_ms.adapters.formulas import FormulaUpdate
from dreambooth_ms.adapters.replacement import Replacement
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.naming.lora_formats import PARTS
from dreambooth_ms.formats.naming.update_kinds import ALPHA, DOWN, MAGNITUDE, MID, UP, WEIGHT
from dreambooth_ms.models.specs import Words

if TYPE_CHECKING:
    from mindspore import nn


TRAINED_KEY = "dreambooth_ms_lora"
"""Where a file's metadata keeps rank and alpha as they were trained, if the factors are folded ones."""

Settings = Mapping[str, Any]

_LARGEST = 3.4e38
"""Of float32, in which updates are added."""


class Update(Protocol):
    """What an adapter makes of one layer."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The layer's parameters that it changes, by their names in the layer."""

    def delta(self, value: np.ndarray, parameter: str = "weight") -> np.ndarray:
        """What it adds to one of them, in public form: float32 -> float32 of the same shape.

        Raises:
            WeightError: the update is for a layer of another size.
        """

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds of it, by the names that its kind has in `formats.naming`."""


@dataclass(frozen=True)
class Adapter:
    """An update of each adapted layer, by network and the layer's public name in it; and new words."""

    parts: Mapping[str, Mapping[str, Update]]
    words: Words = field(default_factory=dict)

    @classmethod
    def of(cls, updates: Mapping[str, Update], words: Words | None = None) -> "Adapter":
        """From the updates by part, a dot and the layer's name."""
        parts: dict[str, dict[str, Update]] = {}
        for name in sorted(updates, key=lambda name: PARTS.index(name.partition(".")[0])):
            part, _, layer = name.partition(".")
            parts.setdefault(part, {})[layer] = updates[name]
        return cls(parts, words or {})

    @property
    def updates(self) -> dict[str, Update]:
        """All updates by part, a dot and the layer's name."""
        return {f"{part}.{layer}": update for part, own in self.parts.items() for layer, update in own.items()}


@dataclass(frozen=True)
class LoraUpdate:
    """The update alpha / r * B A of one layer."""

    down: np.ndarray
    """A, (r, I) or (r, I, K, K)."""
    up: np.ndarray
    """B, (O, r) or (O, r, 1, 1)."""
    alpha: float | None = None
    """None means the rank, a scale of 1."""

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> "LoraUpdate":
        """From what a file holds; not every file has an alpha."""
        alpha = tensors.get(ALPHA)
        return cls(tensors[DOWN], tensors[UP], None if alpha is None else float(alpha.reshape(-1)[0]))

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    @property
    def alpha_or_rank(self) -> float:
        """The alpha, which is the rank where it was left open."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha_or_rank / self.rank

    def layer(self, base: "nn.Cell") -> "nn.Cell":
        """The base with A and B beside it."""
        # Here, because files are read and merged without MindSpore, which takes seconds to load.
        from dreambooth_ms.adapters.lora import lora_layer

        layer = lora_layer(base, self.rank, self.alpha_or_rank)
        layer.set_factors(self.down, self.up)
        return layer

    @property
    def parameters(self) -> tuple[str, ...]:
        """The weight alone."""
        return ("weight",)

    def delta(self, value: np.ndarray, parameter: str = "weight") -> np.ndarray:
        """alpha / r * B A in float32: (O, I) or (O, I, K, K)."""
        return FormulaUpdate(self.tensors()).delta(value)

    def tensors(self) -> dict[str, np.ndarray]:
        """A, B and alpha."""
        return {DOWN: self.down, UP: self.up, ALPHA: np.array(self.alpha_or_rank)}


def update_of(tensors: Mapping[str, np.ndarray]) -> Update:
    """The update of a layer's tensors, by their names in `formats.naming.update_kinds`."""
    if WEIGHT in tensors:
        return Replacement.of(tensors)
    is_plain = DOWN in tensors and not {MID, MAGNITUDE} & tensors.keys()
    return LoraUpdate.of(tensors) if is_plain else FormulaUpdate(tensors)


def side_by_side(updates: Sequence[LoraUpdate]) -> LoraUpdate:
    """The sum of the updates of one linear layer as one: their factors side by side, each with its scale in its A."""
    down = np.concatenate([own.down.astype(np.float32) * np.float32(own.scale) for own in updates])
    return LoraUpdate(down, np.concatenate([own.up.astype(np.float32) for own in updates], axis=1))


def folded_adapter(adapter: Adapter) -> Adapter:
    """The same updates with alpha = r and one rank in each network.

    diffusers before 0.34 reads no alpha, and where ranks differ it scales all layers by the rank of one.
    """
    ranks = {part: max(len(own.tensors()[DOWN]) for own in layers.values()) for part, layers in adapter.parts.items()}
    return Adapter({part: {n: folded(o, ranks[part]) for n, o in own.items()} for part, own in adapter.parts.items()})


def folded(update: Update, rank: int = 0) -> LoraUpdate:
    """The same update with alpha = r, and rows and columns of zeros up to a rank.

    B takes the scale, in float32: at 1 no bit changes, and at a power of two nothing is rounded.
    """
    tensors = update.tensors()
    down, up = tensors[DOWN], tensors[UP]
    scale, lacking = float(tensors[ALPHA]) / len(down), max(rank - len(down), 0)
    if scale != 1:
        up = up.astype(np.float32) * np.float32(scale)
    if lacking:
        down = np.pad(down, [(0, lacking), *[(0, 0)] * (down.ndim - 1)])
        up = np.pad(up, [(0, 0), (0, lacking), *[(0, 0)] * (up.ndim - 2)])
    return LoraUpdate(down, up, float(len(down)))


def as_trained(update: LoraUpdate, settings: Settings, layer: str, source: str) -> LoraUpdate:
    """A folded update with the rank and alpha that settings say of its layer; as it is where they do not fit it.

    The update stays the same, but for the rounding of B where the scale is no power of two.

    Raises:
        WeightError: the settings are damaged; `source` is their file, for the message.
    """
    rank = _said(settings, "r", "rank_pattern", layer, source)
    alpha = settings_alpha(settings, layer, update.rank, source)
    fits = isinstance(rank, int) and 0 < rank <= update.rank and update.scale == 1
    if not (fits and alpha) or update.up[:, rank:].any():
        return update
    up = update.up[:, :rank]
    return LoraUpdate(
        update.down[:rank], up if alpha == rank else up.astype(np.float32) / np.float32(alpha / rank), alpha
    )


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

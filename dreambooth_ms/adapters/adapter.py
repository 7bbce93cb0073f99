"""What a training changes in a frozen model, as a value: for each network, an update for each of some layers.

A kind of update is a formula in `adapters.formulas`, or a class, and a row in `formats.naming.update_kinds`. Here is a
LoRA's: alpha / r * B A (Hu et al., 2021, section 4.1). Its scale stands in settings beside the tensors
(`adapters.peft_settings`), or in the factors for formats whose readers take it for 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dreambooth_ms.adapters.formulas import FormulaUpdate
from dreambooth_ms.adapters.replacement import Replacement
from dreambooth_ms.formats.naming.lora_formats import PARTS
from dreambooth_ms.formats.naming.update_kinds import ALPHA, DOWN, MID, UP, WEIGHT, is_decomposed
from dreambooth_ms.models.specs import Words

if TYPE_CHECKING:
    from mindspore import nn


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


class LoraUpdate(FormulaUpdate):
    """The update alpha / r * B A of one layer."""

    def __init__(self, down: np.ndarray, up: np.ndarray, alpha: float | None = None) -> None:
        super().__init__({DOWN: down, UP: up} | ({} if alpha is None else {ALPHA: np.array(alpha)}))

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> "LoraUpdate":
        """From what a file holds; not every file has an alpha."""
        return cls(tensors[DOWN], tensors[UP], FormulaUpdate(tensors).alpha)

    @property
    def down(self) -> np.ndarray:
        """A, (r, I) or (r, I, K, K)."""
        return self.factors[DOWN]

    @property
    def up(self) -> np.ndarray:
        """B, (O, r) or (O, r, 1, 1)."""
        return self.factors[UP]

    def layer(self, base: "nn.Cell") -> "nn.Cell":
        """The base with A and B beside it."""
        # Here, because files are read and merged without MindSpore, which takes seconds to load.
        from dreambooth_ms.adapters.lora import lora_layer

        layer = lora_layer(base, self.rank, self.alpha_or_rank)
        layer.set_factors(self.down, self.up)
        return layer


def update_of(tensors: Mapping[str, np.ndarray]) -> Update:
    """The update of a layer's tensors, by their names in `formats.naming.update_kinds`."""
    if WEIGHT in tensors:
        return Replacement.of(tensors)
    is_plain = DOWN in tensors and not (MID in tensors or is_decomposed(tensors))
    return LoraUpdate.of(tensors) if is_plain else FormulaUpdate(tensors)


def side_by_side(updates: Sequence[LoraUpdate]) -> LoraUpdate:
    """The sum of the updates of one linear layer as one: their factors side by side, each with its scale in its A."""
    down = np.concatenate([own.down.astype(np.float32) * np.float32(own.scale) for own in updates])
    return LoraUpdate(down, np.concatenate([own.up.astype(np.float32) for own in updates], axis=1))


def folded_adapter(adapter: Adapter) -> Adapter:
    """The same updates, where they have A and B with alpha = r and one rank in each network.

    diffusers before 0.34 reads no alpha, and where ranks differ it scales all layers by the rank of one.
    """
    ranks = {part: max(len(u.tensors().get(DOWN, ())) for u in own.values()) for part, own in adapter.parts.items()}
    return Adapter({part: {n: folded(o, ranks[part]) for n, o in own.items()} for part, own in adapter.parts.items()})


def folded(update: Update, rank: int = 0) -> Update:
    """The same update, if it has A and B with alpha = r, and rows and columns of zeros up to a rank.

    B takes the scale, in float32: at 1 no bit changes, and at a power of two nothing is rounded.
    """
    tensors = update.tensors()
    if DOWN not in tensors:
        return update
    down, up = tensors[DOWN], tensors[UP]
    scale, lacking = float(tensors.get(ALPHA, len(down))) / len(down), max(rank - len(down), 0)
    if scale != 1:
        up = up.astype(np.float32) * np.float32(scale)
    if lacking:
        down = np.pad(down, [(0, lacking), *[(0, 0)] * (down.ndim - 1)])
        up = np.pad(up, [(0, 0), (0, lacking), *[(0, 0)] * (up.ndim - 2)])
    return update_of({**tensors, DOWN: down, UP: up, ALPHA: np.array(float(len(down)))})

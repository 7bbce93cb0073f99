"""What a training changes in a frozen model, as a value: for each network, an update for each of some layers.

A LoRA's scale (Hu et al., 2021, section 4.1) stands in its tensors, in settings beside them (`adapters.peft_settings`),
or in the factors for formats whose readers take it for 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.formats.naming.lora_formats import PARTS
from dreambooth_ms.formats.naming.update_kinds import ALPHA, DOWN, UP
from dreambooth_ms.models.specs import Words


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


def side_by_side(updates: Sequence[Update]) -> Update:
    """The sum of the updates of one linear layer as one: their factors side by side, each with its scale in its A."""
    down = np.concatenate([own.down.astype(np.float32) * np.float32(own.scale) for own in updates])
    return Update({DOWN: down, UP: np.concatenate([own.up.astype(np.float32) for own in updates], axis=1)})


def folded_adapter(adapter: Adapter) -> Adapter:
    """The same updates, where they have A and B with alpha = r and one rank in each network. diffusers before 0.34
    reads no alpha, and where ranks differ it scales all layers by the rank of one."""
    ranks = {part: max(len(u.tensors().get(DOWN, ())) for u in own.values()) for part, own in adapter.parts.items()}
    return Adapter({part: {n: folded(o, ranks[part]) for n, o in own.items()} for part, own in adapter.parts.items()})


def folded(update: Update, rank: int = 0) -> Update:
    """The same update, if it has A and B with alpha = r, and rows and columns of zeros up to a rank. B takes the scale,
    in float32: at 1 no bit changes, and at a power of two nothing is rounded."""
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
    return Update({**tensors, DOWN: down, UP: up, ALPHA: np.array(float(len(down)))})

"""A LoRA's update of one layer as a value: alpha / r * B A (Hu et al., 2021, section 4.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.naming.lora_formats import ALPHA, DOWN, UP

if TYPE_CHECKING:
    from mindspore import nn

    from dreambooth_ms.adapters.lora import LoraLayer


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

    @classmethod
    def of_layer(cls, layer: "LoraLayer") -> "LoraUpdate":
        """What a layer that stands in for another adds to it at present."""
        return cls(*layer.factors(), layer.alpha)

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

    def delta(self, weight: np.ndarray) -> np.ndarray:
        """alpha / r * B A in float32: (O, I) or (O, I, K, K)."""
        down, up = self.down.astype(np.float32), self.up.astype(np.float32)
        product = up.reshape(up.shape[0], self.rank) @ down.reshape(self.rank, -1)
        delta = np.float32(self.scale) * product.reshape(up.shape[0], *down.shape[1:])
        if delta.shape != weight.shape:
            raise WeightError(f"the adapter does not fit the base: {delta.shape} for {weight.shape}")
        return delta

    def tensors(self) -> dict[str, np.ndarray]:
        """A, B and alpha."""
        return {DOWN: self.down, UP: self.up, ALPHA: np.array(self.alpha_or_rank)}


def side_by_side(updates: Sequence[LoraUpdate]) -> LoraUpdate:
    """The sum of the updates of one linear layer as one: their factors side by side, each with its scale in its A."""
    down = np.concatenate([own.down.astype(np.float32) * np.float32(own.scale) for own in updates])
    return LoraUpdate(down, np.concatenate([own.up.astype(np.float32) for own in updates], axis=1))

"""What a training changes in a frozen model, as a value: for each network, an update for each of some layers.

A kind of update is a class in a file of its own, and a row in `adapters.file.KINDS` by which it is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dreambooth_ms.formats.naming.lora_formats import PARTS

if TYPE_CHECKING:
    from mindspore import nn


class Update(Protocol):
    """What an adapter makes of one layer."""

    def layer(self, base: "nn.Cell") -> "nn.Cell":
        """The cell that stands in for a layer, with the base's own parameters and names in it.

        Raises:
            WeightError: the update is for a layer of another size.
        """

    def delta(self, weight: np.ndarray) -> np.ndarray:
        """What it adds to the layer's weight, in public form: float32 -> float32 of the same shape.

        Raises:
            WeightError: the update is for a layer of another size.
        """

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds of it, by the names that its kind has in `formats.naming`."""


@dataclass(frozen=True)
class Adapter:
    """An update of each adapted layer, by network and the layer's public name in it."""

    parts: Mapping[str, Mapping[str, Update]]

    @classmethod
    def of(cls, updates: Mapping[str, Update]) -> "Adapter":
        """From the updates by part, a dot and the layer's name."""
        parts: dict[str, dict[str, Update]] = {}
        for name in sorted(updates, key=lambda name: PARTS.index(name.partition(".")[0])):
            part, _, layer = name.partition(".")
            parts.setdefault(part, {})[layer] = updates[name]
        return cls(parts)

    @property
    def updates(self) -> dict[str, Update]:
        """All updates by part, a dot and the layer's name."""
        return {f"{part}.{layer}": update for part, own in self.parts.items() for layer, update in own.items()}

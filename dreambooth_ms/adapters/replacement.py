"""A whole weight in place of a layer's, as Custom Diffusion trains those of cross-attention (Kumari et al., 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.naming.update_kinds import BIAS, WEIGHT

CROSS_ATTENTION: dict[str, tuple[str, ...]] = {
    "crossattn_kv": ("attn2.to_k", "attn2.to_v"),
    "crossattn": ("attn2.to_k", "attn2.to_v", "attn2.to_q", "attn2.to_out.0"),
}
"""The layers of a UNet that are replaced, by the ends of their names."""


@dataclass(frozen=True)
class Replacement:
    """A layer's own weight (O, I), and its bias (O,) where it has one."""

    weight: np.ndarray
    bias: np.ndarray | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> "Replacement":
        """From what a file holds."""
        return cls(tensors[WEIGHT], tensors.get(BIAS))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those that it changes."""
        return tuple(self.tensors())

    def delta(self, value: np.ndarray, parameter: str = WEIGHT) -> np.ndarray:
        """What it adds to a parameter of the base: the difference, float32.

        Raises:
            WeightError: it is for a layer of another size.
        """
        own = self.tensors()[parameter]
        if own.shape != value.shape:
            raise WeightError(f"the adapter does not fit the base: {own.shape} for {value.shape}")
        return own.astype(np.float32) - value

    def tensors(self) -> dict[str, np.ndarray]:
        """Weight and bias."""
        return {WEIGHT: self.weight} | ({} if self.bias is None else {BIAS: self.bias})

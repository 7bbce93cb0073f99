"""A LoRA's scale alpha / r in its factors, for formats whose readers take it for 1; and the way back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dreambooth_ms.adapters.adapter import Adapter, Update
from dreambooth_ms.adapters.lora_update import LoraUpdate
from dreambooth_ms.formats.naming.lora_formats import ALPHA, DOWN, UP
from dreambooth_ms.formats.naming.lora_settings import settings_alpha, settings_rank

TRAINED_KEY = "dreambooth_ms_lora"
"""Where a file's metadata keeps rank and alpha as they were trained, if the factors are folded ones."""


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


def as_trained(update: LoraUpdate, settings: Mapping[str, Any], layer: str, source: str) -> LoraUpdate:
    """A folded update with the rank and alpha that settings say of its layer; as it is where they do not fit it.

    The update stays the same, but for the rounding of B where the scale is no power of two.

    Raises:
        WeightError: the settings are damaged; `source` is their file, for the message.
    """
    rank, alpha = settings_rank(settings, layer, source), settings_alpha(settings, layer, update.rank, source)
    if not (rank and alpha and update.scale == 1 and rank <= update.rank) or update.up[:, rank:].any():
        return update
    up = update.up[:, :rank]
    return LoraUpdate(
        update.down[:rank], up if alpha == rank else up.astype(np.float32) / np.float32(alpha / rank), alpha
    )

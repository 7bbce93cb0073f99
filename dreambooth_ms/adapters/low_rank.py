"""Whole weights as a LoRA: the largest singular values of what they differ by from a base's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dreambooth_ms.adapters.adapter import Adapter, LoraUpdate, Update
from dreambooth_ms.adapters.replacement import BIAS, Replacement
from dreambooth_ms.errors import WeightError, count_of

KEPT = 0.6
"""Of the sum of a layer's singular values: those before the one at which it is reached are kept, as by the authors of
Custom Diffusion; or else the first."""


def as_lora(
    adapter: Adapter, base: Callable[[str], np.ndarray], rank: int | None, source: Path
) -> tuple[Adapter, list[str]]:
    """An adapter whose updates are all LoRAs, and what was lost, in words.

    Args:
        adapter: its updates are whole weights, or LoRAs, which stay as they are.
        base: gives the base's weight of a layer, float32.
        rank: of all updates; None: the singular values decide, of each layer by itself.
        source: where it comes from, for the message.

    Raises:
        WeightError: it has biases, or does not fit the base.
    """
    whole = {layer: own for layer, own in adapter.updates.items() if isinstance(own, Replacement)}
    if biases := sum(BIAS in own.parameters for own in whole.values()):
        raise WeightError(
            f"{source}: a LoRA has no place for its biases (of {count_of(biases, 'layer')}); `merge` makes it part "
            "of a model, with --lora"
        )
    updates, ranks, lost, total = dict[str, Update](adapter.updates), set[int](), 0.0, 0.0
    for layer, own in tqdm(whole.items(), desc="singular values", unit="layer"):
        left, values, right = np.linalg.svd(own.delta(base(layer)), full_matrices=False)
        kept = rank or max(1, int(np.searchsorted(values.cumsum(), KEPT * values.sum())))
        roots = np.sqrt(values[:kept])
        updates[layer] = LoraUpdate(roots[:, None] * right[:kept], left[:, :kept] * roots)
        ranks, lost, total = ranks | {len(roots)}, lost + (values[kept:] ** 2).sum(), total + (values**2).sum()
    of = " to ".join(map(str, sorted({min(ranks), max(ranks)})))
    share = f"{lost / (total or 1):.2%} of the squared norm of what was trained is lost"
    return Adapter.of(updates, adapter.words), [f"As a LoRA it has rank {of}: {share}."]

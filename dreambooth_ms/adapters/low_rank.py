"""Updates of any kind as LoRAs: the largest singular values of what they add to a layer's weight."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.errors import WeightError, count_of
from dreambooth_ms.formats.naming.update_kinds import DOWN, UP

KEPT = 0.6
"""Of the sum of a layer's singular values: those before the one at which it is reached are kept, as by the authors of
Custom Diffusion; or else the first."""


def as_lora(
    adapter: Adapter, base: Callable[[str], np.ndarray], rank: int | None, source: Path
) -> tuple[Adapter, list[str]]:
    """An adapter whose updates are LoRAs of a rank, or of smaller ones that they have, and what was lost, in words.

    Without a rank the singular values of each whole weight decide, and all else stays as it is. `base` gives a layer's
    weight, float32: the base's, where what the update adds depends on it. WeightError if the adapter has biases, or
    does not fit the base.
    """
    changed = {layer: own for layer, own in adapter.updates.items() if is_reduced(own, rank)}
    if biases := sum("bias" in own.parameters for own in changed.values()):
        remedy = "`merge` makes it part of a model, with --lora"
        raise WeightError(f"{source}: a LoRA has no place for its biases (of {count_of(biases, 'layer')}); {remedy}")
    updates, lost = low_rank(list(changed), lambda layer: changed[layer].delta(base(layer)), rank)
    notes = [lost if updates else f"No layer has a larger rank than {rank}: it stays as it is."]
    return Adapter.of({**adapter.updates, **updates}, adapter.words), notes


def is_reduced(update: Update, rank: int | None) -> bool:
    """Whether an update becomes a LoRA of a rank, or of the rank that its singular values decide."""
    return update.is_whole if rank is None else not (update.is_lora and update.rank <= rank)


def low_rank(
    layers: Collection[str], delta: Callable[[str], np.ndarray], rank: int | None, kept_share: float = KEPT
) -> tuple[dict[str, Update], str]:
    """LoRAs of some layers, by the singular values of what is added to them, and what was lost, in words.

    `delta` gives what is added to a weight, (O, I) or (O, I, K, K) float32. The rank is of all, where layers are large
    enough; without one a share of the sum of the singular values decides, greater than 0 and at most 1. WeightError if
    what is added is not finite.
    """
    updates, lost, total = dict[str, Update](), 0.0, 0.0
    for layer in tqdm(layers, desc="singular values", unit="layer"):
        own = delta(layer)
        if not np.isfinite(own).all():
            raise WeightError(f"{layer}: its update is too large for float32; use another checkpoint")
        left, values, right = np.linalg.svd(own.reshape(len(own), -1), full_matrices=False)
        kept = rank or max(1, int(np.searchsorted(values.cumsum(), kept_share * values.sum())))
        roots = np.sqrt(values[:kept])
        down, up = roots[:, None] * right[:kept], left[:, :kept] * roots
        points = tuple(1 for _ in own.shape[2:])
        updates[layer] = Update({DOWN: down.reshape(-1, *own.shape[1:]), UP: up.reshape(*up.shape, *points)})
        lost, total = lost + float((values[kept:] ** 2).sum()), total + float((values**2).sum())
    ranks = {update.rank for update in updates.values()} or {0}
    of = " to ".join(map(str, sorted({min(ranks), max(ranks)})))
    share = f"{lost / (total or 1):.2%} of the squared norm of what was trained is lost"
    return updates, f"As a LoRA it has rank {of}: {share}."

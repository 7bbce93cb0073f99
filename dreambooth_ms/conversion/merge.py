"""LoRAs become part of a model: W + scale * alpha / r * B A (Hu et al., 2021, section 4.1), weight by weight."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dreambooth_ms.adapters.adapter import Update
from dreambooth_ms.adapters.file import OpenedAdapter, open_adapter
from dreambooth_ms.atomic import check_free
from dreambooth_ms.config.commands import MergingConfig
from dreambooth_ms.conversion.convert import describe_adapter, write_model
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DTYPES, DType
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.weights.opened_model import OpenedModel, open_model


def merge(wanted: MergingConfig) -> Iterator[str]:
    """Write a model with LoRAs merged into it.

    Yields:
        what the user should know, line by line; at the end of them it is written.

    Raises:
        WeightError: anything is wrong with a source or the target, or a LoRA is for another model.
    """
    check_free(Path(wanted.target))
    model = open_model(Path(wanted.base), wanted.variant)
    model.check()
    opened = [open_adapter(Path(path), [model.spec], wanted.base).with_alpha(wanted.alpha) for path in wanted.lora]
    for one in opened:
        yield from (f"{one.path}: {note}" for note in (*one.notes, describe_adapter(one)))
    dtype = DTYPES[wanted.dtype] if wanted.dtype else None
    yield from write_model(merged(model, opened, wanted.scale, dtype), wanted)


def merged(
    model: OpenedModel, adapters: Sequence[OpenedAdapter], scale: float, dtype: DType | None = None
) -> OpenedModel:
    """The model with the sum of the adapters, each times `scale`, in its weights; nothing is read yet.

    A weight is summed in float32 and rounded once, to `dtype` or to its own type. With a scale of 0 nothing changes, to
    the bit.

    Raises:
        WeightError: an adapter is for a network that the model does not hold.
    """
    updates: dict[str, list[Update]] = {}
    for opened in adapters:
        lacking = [part for part in opened.adapter.parts if part not in model.parts]
        if lacking:
            raise WeightError(f"{opened.path}: adapts {' and '.join(lacking)}, which {model.path} does not hold")
        for layer, update in opened.adapter.updates.items():
            updates.setdefault(f"{layer}.weight", []).append(update)
    if scale == 0:
        return model
    tensors = dict(model.tensors)
    for name, own in updates.items():
        weight = tensors[name]
        label = f"{weight.label}, merged" if weight.label else ""
        changed = StoredTensor(weight.shape, DType.F32, partial(_sum, weight, own, scale), label=label)
        tensors[name] = changed.cast_to(dtype or weight.dtype)
    return replace(model, tensors=tensors)


def _sum(weight: StoredTensor, updates: Sequence[Update], scale: float) -> np.ndarray:
    base = weight.cast_to(DType.F32).read()
    return sum((np.float32(scale) * own.delta(base) for own in updates), start=base)

"""LoRAs become part of a model: W + scale * alpha / r * B A (Hu et al., 2021, section 4.1), weight by weight."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dreambooth_ms.weights.conversion import (
    DTYPES,
    ProgressBar,
    Tell,
    describe_lora,
    model_format_of,
    write_planned,
)
from dreambooth_ms.weights.files.dtypes import DType
from dreambooth_ms.weights.files.stored import StoredTensor
from dreambooth_ms.weights.model_writing import check_free, plan_model
from dreambooth_ms.weights.naming.lora import Factors
from dreambooth_ms.weights.opened_lora import OpenedLora, open_lora
from dreambooth_ms.weights.opened_model import OpenedModel, open_model


def merge(
    base: Path,
    loras: Sequence[Path],
    target: Path,
    *,
    scale: float,
    form: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    tell: Tell,
    progress: ProgressBar,
) -> None:
    """Write a model with LoRAs merged into it.

    Args:
        base: the model, in any format.
        loras: files or folders of any format and rank; their updates are added up.
        target: the file or folder to write.
        scale: strength of all of them.
        form: the target's format by its name; None where the target's name is enough.
        dtype: fp32, fp16 or bf16; None keeps that of the base.
        variant: which of the files of the base's folder are read.
        prediction_type: what the model predicts, where the base does not tell.
        tell: is given what the user should know, line by line.
        progress: shows how far it is.

    Raises:
        WeightError: anything is wrong with a source or the target, or a LoRA is for another model.
    """
    check_free(target)
    model = open_model(base, variant)
    if prediction_type:
        model = replace(model, prediction_type=prediction_type)
    model.check()
    opened = [open_lora(path, [model.spec]) for path in loras]
    for lora in opened:
        for note in lora.notes:
            tell(f"{lora.path}: {note}")
        tell(f"{lora.path}: {describe_lora(lora)}")
    planned = plan_model(merged(model, opened, scale), model_format_of(target, form), DTYPES[dtype] if dtype else None)
    write_planned(planned, target, tell, progress)


def merged(model: OpenedModel, loras: Sequence[OpenedLora], scale: float) -> OpenedModel:
    """The model with the sum of the LoRAs, each times `scale`, in its weights; nothing is read yet.

    A weight is summed in float32 and rounded once to its own type. With a scale of 0 nothing changes, to the bit.
    """
    updates: dict[str, list[Factors]] = {}
    for lora in loras:
        for layer, factors in lora.factors.items():
            updates.setdefault(f"{layer}.weight", []).append(factors)
    if scale == 0:
        return model
    return replace(model, tensors=_updated(model.tensors, updates, scale))


def _updated(
    tensors: Mapping[str, StoredTensor], updates: Mapping[str, Sequence[Factors]], scale: float
) -> dict[str, StoredTensor]:
    result = dict(tensors)
    for name, factors in updates.items():
        if name in tensors:
            own = tensors[name]
            summed = StoredTensor(own.shape, DType.F32, partial(_sum, own, factors, scale))
            result[name] = summed.cast_to(own.dtype)
    return result


def _sum(weight: StoredTensor, factors: Sequence[Factors], scale: float) -> np.ndarray:
    total = weight.cast_to(DType.F32).read()
    for own in factors:
        total = total + scale * update(own)
    return total


def update(own: Factors) -> np.ndarray:
    """alpha / r * B A in float32, in the shape of the layer's weight: (O, I) or (O, I, K, K)."""
    down, up = own.down.astype(np.float32), own.up.astype(np.float32)
    product = up.reshape(up.shape[0], own.rank) @ down.reshape(own.rank, -1)
    factor = 1.0 if own.alpha is None else own.alpha / own.rank
    return np.float32(factor) * product.reshape(up.shape[0], *down.shape[1:])

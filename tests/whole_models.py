"""Whole models in files: random weights under every name of a published family, at a few thousandths of its size."""

from dataclasses import replace

import numpy as np

from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.weights.files.dtypes import DType
from dreambooth_ms.weights.files.stored import Container, StoredTensor
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.naming.formats import Format
from dreambooth_ms.weights.naming.report import Report
from dreambooth_ms.weights.opened_model import OpenedModel
from tests.small_specs import SMALL

SUFFIXES = {Format.DIFFUSERS: "", Format.STABILITY: ".safetensors", Format.MINDONE: ".ckpt"}


def with_vocabulary(model, size):
    """The model with another number of words in its text encoders, the last of which ends a prompt."""
    encoders = {
        name: replace(getattr(model, name), vocab_size=size, eos_token_id=size - 1)
        for name in ("text_encoder", "text_encoder_2")
        if getattr(model, name)
    }
    return replace(model, **encoders)


def random_model(spec, path, dtype=DType.F32, seed=0, prediction_type="epsilon", parts=None):
    """A model in memory, as if it had been opened at a path."""
    rng = np.random.default_rng(seed)
    shapes = model_shapes(spec)
    there = tuple(dict.fromkeys(name.partition(".")[0] for name in shapes)) if parts is None else parts
    tensors = {}
    for name, shape in shapes.items():
        values = StoredTensor.of(rng.standard_normal(shape, dtype=np.float32) / 8)
        if name.partition(".")[0] in there:
            tensors[name] = values.cast_to(dtype)
    return OpenedModel(
        path=path,
        container=Container.SAFETENSORS,
        form=Format.STABILITY,
        spec=spec,
        tensors=tensors,
        parts=there,
        report=Report(),
        prediction_type=prediction_type,
        averages=0,
    )


def write_model(form, target, family="sd15", **more):
    """Write a random small model in a format; returns its path and the model."""
    model = random_model(SMALL[family], target, **more)
    path = target.with_name(target.name + SUFFIXES[form])
    plan_model(model, form).write(path)
    return path, model


def values_of(tensors):
    """Name -> bytes, of tensors that were not read yet."""
    return {name: (tensor.dtype, tensor.shape, tensor.read().tobytes()) for name, tensor in tensors.items()}

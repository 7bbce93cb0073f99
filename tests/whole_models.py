"""Whole models in files: random weights under every name of a published family, at a few thousandths of its size."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.stored import Container, StoredTensor
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.plan import Report
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import SDXL_BASE, ClipTextSpec, Family, ModelSpec, TransformerSpec, UNetSpec, VaeSpec
from dreambooth_ms.weights import model_writing
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import OpenedModel
from tests.small_specs import SMALL

_TOWER = TransformerSpec(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)
_GELU_TOWER = replace(_TOWER, hidden_act="gelu")
_VAE = VaeSpec(block_out_channels=(32, 32), layers_per_block=1)
_SD1_UNET = UNetSpec(
    block_out_channels=(32, 64),
    has_attention=(True, False),
    num_heads=(8, 8),
    cross_attention_dim=64,
    layers_per_block=1,
)
_SDXL_UNET = replace(
    SDXL_BASE.unet,
    block_out_channels=(32, 64, 64),
    num_heads=(1, 1, 1),
    cross_attention_dim=64 + 128,
    layers_per_block=1,
    transformer_layers_per_block=(1, 2, 2),
    projection_class_embeddings_input_dim=6 * 256 + 128,
)

# Small models that run: their heads and norm groups are those that a single file leaves to its family.
RUNNING = ModelSpec(family=Family.SD1, unet=_SD1_UNET, vae=_VAE, text_encoder=ClipTextSpec(transformer=_TOWER))
RUNNING_SD2 = ModelSpec(
    family=Family.SD2,
    unet=replace(_SD1_UNET, num_heads=(1, 1), use_linear_projection=True, sample_size=96),
    vae=_VAE,
    text_encoder=ClipTextSpec(transformer=_GELU_TOWER),
)
RUNNING_SDXL = ModelSpec(
    family=Family.SDXL,
    unet=_SDXL_UNET,
    vae=replace(_VAE, scaling_factor=SDXL_BASE.vae.scaling_factor),
    text_encoder=ClipTextSpec(transformer=_TOWER),
    # Of another width than the first, because diffusers distinguishes them by it.
    text_encoder_2=ClipTextSpec(
        transformer=replace(_GELU_TOWER, hidden_size=128, num_attention_heads=2), projection_dim=128
    ),
)

SUFFIXES = {Format.DIFFUSERS: "", Format.STABILITY: ".safetensors", Format.MINDONE: ".ckpt"}


def random_model(spec, path, dtype=DType.F32, seed=0, prediction_type="epsilon", parts=None):
    """A model in memory, as if it had been opened at a path."""
    rng = np.random.default_rng(seed)
    shapes = model_shapes(spec)
    there = tuple(dict.fromkeys(name.partition(".")[0] for name in shapes)) if parts is None else parts
    tensors = {}
    for name, shape in shapes.items():
        if name.partition(".")[0] in there:
            tensors[name] = StoredTensor.of(_start_value(name, shape, rng)).cast_to(dtype)
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


def _start_value(name, shape, rng):
    """Random, and such that nothing grows or vanishes on its way through the networks."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return noise / 8 + np.float32("norm" in name and name.endswith(".weight"))
    return noise / np.sqrt(np.prod(shape[1:]), dtype=np.float32)


def write_model(form, target, family="sd15", **more):
    """Write a random small model in a format; returns its path and the model."""
    model = random_model(SMALL[family], target, **more)
    path = target.with_name(target.name + SUFFIXES[form])
    plan_model(model, form).write(path)
    return path, model


def write_in_shards(model, target, most_bytes):
    """Write a model folder whose files hold at most so many bytes of values."""
    with pytest.MonkeyPatch.context() as patch:
        write = partial(model_writing.write_sharded_safetensors, max_shard_bytes=most_bytes)
        patch.setattr(model_writing, "write_sharded_safetensors", write)
        plan_model(model, Format.DIFFUSERS).write(target)


def tokenizer_folders(bundle):
    """The folders that the tokenizers of a bundle are read from."""
    return [reader.tokenizer.args[0] for reader in bundle.text]


def roles_of(bundle):
    """What a bundle says of its networks, as plain values."""
    specs = [bundle.denoiser.spec, bundle.codec.spec, bundle.schedule.trained(), bundle.schedule.config]
    return [*specs, *((reader.name, reader.spec) for reader in bundle.text)]


def digests_of(bundle):
    """The digest of each network of a bundle."""
    model = bundle.opened()
    return {part: model.network(part, dict).digest() for part in model.parts}


def values_of(tensors):
    """Name -> bytes, of tensors that were not read yet."""
    return {name: (tensor.dtype, tensor.shape, tensor.read().tobytes()) for name, tensor in tensors.items()}

"""What a file or folder is, in lines for people."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from dreambooth_ms.adapters.file import OpenedAdapter, holds_adapter
from dreambooth_ms.conversion.convert import open_lora
from dreambooth_ms.errors import WeightError, count_of, show_names
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.model_config import read_latent_settings
from dreambooth_ms.formats.naming.lora_formats import ALPHA, DOWN, UP
from dreambooth_ms.formats.naming.recognise import with_channels
from dreambooth_ms.models.specs import PUBLISHED_MODELS, ModelSpec, UNetSpec, VaeSpec
from dreambooth_ms.weights.opened_model import OpenedModel, open_lone_vae, open_model

LONGEST_VALUE = 200
"""Characters of a metadata value that are shown."""

PREDICTIONS = {"epsilon": "noise (epsilon)", "v_prediction": "velocity (v_prediction)"}


def describe_source(path: Path, base: str | None = None, variant: str | None = None) -> Iterator[str]:
    """One line per fact about a model, a LoRA or an autoencoder; what takes reading all values comes last.

    Args:
        path: a file or folder in any format that is read.
        base: the model that a LoRA is for, where its sizes are not those of a published one.
        variant: which of the files of a folder are looked at.

    Raises:
        WeightError: no such file, damaged, or none of these; says what it is instead where it is known.
    """
    if holds_adapter(path):
        yield from _adapter(open_lora(path, base))
        return
    describe: Callable[[OpenedModel], Iterator[str]] = _model
    try:
        found = open_model(path, variant)
    except WeightError as error:
        try:
            found, describe = open_lone_vae(path), _lone_vae
        except WeightError:
            raise error from None
    yield from describe(found)
    broken = [name for name, tensor in found.tensors.items() if not tensor.is_finite()]
    if broken:
        yield f"NaN or infinity: in {len(broken)} tensors ({show_names(broken)})"


def _model(model: OpenedModel) -> Iterator[str]:
    yield f"format: {model.form.value}, {model.container.value}"
    sizes = "" if _sizes(model.spec) in map(_sizes, PUBLISHED_MODELS) else ", not in a published size"
    yield f"family: {model.spec.family.value}{sizes}"
    snr = ", zero terminal SNR" if model.zero_snr else ""
    yield f"predicts: {PREDICTIONS.get(model.prediction_type or '', model.prediction_type or 'not told')}{snr}"
    dtypes = [f"{dtype.value} ({count_of(count, 'tensor')})" for dtype, count in model.dtypes.items()]
    yield f"dtype: {', '.join(dtypes)}"
    for part in model.parts:
        own = model.of_part(part)
        yield f"{part}: {_parameters(own.values())}{_size_of(part, model.spec)}"
    if model.averages:
        yield f"moving averages (EMA): of {count_of(model.averages, 'weight')}"
    yield from _metadata(model.metadata)
    missing = [f"the whole {part}" for part in model.missing_parts]
    if model.report.fits:
        yield f"missing: {'; '.join(missing) or 'nothing'}"
        try:
            model.check_configurations()
        except WeightError as error:
            yield f"does not fit: {error}"
    else:
        yield f"does not fit: {'; '.join([*missing, model.report.summary()])}"
    yield from (f"note: {note}" for note in model.notes)


def _sizes(model: ModelSpec) -> ModelSpec:
    """The model without what other models of the same sizes have otherwise: its use and the scale of its latents."""
    return with_channels(replace(model, vae=replace(model.vae, **read_latent_settings({}, 0))), 4, 4)


def _size_of(part: str, model: ModelSpec) -> str:
    """What is peculiar to a network of its kind."""
    spec = getattr(model, part)
    if isinstance(spec, UNetSpec):
        return f", channels {'-'.join(map(str, spec.block_out_channels))}, text of width {spec.cross_attention_dim}"
    if isinstance(spec, VaeSpec):
        own = ", mean and deviation of their own" if spec.latents_mean else ""
        return f", scale of the latents {spec.scaling_factor:g}{own}"
    return f", {count_of(spec.transformer.num_hidden_layers, 'layer')} of width {spec.transformer.hidden_size}"


def _adapter(opened: OpenedAdapter) -> Iterator[str]:
    parts = {part: [own.tensors() for own in layers.values()] for part, layers in opened.adapter.parts.items()}
    layers = list(chain(*parts.values()))
    yield f"format: LoRA, {opened.form.value}, {opened.container.value}"
    yield f"family: {opened.families}"
    yield f"dtype: {opened.dtype.value}"
    yield f"rank: {', '.join(map(str, sorted({len(tensors[DOWN]) for tensors in layers})))}"
    yield f"alpha: {', '.join(f'{alpha:g}' for alpha in sorted({float(tensors[ALPHA]) for tensors in layers}))}"
    for part, own in parts.items():
        count = sum(tensors[DOWN].size + tensors[UP].size for tensors in own)
        yield f"{part}: {count_of(count, 'parameter')} in {count_of(len(own), 'layer')}"
    yield from _metadata(opened.metadata)
    yield "missing: nothing"
    yield from (f"note: {note}" for note in opened.notes)


def _lone_vae(vae: OpenedModel) -> Iterator[str]:
    yield f"format: autoencoder alone, {vae.form.value}, {vae.container.value}"
    yield f"dtype: {', '.join(dtype.value for dtype in vae.dtypes)}"
    channels = "-".join(map(str, vae.spec.vae.block_out_channels))
    yield f"vae: {_parameters(vae.tensors.values())}, channels {channels}"
    yield "missing: nothing" if vae.report.fits else f"does not fit: {vae.report.summary()}"


def _parameters(tensors: Collection[StoredTensor]) -> str:
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return f"{count_of(parameters, 'parameter')} in {count_of(len(tensors), 'tensor')}"


def _metadata(metadata: Mapping[str, str]) -> Iterator[str]:
    for name, value in metadata.items():
        shown = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}… ({len(value)} characters)"
        yield f"metadata {name}: {shown}".replace("\n", " ")

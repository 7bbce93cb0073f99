"""Any format -> any other, of models and adapters alike: what a source is, which format a target asks for, and the way
between, on which adapters may become part of a model, weight by weight.

What writes yields what the user should know, line by line; when these end it is written. A WeightError says what is
wrong with a source or the target, of which then nothing is left.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.file import NAMED_FORMATS, PEFT_CONFIG, OpenedAdapter, holds_adapter, open_adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.low_rank import as_lora, is_reduced, low_rank
from dreambooth_ms.adapters.word_files import joined_words, word_file, write_words
from dreambooth_ms.adapters.writing import write_adapter, write_replacements, writing_notes
from dreambooth_ms.atomic import check_free, new_folder
from dreambooth_ms.config.commands import ConversionConfig, ExtractionConfig, MergingConfig
from dreambooth_ms.config.load import Setting, read_file
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import WeightError, count_of, show_names
from dreambooth_ms.formats.files.dtypes import DTYPES, DType
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.folder_layout import read_json
from dreambooth_ms.formats.model_config import read_latent_settings
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import AdapterFormat, LoraFormat, OtherFormat, lora_layers
from dreambooth_ms.formats.naming.recognise import with_channels
from dreambooth_ms.formats.naming.update_kinds import BESIDE, needs_base, title_of
from dreambooth_ms.models.specs import FAMILIES, PUBLISHED_MODELS, ModelSpec, T5Spec, UNetSpec, VaeSpec, Words
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import OpenedModel, open_lone_vae, open_model

MODEL_FORMATS = {form.value: form for form in Format}
LORA_FORMATS = {form.name.lower(): form for form in LoraFormat}
ADAPTER_FORMATS: dict[str, AdapterFormat] = {**LORA_FORMATS, **{form.name.lower(): form for form in OtherFormat}}
"""As users name them."""

EXTENSIONS: Mapping[Format | AdapterFormat, tuple[str, ...]] = {
    **dict.fromkeys([*LoraFormat, OtherFormat.CUSTOM_DIFFUSION], ("", ".safetensors")),
    **dict.fromkeys([Format.DIFFUSERS, LoraFormat.PEFT, OtherFormat.EMBEDDING], ("",)),
    **dict.fromkeys([Format.MINDONE, LoraFormat.MINDONE], (".ckpt",)),
    Format.STABILITY: (".safetensors",),
}
"""What names of files in a format may end in; a folder in nothing."""

RUN_CONFIG = "config.yaml"
"""The configuration of a run, beside what it writes."""

LONGEST_VALUE = 200
"""Characters of a metadata value that are shown."""

_TRAINED = {
    "on": "ss_sd_model_name", "which is": "ss_base_model_version", "at": "modelspec.resolution", "steps": "ss_steps",
    "by": "modelspec.trigger_phrase", "words": "modelspec.tags",
}  # fmt: skip
"""What of an adapter's metadata tells the most."""

PREDICTIONS = {"epsilon": "noise (epsilon)", "v_prediction": "velocity (v_prediction)"}

Form = TypeVar("Form", Format, AdapterFormat)


def convert(wanted: ConversionConfig) -> Iterator[str]:
    """Write the model or the LoRA of a source in another format."""
    source, target = Path(wanted.source), Path(wanted.target)
    check_free(target)
    kind, of_others = "model", ("alpha", "base", "rank")
    if is_adapter := holds_adapter(source):
        kind, of_others = "LoRA", ("variant", "use_ema", "prediction_type")
    if given := [f"--{flag}" for flag in of_others if getattr(wanted, flag)]:
        raise WeightError(f"{source}: this is a {kind}; leave out {', '.join(given)}")
    if not is_adapter:
        yield from write_model(open_model(source, wanted.variant, wanted.use_ema), wanted)
        return
    opened = open_lora(source, wanted.base).with_alpha(wanted.alpha)
    words_alone = None if opened.adapter.parts else OtherFormat.EMBEDDING.name.lower()
    form = adapter_format_of(target, wanted.format or words_alone)
    adapter, lost = _fitting_adapter(form, opened, wanted)
    yield from _write_adapter(replace(opened, adapter=adapter, form=form), target, wanted.dtype, [*opened.notes, *lost])


def extract(wanted: ExtractionConfig) -> Iterator[str]:
    """Write a LoRA of what a model differs by from the one that it was trained from; WeightError also if the two are of
    different sizes, or do not differ."""
    target = Path(wanted.target)
    check_free(target)
    base, tuned = (open_model(Path(path)) for path in (wanted.base, wanted.tuned))
    for model in (base, tuned):
        model.check()
    weights, form = lora_layers(base.spec), adapter_format_of(target, wanted.format)
    if weights != lora_layers(tuned.spec):
        raise WeightError(f"{tuned.path}: has layers of other sizes than {base.path}; name the base that it is made of")
    pairs = {name: (own, base.tensors[name]) for name, own in tuned.tensors.items() if name in base.tensors}
    changed = [name for name, pair in tqdm(pairs.items(), desc="comparing", unit="tensor") if _differ(*pair)]
    layers = [layer for layer in weights if f"{layer}.weight" in changed]
    if not layers:
        raise WeightError(f"{tuned.path}: its layers are those of {base.path}: there is nothing to extract")

    def delta(layer: str) -> np.ndarray:
        one, other = (tensor.cast_to(DType.F32).read() for tensor in pairs[f"{layer}.weight"])
        return one - other

    updates, lost = low_rank(layers, delta, wanted.rank, wanted.extract_ratio or 1.0)
    notes, others = [lost], [name for name in changed if name.removesuffix(".weight") not in updates]
    if others:
        notes += [f"A LoRA has no place for {count_of(len(others), 'tensor')} that differ, too ({show_names(others)})."]
    dtype, adapter = pairs[f"{layers[0]}.weight"][0].dtype, Adapter.of(updates)
    opened = OpenedAdapter(tuned.path, tuned.container, form, (base.spec,), adapter, dtype, {})
    yield from _write_adapter(opened, target, wanted.dtype, notes)


def _differ(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether tensors are more than the same numbers, rounded to the type of either."""
    return one.shape != other.shape or not any(
        np.array_equal(one.cast_to(dtype).read(), other.cast_to(dtype).read()) for dtype in {one.dtype, other.dtype}
    )


def _write_adapter(opened: OpenedAdapter, target: Path, dtype_name: str | None, notes: Sequence[str]) -> Iterator[str]:
    """Write an adapter in its format, with its words."""
    adapter, form, dtype = opened.adapter, opened.form, DTYPES[dtype_name] if dtype_name else opened.dtype
    is_file = bool(target.suffix) and target.suffix in EXTENSIONS[form]
    for word in adapter.words if is_file else ():
        check_free(word_file(target.parent, word), "another folder")
    with nullcontext(target) if is_file else new_folder(target) as place:
        if isinstance(form, LoraFormat):
            write_adapter(adapter, place, form, opened.model, dtype, opened.metadata, source=opened.path)
        elif form is OtherFormat.CUSTOM_DIFFUSION:
            write_replacements(adapter.parts["unet"], place, dtype, opened.metadata)
        write_words(adapter.words, target.parent if is_file else place, dtype, {})
    yield from (*notes, *(writing_notes(adapter, form) if isinstance(form, LoraFormat) else ()))
    yield f"wrote {target}: {describe_adapter(opened)}"


def _fitting_adapter(form: AdapterFormat, opened: OpenedAdapter, wanted: ConversionConfig) -> tuple[Adapter, list[str]]:
    """An adapter as a format can hold it, and what was lost, in words."""
    source, adapter, rank = opened.path, opened.adapter, wanted.rank
    whole = {own.is_whole for own in adapter.updates.values()}
    reduced = {layer for layer, own in adapter.updates.items() if is_reduced(own, rank)}
    if whole and (reduced or rank) and isinstance(form, LoraFormat):
        base, shapes = wanted.base or trained_base(source) or "", lora_layers(opened.model)
        needs = any(needs_base(adapter.updates[layer].factors) for layer in reduced)
        if needs and not os.path.exists(base):
            raise WeightError(f"{source}: its weights become a LoRA by what they add to its base; name it with --base")
        tensors = open_model(Path(base)).tensors if needs else {}

        def weight(layer: str) -> np.ndarray:
            if needs_base(adapter.updates[layer].factors):
                return tensors[f"{layer}.weight"].cast_to(DType.F32).read()
            return np.zeros(shapes[layer], np.float32)

        return as_lora(adapter, weight, rank, source)
    if rank and not isinstance(form, LoraFormat):
        raise WeightError(f"{source}: --rank is for what becomes a LoRA; leave it out")
    if form is OtherFormat.CUSTOM_DIFFUSION and whole != {True}:
        raise WeightError(f"{source}: holds no whole weights, as Custom Diffusion's files do; choose another --format")
    if form is OtherFormat.EMBEDDING and whole:
        raise WeightError(f"{source}: changes layers, too, which an embedding cannot; choose another --format")
    if form is not OtherFormat.EMBEDDING and not whole:
        raise WeightError(f"{source}: holds words alone; write them with --format embedding")
    return adapter, []


def merge(wanted: MergingConfig) -> Iterator[str]:
    """Write a model with LoRAs merged into it; WeightError also if one is for another model."""
    check_free(Path(wanted.target))
    model = open_model(Path(wanted.base), wanted.variant)
    model.check()
    opened = [open_adapter(Path(path), [model.spec], wanted.base).with_alpha(wanted.alpha) for path in wanted.lora]
    for one in opened:
        yield from (f"{one.path}: {note}" for note in (*one.notes, describe_adapter(one)))
    dtype = DTYPES[wanted.dtype] if wanted.dtype else None
    words = joined_words({str(one.path): one.adapter for one in opened})
    yield from write_model(merged(model, opened, wanted.scale, dtype), wanted, words)


def merged(
    model: OpenedModel, adapters: Sequence[OpenedAdapter], scale: float, dtype: DType | None = None
) -> OpenedModel:
    """The model with the sum of the adapters, each times `scale`, in its weights; nothing is read yet.

    A weight is summed in float32 and rounded once, to `dtype` or to its own type. With a scale of 0 nothing changes, to
    the bit. WeightError if an adapter is for a network that the model does not hold.
    """
    updates: dict[tuple[str, str], list[Update]] = {}
    for opened in adapters:
        if lacking := [part for part in opened.adapter.parts if part not in model.parts]:
            raise WeightError(f"{opened.path}: adapts {' and '.join(lacking)}, which {model.path} does not hold")
        for layer, update in opened.adapter.updates.items():
            for parameter in update.parameters:
                updates.setdefault((layer, parameter), []).append(update)
    if scale == 0:
        return model
    tensors = dict(model.tensors)
    for (layer, parameter), own in updates.items():
        base = tensors[f"{layer}.{parameter}"]
        label = f"{base.label}, merged" if base.label else ""
        changed = StoredTensor(base.shape, DType.F32, partial(_sum, base, parameter, own, scale), label=label)
        tensors[f"{layer}.{parameter}"] = changed.cast_to(dtype or base.dtype)
    return replace(model, tensors=tensors)


def _sum(stored: StoredTensor, parameter: str, updates: Sequence[Update], scale: float) -> np.ndarray:
    base = stored.cast_to(DType.F32).read()
    return sum((np.float32(scale) * own.delta(base, parameter) for own in updates), start=base)


def open_lora(path: Path, base: str | None) -> OpenedAdapter:
    """Open a LoRA; `base` is the model that it is for, None if that is published or what trained it says it. Raises as
    `open_adapter` and `open_model`."""
    if base:
        return open_adapter(path, [open_model(Path(base)).spec], base)
    models: tuple[ModelSpec, ...] = PUBLISHED_MODELS
    said, otherwise = trained_base(path), "if its base has sizes of its own, name it with --base"
    if said and os.path.exists(said):
        models = tuple(dict.fromkeys((*models, open_model(Path(said)).spec)))
    elif said:
        otherwise = f"its own base, {said}, is not on this machine; name one of the same sizes with --base"
    return open_adapter(path, models, otherwise=otherwise)


def trained_base(path: Path) -> str | None:
    """The base of an adapter's file or folder, a path or the name on a hub: of the run that it is of, or PEFT's."""
    said = run_setting(path, "pretrained_model_name_or_path")
    with suppress(WeightError):
        said = said or read_json(_beside(path, PEFT_CONFIG)).get("base_model_name_or_path")
    return said if said and isinstance(said, str) else None


def run_setting(path: Path, name: str) -> Any:
    """What the run of an adapter's file or folder has under a name; None if it is of none, or that says nothing."""
    file = _beside(path, RUN_CONFIG)
    settings = read_file(Setting("config", str(file)), TrainConfig) if os.path.isfile(file) else []
    return next((one.value for one in settings if one.name == name), None)


def _beside(path: Path, name: str) -> Path:
    return (path if os.path.isdir(path) else path.parent) / name


def write_model(
    model: OpenedModel, wanted: ConversionConfig | MergingConfig, words: Words | None = None
) -> Iterator[str]:
    """Write a model as it is asked for, with new words and a progress bar."""
    target = Path(wanted.target)
    if wanted.prediction_type:
        model = replace(model, prediction_type=wanted.prediction_type)
    form, dtype = model_format_of(target, wanted.format), DTYPES[wanted.dtype] if wanted.dtype else None
    if words and form is not Format.DIFFUSERS:
        raise WeightError(f"{target}: a single file has no place for new words ({', '.join(words)}); name a folder")
    planned = replace(plan_model(model, form, dtype), words=words or {})
    model.check_configurations()
    planned.check_place(target)
    yield from (*planned.model.notes, *planned.notes)
    with tqdm(total=planned.byte_count, desc="writing", unit="B", unit_scale=True) as bar:
        planned.write(target, bar.update)
    kind = f"{planned.model.spec.family.value} with {', '.join(planned.model.parts)}"
    yield f"wrote {target}: {kind}, {planned.byte_count / 1e6:,.1f} MB"


def describe_adapter(opened: OpenedAdapter) -> str:
    """The adapter in a few words."""
    adapter = opened.adapter
    layers = [f"{count_of(len(adapter.updates), 'layer')} of {', '.join(adapter.parts)}"] if adapter.parts else []
    return f"{opened.kind} of {' and '.join([*layers, *adapter.words])} of {opened.families}"


def model_format_of(target: Path, form: str | None) -> Format:
    """The format of a model that a target's name and the user ask for; WeightError if they do not fit each other, or
    that is not written."""
    if fitting := _fitting(target, form, MODEL_FORMATS, "for LoRAs only; for a model"):
        return fitting[0]
    remedy = "end it in .safetensors or .ckpt (MindSpore), or give the name of a folder without an extension"
    raise WeightError(f"{target}: {target.suffix} is no kind of file that is written; {remedy}")


def adapter_format_of(target: Path, form: str | None) -> AdapterFormat:
    """The same of an adapter; WeightError also if the name leaves it open."""
    fitting = _fitting(target, form, ADAPTER_FORMATS, "for models only; for a LoRA")
    if len(fitting) == 1:
        return fitting[0]
    if target.name in NAMED_FORMATS:
        return NAMED_FORMATS[target.name]
    open_ended = "peft or diffusers" if not target.suffix else "kohya or diffusers"
    raise WeightError(f"{target}: may be {open_ended}; say which with --format ({', '.join(ADAPTER_FORMATS)})")


def _fitting(target: Path, form: str | None, formats: Mapping[str, Form], otherwise: str) -> list[Form]:
    """The format that the user names, or those that the target's name leaves open."""
    if form and form not in formats:
        raise WeightError(f"--format {form}: {otherwise} choose one of {', '.join(formats)}")
    if target.suffix in (".bin", ".pt", ".pth"):
        raise WeightError(f"{target}: PyTorch's pickles can run code and are not written; end it in .safetensors")
    # A folder has no extension, though its name may have a dot in it, as `sd-v1.5`.
    extension = target.suffix if not target.suffix[1:2].isdigit() else ""
    fitting = {name: one for name, one in formats.items() if extension in EXTENSIONS[one]}
    if form and form not in fitting:
        kinds = (f"a file that ends in {one}" if one else "a folder" for one in EXTENSIONS[formats[form]])
        raise WeightError(f"{target}: --format {form} is written to {' or '.join(kinds)}; name one")
    return [formats[form]] if form else list(fitting.values())


def describe_source(path: Path, base: str | None = None, variant: str | None = None) -> Iterator[str]:
    """One line per fact about a model, a LoRA or an autoencoder; what takes reading all values comes last.

    `base` is the model that a LoRA is for, `variant` says which of a folder's files are looked at. WeightError if it is
    not there, damaged, or none of these: says what it is instead where that is known.
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
    if broken := [name for name, tensor in found.tensors.items() if not tensor.is_finite()]:
        yield f"NaN or infinity: in {len(broken)} tensors ({show_names(broken)})"


def _model(model: OpenedModel) -> Iterator[str]:
    yield f"format: {model.form.value}, {model.container.value}"
    is_known = model.spec.family.value not in FAMILIES or _sizes(model.spec) in map(_sizes, PUBLISHED_MODELS)
    sizes = "" if is_known else ", not in a published size"
    yield f"family: {model.spec.family.value}{sizes}"
    snr, said = ", zero terminal SNR" if model.zero_snr else "", model.prediction_type or "not told"
    yield f"predicts: {PREDICTIONS.get(said, said)}{snr}"
    yield "dtype: " + ", ".join(f"{own.value} ({count_of(count, 'tensor')})" for own, count in model.dtypes.items())
    for part in model.parts:
        yield f"{part}: {_parameters(model.of_part(part).values())}{_size_of(part, model.spec)}"
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
    spec = getattr(model, part)
    if isinstance(spec, UNetSpec):
        return f", channels {'-'.join(map(str, spec.block_out_channels))}, text of width {spec.text_width}"
    if isinstance(spec, VaeSpec):
        own = ", mean and deviation of their own" if spec.latents_mean else ""
        return f", scale of the latents {spec.scaling_factor:g}{own}"
    if isinstance(spec, T5Spec):
        return f", {count_of(spec.num_layers, 'layer')} of width {spec.d_model}"
    return f", {count_of(spec.transformer.num_hidden_layers, 'layer')} of width {spec.transformer.hidden_size}"


def _adapter(opened: OpenedAdapter) -> Iterator[str]:
    adapter, of_lora = opened.adapter, f", {opened.form.value}" if isinstance(opened.form, LoraFormat) else ""
    yield f"format: {opened.kind.removeprefix('a ')}{of_lora}, {opened.container.value}"
    yield f"family: {opened.families}"
    yield f"dtype: {opened.dtype.value}"
    if loras := [own for own in adapter.updates.values() if own.rank]:
        yield f"rank: {', '.join(map(str, sorted({own.rank for own in loras})))}"
        yield f"alpha: {', '.join(f'{alpha:g}' for alpha in sorted({own.alpha_or_rank for own in loras}))}"
    if adapter.parts:
        yield f"updates: {'; '.join(_kinds(adapter))}"
    for part, layers in adapter.parts.items():
        tensors = chain.from_iterable(own.tensors().items() for own in layers.values())
        count = count_of(sum(value.size for name, value in tensors if name not in BESIDE), "parameter")
        replaced = dict.fromkeys(n.rpartition("attn2.")[2] for n, own in layers.items() if own.is_whole)
        of = f" in place of the model's own: {', '.join(replaced)} of cross-attention" if replaced else ""
        yield f"{part}: {count} in {count_of(len(layers), 'layer')}{of}"
    for word, own in adapter.words.items():
        yield f"word {word}: " + ", ".join(f"{count_of(len(v), 'vector')} for {name}" for name, v in own.items())
    if trained := [f"{word} {opened.metadata[name]}" for word, name in _TRAINED.items() if name in opened.metadata]:
        yield f"trained: {', '.join(trained)}".replace("\n", " ")
    yield from _metadata(opened.metadata)
    yield "missing: nothing"
    yield from (f"note: {note}" for note in opened.notes)


def _kinds(adapter: Adapter) -> Iterator[str]:
    """Each kind of its updates, with ranks and alphas, and of how many layers it is."""
    kinds = dict[str, list[Update]]()
    for own in adapter.updates.values():
        kinds.setdefault(title_of(own.factors), []).append(own)
    for title, updates in kinds.items():
        scaled = [own for own in updates if own.rank]
        said = ("rank", {float(own.rank) for own in scaled}), ("alpha", {own.alpha_or_rank for own in scaled})
        listed = (f", {word} {', '.join(f'{n:g}' for n in sorted(own))}" for word, own in said if own)
        yield f"{title}{''.join(listed)}: {count_of(len(updates), 'layer')}"


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

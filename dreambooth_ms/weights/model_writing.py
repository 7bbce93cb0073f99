"""An opened model -> a file or folder in another format, tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.atomic import check_free, check_room, check_writable, new_folder
from dreambooth_ms.errors import UserError, WeightError, count_of
from dreambooth_ms.formats import folder_layout
from dreambooth_ms.formats.clip_tokenizer import add_words, pad_tokens, write_clip_tokenizer
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.mindspore_ckpt import write_mindspore_ckpt
from dreambooth_ms.formats.files.safetensors_file import write_safetensors, write_sharded_safetensors
from dreambooth_ms.formats.files.stored import Container, Progress, StoredTensor, TensorFile, total_bytes
from dreambooth_ms.formats.folder_layout import CONFIG, INDEX, SCHEDULER, TOKENIZERS, write_json
from dreambooth_ms.formats.model_config import NETWORK_READERS, Config, read_scheduler_config
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.plan import Assembly, WritePlan
from dreambooth_ms.models.specs import FAMILIES, TABLE, Family, Words
from dreambooth_ms.weights import opened_model
from dreambooth_ms.weights.opened_model import OpenedModel, model_of


@dataclass(frozen=True)
class ModelTarget:
    """What a file or folder of a model will hold. Nothing is read or written yet."""

    model: OpenedModel
    form: Format
    tensors: Mapping[str, StoredTensor]
    """By the names of the format, in the order of writing; in a folder behind the part and a dot."""
    notes: tuple[str, ...]
    metadata: Mapping[str, str]
    """Of a safetensors file."""
    words: Words = field(default_factory=dict)
    """New ones, which a folder gets besides."""

    @property
    def byte_count(self) -> int:
        """Size of the tensors."""
        return total_bytes(self.tensors)

    def check_place(self, path: Path) -> None:
        """Find out before the work whether the file or folder can be written; WeightError if not."""
        check_free(path)
        check_writable(path.parent)
        check_room(path, self.byte_count)

    def write(self, path: Path, progress: Progress | None = None) -> None:
        """Write the file or folder, of a name that is not taken; it appears whole or not at all. See `check_place`."""
        self.check_place(path)
        if self.form is Format.DIFFUSERS:
            with new_folder(path) as folder:
                self.write_parts(folder, progress)
        elif self.form is Format.MINDONE:
            write_mindspore_ckpt(path, self.tensors, progress)
        else:
            write_safetensors(path, self.tensors, self.metadata, progress)

    def write_parts(self, folder: Path, progress: Progress | None = None) -> None:
        """Write what makes a folder a model, with weights of those networks that have tensors here."""
        model = self.model
        if model.container is Container.FOLDER:
            _copy_the_rest(model, folder)
        else:
            write_json(folder / INDEX, model.configuration(INDEX))
            for encoder, pad_token in pad_tokens(model.spec).items():
                if pad_token and encoder in model.parts:
                    write_clip_tokenizer(folder / TOKENIZERS[encoder], pad_token)
        for name in model.configuration_names:
            write_json(folder / name, model.configuration(name))
        written = replace(model, tensors=self.tensors)
        if self.words:
            readers = [part for part in model.parts if part in TOKENIZERS]
            tables = {part: _with_words(written, part, self.words, folder) for part in readers}
            named = {f"{part}.{TABLE}.weight": table for part, table in tables.items()}
            written = replace(written, tensors={**self.tensors, **named})
        for part in model.parts:
            if own := written.of_part(part):
                stem = folder_layout.WEIGHT_NAMES[part]
                write_sharded_safetensors(folder / part, stem, own, {"format": "pt"}, progress=progress)


def plan_model(model: OpenedModel, form: Format, dtype: DType | None = None) -> ModelTarget:
    """What a model's file or folder in a format will hold; all floats in one type, or each in its own.

    Raises:
        WeightError: names are missing, unexpected, mis-shaped or there twice.
    """
    model.check()
    if form is not Format.DIFFUSERS and model.spec.family.value not in FAMILIES:
        raise WeightError(f"{model.path}: {model.spec.family.value} is kept in folders alone; name one as the target")
    plan = naming_of(form, model.spec).write_plan(list(model.tensors), model.parts)
    plan.report.check(str(model.path), f"a model of {model.spec.family.value}")
    tensors = {
        name: _assembled(assembly, [model.tensors[piece] for piece in assembly.pieces], dtype)
        for name, assembly in plan.tensors.items()
    }
    default = dtype or next(iter(model.dtypes))
    for name, value in plan.constants.items():
        tensors[name] = StoredTensor.of(np.array(value, np.float32)).cast_to(default)
    metadata: dict[str, str] = {}
    if form is Format.STABILITY:
        tensors |= _marks(model)
        metadata = _metadata(model)
    keys: tuple[str, ...] = ()
    if form is not Format.DIFFUSERS:
        configurations, keys = _unsaid(model, TensorFile(model.path, Container.SAFETENSORS, tensors, metadata))
        metadata |= {opened_model.CONFIGURATIONS_METADATA: json.dumps(configurations)} if configurations else {}
    return ModelTarget(model, form, tensors, tuple(_notes(model, form, plan, keys)), metadata)


def _unsaid(model: OpenedModel, file: TensorFile) -> tuple[dict[str, Config], tuple[str, ...]]:
    """What readers of a file would take otherwise of the model in it: its configurations that the file does not tell,
    by their paths in a folder; and the keys of them that matter, each behind its part."""
    read = model_of(file)
    # Where a file does not tell what it predicts, readers are told so.
    read = replace(read, prediction_type=read.prediction_type or model.assumed_prediction)
    kept: dict[str, Config] = {}
    keys: list[str] = []
    for name in model.configuration_names:
        part = name.partition("/")[0]
        own, other = model.configuration(name), read.configuration(name)
        differing = _differing(NETWORK_READERS.get(part, read_scheduler_config), own, other)
        # Schedulers have a class, and settings that no spec holds.
        if differing or (name == SCHEDULER and own != other):
            kept[name] = own
        keys += [f"{part} {key}" for key in differing]
    return kept, tuple(keys)


def _differing(read: Callable[[Config], Any], own: Config, guessed: Config) -> list[str]:
    settings, guesses = ({k: v for k, v in config.items() if not k.startswith("_")} for config in (own, guessed))
    if settings == guesses:
        return []
    try:
        one, other = (asdict(read(config)) for config in (own, guessed))
    except (UserError, KeyError):
        return ["config.json"]
    if one.keys() != other.keys():  # Schedules of another formulation.
        return ["config.json"]
    one, other = (spec | spec.pop("transformer", {}) for spec in (one, other))
    # The number of the end token is told by the vocabulary; old configurations say 2.
    keys = [key for key in one if one[key] != other[key] and key != "eos_token_id"]
    spacings = [config.get("timestep_spacing", "leading") for config in (own, guessed)]
    return keys if spacings[0] == spacings[1] else [*keys, "timestep_spacing"]


def _marks(model: OpenedModel) -> dict[str, StoredTensor]:
    """What single files say of themselves in tensors: where other tools look for it."""
    vae, marks = model.spec.vae, {}
    if model.spec.family is Family.SDXL and model.prediction_type == "v_prediction":
        marks["v_pred"] = np.zeros(0, np.float32)
    if model.zero_snr:
        marks[opened_model.ZERO_SNR] = np.zeros(0, np.float32)
    if vae.latents_mean and vae.latents_std:
        statistics = zip(opened_model.LATENT_STATISTICS, (vae.latents_mean, vae.latents_std), strict=True)
        marks |= {name: np.array(values, np.float32).reshape(1, -1, 1, 1) for name, values in statistics}
    return {name: StoredTensor.of(values) for name, values in marks.items()}


def _assembled(assembly: Assembly, pieces: Sequence[StoredTensor], dtype: DType | None) -> StoredTensor:
    """A tensor of a file, made of public ones; of floats, in `dtype` if it is named."""
    own = dtype if dtype and pieces[0].dtype.is_float else pieces[0].dtype
    pieces = [piece.cast_to(own) for piece in pieces]
    # Where files have its bytes in their order.
    in_order = assembly.layout.keeps_order and not assembly.shared and all(piece.ranges for piece in pieces)
    ranges = tuple(one for piece in pieces for one in piece.ranges) if in_order else ()
    shape = assembly.shape([piece.shape for piece in pieces])
    # Those that are read have been looked at.
    label = pieces[0].label if ranges else ""
    return StoredTensor(shape, own, lambda: assembly.build([piece.read() for piece in pieces]), ranges, label)


def _with_words(model: OpenedModel, part: str, words: Words, folder: Path) -> StoredTensor:
    """A text encoder's table with new words, which its tokenizer and configuration in a folder are told of."""
    table, rows = model.tensors[f"{part}.{TABLE}.weight"], np.concatenate([own[part] for own in words.values()])
    counts = {word: len(own[part]) for word, own in words.items()}
    first, end = add_words(folder / TOKENIZERS[part], counts, table.shape[0])
    size, config = max(table.shape[0], first + len(rows)), CONFIG.format(part)
    write_json(folder / config, {**model.configuration(config), "vocab_size": size, "eos_token_id": end})
    own = StoredTensor.of(rows, label=f"new words of {part}").cast_to(table.dtype)

    def load() -> np.ndarray:
        before = table.read()
        return np.concatenate([before[:first], own.read(), before[first + len(rows) :]])

    return StoredTensor((size, *table.shape[1:]), table.dtype, load)


def _copy_the_rest(model: OpenedModel, folder: Path) -> None:
    """Tokenizers, the scheduler and whatever else a folder has, but networks. Weights of other components lose their
    variant's name, so that the copy loads without naming one."""
    index = model.configuration(INDEX)
    there = {path.name for path in model.path.iterdir() if path.is_dir()}
    for name in sorted(there & index.keys() - set(folder_layout.NETWORKS)):
        shutil.copytree(model.path / name, folder / name, dirs_exist_ok=True)
        for variant in folder_layout.variants(path.name for path in (folder / name).iterdir()):
            for path in (folder / name).glob(f"*.{variant}.*"):
                path.replace(path.with_name(path.name.replace(f".{variant}.", ".")))
    components = [name for name, of in index.items() if isinstance(of, list)]
    absent = [name for name in components if name not in (there - {*folder_layout.NETWORKS}).union(model.parts)]
    write_json(folder / INDEX, {**index, **dict.fromkeys(absent, folder_layout.ABSENT)})


def _metadata(model: OpenedModel) -> dict[str, str]:
    """What other tools look for in a single file."""
    kept = {name: value for name, value in model.metadata.items() if name != opened_model.CONFIGURATIONS_METADATA}
    return kept | model_spec(model.spec.family, model.prediction_type) | {"format": "pt"}


def model_spec(family: Family, predicts: str | None, kind: str = "") -> dict[str, str]:
    """What Stability's ModelSpec 1.0.0 has for a model of a family, or for a `kind` of adapter of it (`/lora`)."""
    architecture = FAMILIES[family.value]["architecture"]
    if family is Family.SD2 and predicts:
        architecture += "-768-v" if predicts == "v_prediction" else "-512"
    own = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture + kind}
    return own | ({opened_model.PREDICTION_METADATA: {"v_prediction": "v"}.get(predicts, predicts)} if predicts else {})


def _notes(model: OpenedModel, form: Format, plan: WritePlan, unsaid_keys: Sequence[str]) -> Iterator[str]:
    if model.averages:
        yield f"{count_of(model.averages, 'moving average')} (EMA) not written; --use_ema takes them for the weights."
    if plan.left_out:
        shown, count = ", ".join(plan.left_out[:3]), count_of(len(plan.left_out), "tensor")
        yield f"The target has no place for {count} that no network here reads ({shown})."
    keys = ", ".join(unsaid_keys)
    if keys and form is Format.MINDONE:
        yield f"A MindSpore checkpoint has no place for {keys}: keep the source."
    elif keys:
        yield f"A single file has no place for {keys}: they are in its metadata, which other programs do not read."
    if model.missing_parts:
        yield f"It has no {', '.join(model.missing_parts)}, and neither has the target."
    if model.prediction_type is None and form is Format.DIFFUSERS and not model.spec.vae.latents_mean:
        yield f"The scheduler says {model.assumed_prediction}; --prediction_type says otherwise."
    if form is not Format.DIFFUSERS and None in pad_tokens(model.spec).values():
        yield "Its words are not CLIP's, and a file has no place for its tokenizer: keep the source."
    if form is Format.DIFFUSERS and model.container is not Container.FOLDER:
        lacking = [name for name, token in pad_tokens(model.spec).items() if name in model.parts and token is None]
        if lacking:
            own = ", ".join(TOKENIZERS[encoder] for encoder in lacking)
            yield f"Its words are not CLIP's: put the model's own {own} into the folder."

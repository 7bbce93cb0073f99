"""An adapter in a file or folder of any format, opened: which layers of which model it adapts, with its updates; and
the new words beside them, or alone.

A file of safetensors, MindSpore or PyTorch; a folder with `pytorch_lora_weights.safetensors` or Custom Diffusion's, or
with one adapter of any name; a folder of PEFT, or one with a folder of PEFT for each network. In a folder embeddings of
new words may stand beside it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.peft_settings import TRAINED_KEY, as_set, as_trained
from dreambooth_ms.adapters.word_files import fitted_words, read_words
from dreambooth_ms.errors import WeightError, count_of, show_names
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file, read_value
from dreambooth_ms.formats.files.stored import Container, TensorFile
from dreambooth_ms.formats.folder_layout import INDEX, read_json
from dreambooth_ms.formats.naming.lora_formats import PARTS, LoraFormat, LoraPlan, OtherFormat, recognise_lora
from dreambooth_ms.formats.naming.recognise import other_kind
from dreambooth_ms.formats.naming.update_kinds import ALPHA, DOWN, rank_of, title_of
from dreambooth_ms.models.specs import PUBLISHED_MODELS, Family, ModelSpec

FILE_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"
"""The same LoRA in kohya's names, beside the other one, which is read."""
CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.safetensors"
NAMED_FORMATS: Mapping[str, LoraFormat | OtherFormat] = {
    FILE_NAME: LoraFormat.DIFFUSERS,
    CUSTOM_DIFFUSION: OtherFormat.CUSTOM_DIFFUSION,
}
"""By the names that diffusers gives to their files."""
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps rank and alpha, in a file's metadata."""
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

TWICE_KEY, TEXT_LEVEL = "dreambooth_ms_twice", "base_model.model.text_model."
"""In the metadata of a file of PEFT whose tensors stand in it twice, the second time without `text_model.` as
transformers has them from 5.6 on; and what the first begin with."""

_PRECISION = (DType.F64, DType.F32, DType.BF16, DType.F16)
"""From the one that holds the most to the one that holds the least."""


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter in a file or folder. Its updates are in memory; bfloat16 came as float32."""

    path: Path
    container: Container
    form: LoraFormat | OtherFormat
    models: tuple[ModelSpec, ...]
    """The models that it fits: several if it adapts only what these have in common."""
    adapter: Adapter
    dtype: DType
    """The widest of its tensors' types."""
    metadata: Mapping[str, str]

    @property
    def model(self) -> ModelSpec:
        """The model whose layers it adapts."""
        return self.models[0]

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if isinstance(self.form, OtherFormat):
            return self.form.value
        titles = dict.fromkeys(title_of(own.tensors()) for own in self.adapter.updates.values())
        return "a LoRA" if titles.keys() == {"LoRA"} else " and ".join(titles)

    @property
    def families(self) -> str:
        """The families that it fits, in words."""
        return " or ".join(dict.fromkeys(model.family.value for model in self.models))

    @property
    def notes(self) -> list[str]:
        """What is assumed of the layers whose alpha stands neither in the tensors nor beside them."""
        ranked = [own for own in self.adapter.updates.values() if own.rank]
        silent = sum(own.alpha is None for own in ranked)
        ranks = ", ".join(map(str, sorted({own.rank for own in ranked})))
        said = (
            f"no alpha in the file for {silent} of {count_of(len(ranked), 'layer')}: it is taken as the rank ({ranks})."
        )
        if self.form is LoraFormat.MINDONE and self.model.family in (Family.SD1, Family.SD2):
            said = "mindone's SD LoRAs have a scale of 1: alpha is the rank."
        return [said] if silent else []

    def with_alpha(self, alpha: float | None) -> "OpenedAdapter":
        """The adapter with an alpha for the layers whose file does not hold one; None leaves it at the rank."""
        if alpha is None:
            return self
        updates = self.adapter.updates
        silent = {name: own for name, own in updates.items() if own.rank and own.alpha is None}
        known = {name: Update({**own.factors, ALPHA: np.array(alpha)}) for name, own in silent.items()}
        return replace(self, adapter=Adapter.of(updates | known, self.adapter.words))


def holds_adapter(path: Path) -> bool:
    """Whether a file or folder has the names of an adapter, of whatever kind, or a folder several such files."""
    kinds = () if os.path.isfile(path / INDEX) else map(_kind, _weights(path))
    return bool(_peft_folders(path)) or any(kind in (*_ADAPTERS, OtherFormat.EMBEDDING.value) for kind in kinds)


_ADAPTERS = ("a LoRA", OtherFormat.CUSTOM_DIFFUSION.value)
"""Kinds of files that change layers."""


def _kind(file: Path) -> str:
    """What a file is by its names; empty for one that cannot be read."""
    with suppress(WeightError):
        return other_kind(open_tensor_file(file).tensors)
    return ""


def open_adapter(
    path: Path, models: Iterable[ModelSpec] = PUBLISHED_MODELS, base: str | Path | None = None, otherwise: str = ""
) -> OpenedAdapter:
    """Recognise an adapter and read it.

    `models` are those that it may be for; the place of the only one, and what to do if none fits, are for the message.

    Raises:
        WeightError: no such file, damaged, no adapter, one by another method, or one that fits none of the models.
    """
    candidates, files = tuple(models), []
    updates, words = dict[str, Update](), dict[str, list[np.ndarray]]()
    for name, (part, folder) in _files(path).items():
        said = read_json(folder / PEFT_CONFIG) if folder else None
        file = open_tensor_file(name)
        is_twice = TWICE_KEY in file.metadata
        shapes = {n: tensor.shape for n, tensor in file.tensors.items() if not is_twice or n.startswith(TEXT_LEVEL)}
        parts = (part,) if part else None
        plan = recognise_lora(shapes, str(file.path), candidates, parts, str(base or ""), otherwise)
        candidates = plan.models
        settings = _diffusers_settings(file.metadata) if said is None else dict.fromkeys(PARTS, said)
        updates |= _updates(plan, file, settings, str(folder / PEFT_CONFIG if folder else file.path))
        words |= {word: words.get(word, []) + rows for word, rows in read_words(file).items()}
        files.append(file)
    candidates, named = fitted_words(words, candidates, path)
    _check_finite(named, str(path))
    if not (updates or named):
        raise WeightError(f"{path}: this is {plan.form.value} that changes nothing of a model; download it again")
    dtypes = {tensor.dtype for file in files for name, tensor in file.tensors.items() if not name.endswith(".alpha")}
    return OpenedAdapter(
        path=path,
        container=Container.FOLDER if len(files) > 1 or _peft_folders(path) else files[0].container,
        form=plan.form,
        models=candidates,
        adapter=Adapter.of(updates, named),
        dtype=next((dtype for dtype in _PRECISION if dtype in dtypes), DType.F32),
        metadata={name: value for file in files for name, value in file.metadata.items()},
    )


def _updates(
    plan: LoraPlan, file: TensorFile, settings: Mapping[str, Mapping[str, Any]], source: str
) -> dict[str, Update]:
    """By part, a dot and the layer's name; one without an alpha of its own has that of the part's settings."""
    for factor, slot in ((factor, slot) for slots in plan.layers.values() for factor, slot in slots.items()):
        dtype = file.tensors[slot.name].dtype
        if (factor not in (ALPHA, "ia3_on_input") and not dtype.is_float) or dtype is DType.BOOL:
            raise WeightError(f"{file.path}: {slot.name} holds {dtype.value}, not numbers of a LoRA; download it again")
    factors = plan.read(lambda name: read_value(file.tensors[name]))
    _check_finite(factors, str(file.path))
    updates, trained = dict[str, Update](), _diffusers_settings(file.metadata, TRAINED_KEY)
    for name, own in factors.items():
        (part, _, layer), is_told = name.partition("."), DOWN not in own or ALPHA in own
        if plan.form is OtherFormat.CUSTOM_DIFFUSION:
            updates[name] = Update(own if is_told else {**own, ALPHA: np.array(rank_of(own))})
            continue
        as_said = as_set(own, settings[part], layer, source)
        updates[name] = Update(as_said if is_told else as_trained(as_said, trained[part], layer, source))
    return updates


def _check_finite(factors: Mapping[str, Mapping[str, np.ndarray]], source: str) -> None:
    """Stop at NaN, infinity, and what float32 cannot hold."""
    named = ((f"{layer}.{name}", value) for layer, tensors in factors.items() for name, value in tensors.items())
    if bad := [name for name, value in named if not np.abs(value).max(initial=0) <= np.finfo(np.float32).max]:
        raise WeightError(
            f"{source}: NaN or infinity in {len(bad)} of its tensors ({show_names(bad)}): the training that wrote it "
            "failed, or the file is damaged; use an earlier checkpoint, or download it again"
        )


def _diffusers_settings(metadata: Mapping[str, str], where: str = METADATA_KEY) -> dict[str, dict[str, Any]]:
    """Settings by part, as diffusers puts them into a file's metadata; empty where there are none."""
    try:
        content = json.loads(metadata[where])
    except (KeyError, ValueError, RecursionError):
        content = None
    named = [(*key.partition("."), value) for key, value in content.items()] if isinstance(content, dict) else []
    return {part: {key: value for own, _, key, value in named if own == part} for part in PARTS}


def _files(path: Path) -> dict[Path, tuple[str | None, Path | None]]:
    """The files that a file or folder means, those of PEFT with part and folder; an adapter's after its words'."""
    weights, peft = _weights(path), _peft_folders(path)
    if len(weights) == 1 and not peft:
        return {weights[0]: (None, None)}
    kinds = {file: _kind(file) for file in weights}
    # Of a word in .bin and in .safetensors the latter. One that cannot be read is refused when it is opened.
    damaged = [file for file, kind in kinds.items() if not kind and f"{file.stem[:1]}{file.stem[-1:]}" == "<>"]
    words = {file.stem: file for file, kind in kinds.items() if kind == OtherFormat.EMBEDDING.value or file in damaged}
    named = [file for file in weights if file.stem in (Path(FILE_NAME).stem, Path(CUSTOM_DIFFUSION).stem)]
    own = [] if peft else named[-1:] or [file for file, kind in kinds.items() if kind in _ADAPTERS]
    if len(own) > 1:
        listed = show_names([file.name for file in own])
        raise WeightError(f"{path}: holds {len(own)} adapters ({listed}); name one of these files")
    if not (peft or own or words):
        listed = show_names(sorted(file.name for file in path.glob("*"))) or "nothing"
        raise WeightError(f"{path}: holds no LoRA, such as {FILE_NAME} (found: {listed}); is the download complete?")
    of_peft = {_peft_weights(folder): (part, folder) for part, folder in peft.items()}
    return {**dict.fromkeys((*words.values(), *own), (None, None)), **of_peft}


def _weights(path: Path) -> list[Path]:
    """The file, or the files of tensors in a folder."""
    if not os.path.isdir(path):
        return [path]
    return [file for file in sorted(path.glob("[!.]*")) if file.suffix in _SUFFIXES]


def _peft_folders(path: Path) -> dict[str | None, Path]:
    """Part -> its folder of PEFT; the part is None where one folder says nothing of it. Empty if there is none."""
    if os.path.isfile(path / PEFT_CONFIG):
        return {None: path}
    return {part: path / part for part in PARTS if os.path.isfile(path / part / PEFT_CONFIG)}


def _peft_weights(folder: Path) -> Path:
    for name in PEFT_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise WeightError(f"{folder}: {PEFT_WEIGHTS[0]} is missing; is the download complete?")

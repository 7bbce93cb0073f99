"""A LoRA in any format, opened: which layers of which model it adapts, with its factors by public name."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.adapters.lora_file import FILE_NAME, METADATA_KEY, LoraWeights, read_lora
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.stored import Container, StoredTensor, TensorFile
from dreambooth_ms.formats.folder_layout import read_json
from dreambooth_ms.formats.naming.lora import Factors, LoraLayer, LoraPlan, read_factors, recognise_lora
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.formats.naming.lora_settings import settings_alpha
from dreambooth_ms.formats.naming.recognise import other_kind
from dreambooth_ms.models.specs import PUBLISHED_MODELS, ModelSpec

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PARTS = ("unet", "text_encoder", "text_encoder_2")

_PRECISION = (DType.F64, DType.F32, DType.BF16, DType.F16)
"""From the one that holds the most to the one that holds the least."""


@dataclass(frozen=True)
class OpenedLora:
    """A LoRA in a file or folder. Its factors are in memory; bfloat16 came as float32."""

    path: Path
    container: Container
    form: LoraFormat
    model: ModelSpec
    """The model whose layers it adapts."""
    families: tuple[str, ...]
    """The families that it fits: several if it adapts only what these have in common."""
    factors: Mapping[str, Factors]
    """By part, a dot and the layer's public name. An alpha of None is the rank."""
    dtype: DType
    """The widest of its factors' types."""
    notes: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def parts(self) -> list[str]:
        """The networks that it adapts."""
        held = {layer.partition(".")[0] for layer in self.factors}
        return [part for part in PARTS if part in held]

    def with_alpha(self, alpha: float | None) -> "OpenedLora":
        """The LoRA with an alpha for the layers whose file does not hold one; None leaves it at the rank."""
        if alpha is None:
            return self
        told = {name: own if own.alpha is not None else replace(own, alpha=alpha) for name, own in self.factors.items()}
        return replace(self, factors=told, notes=())

    def of_part(self, part: str) -> dict[str, Factors]:
        """The factors of a network, by the layers' names in it."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): own for name, own in self.factors.items() if name.startswith(prefix)}


def holds_lora(path: Path) -> bool:
    """Whether a file or folder can be opened and has the names of a LoRA, of whatever kind."""
    try:
        return bool(_peft_folders(path)) or other_kind(open_tensor_file(lora_path(path)).tensors) == "a LoRA"
    except WeightError:
        return False


def lora_path(path: Path) -> Path:
    """The file that is meant by a folder that a training wrote."""
    return path / FILE_NAME if path.is_dir() else path


def open_lora(path: Path, models: Iterable[ModelSpec] = PUBLISHED_MODELS) -> OpenedLora:
    """Recognise a LoRA and read it.

    Args:
        path: a file, a folder with `pytorch_lora_weights.safetensors`, or a folder of PEFT: of one network, or with a
            folder for each.
        models: the models it may be for.

    Raises:
        WeightError: no such file, damaged, no LoRA, one by another method, or one that fits none of the models.
    """
    models = list(models)
    folders = _peft_folders(path)
    if folders:
        return _open_peft(path, folders, models)
    file = open_tensor_file(lora_path(path))
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    found = recognise_lora(shapes, str(file.path), models)
    settings = _diffusers_settings(file.metadata)
    factors = {}
    for name, own in _factors(found.plan, file).items():
        part, _, layer = name.partition(".")
        if own.alpha is None and part in settings:
            own = replace(own, alpha=settings_alpha(settings[part], layer, own.rank, str(file.path)))
        factors[name] = own
    families = tuple(dict.fromkeys(model.family.value for model in found.models))
    return _opened(path, file.container, found.plan, families, factors, [file])


def read_adapters(path: Path, base: Callable[[], ModelSpec]) -> dict[str, LoraWeights]:
    """The adapters of each network from a LoRA of any format, for a base.

    Args:
        path: a file or folder.
        base: gives the base's model, which is asked for where a file's own names and settings are not enough.

    Raises:
        WeightError: no such file, no LoRA, or one for another model.
    """
    try:
        return read_lora(path)
    except WeightError:
        if not holds_lora(path):
            raise
    lora = open_lora(path, [base()])
    return {part: _adapter(lora.of_part(part)) for part in lora.parts}


def _adapter(factors: Mapping[str, Factors]) -> LoraWeights:
    """The factors of a network with one rank and one alpha for all: where these differ, scales go into A, and layers
    of smaller rank get rows and columns of zeros.
    """
    scales = {(own.rank, float(own.rank if own.alpha is None else own.alpha)) for own in factors.values()}
    pairs = {name: (own.down.astype(np.float32), own.up.astype(np.float32)) for name, own in factors.items()}
    rank, alpha = max(scales)
    if len(scales) > 1:
        alpha = float(rank)
        pairs = {name: _padded(pair, factors[name], rank) for name, pair in pairs.items()}
    return LoraWeights(pairs, rank, alpha, tuple(pairs))


def _padded(pair: tuple[np.ndarray, np.ndarray], own: Factors, rank: int) -> tuple[np.ndarray, np.ndarray]:
    down, up = pair
    down = down * np.float32(1.0 if own.alpha is None else own.alpha / own.rank)
    more = rank - own.rank
    around = [(0, 0)] * (down.ndim - 2)
    return np.pad(down, [(0, more), (0, 0), *around]), np.pad(up, [(0, 0), (0, more), *around])


def _opened(
    path: Path,
    container: Container,
    plan: LoraPlan,
    families: Sequence[str],
    factors: Mapping[str, Factors],
    files: Sequence[TensorFile],
) -> OpenedLora:
    metadata = {name: value for file in files for name, value in file.metadata.items()}
    dtypes = {tensor.dtype for file in files for name, tensor in file.tensors.items() if not name.endswith(".alpha")}
    return OpenedLora(
        path=path,
        container=container,
        form=plan.form,
        model=plan.model,
        families=tuple(families),
        factors=factors,
        dtype=next((dtype for dtype in _PRECISION if dtype in dtypes), DType.F32),
        notes=tuple(_notes(plan, factors)),
        metadata=metadata,
    )


def _notes(plan: LoraPlan, factors: Mapping[str, Factors]) -> list[str]:
    """What is assumed of the layers whose alpha stands neither in the tensors nor beside them."""
    unsaid = {name: replace(plan.layers[name], alpha=None) for name, own in factors.items() if own.alpha is None}
    said = {name: replace(plan.layers[name], alpha="") for name in factors.keys() - unsaid.keys()}
    return replace(plan, layers=unsaid | said).notes()


def _factors(plan: LoraPlan, file: TensorFile) -> dict[str, Factors]:
    tensors = file.tensors
    for layer in plan.layers.values():
        for name in (layer.down.name, layer.up.name):
            if not tensors[name].dtype.is_float:
                raise WeightError(f"{file.path}: {name} holds whole numbers, not factors; download it again")
    return read_factors(
        plan, lambda name: _as_numbers(tensors[name]).read(), lambda name: _number(file.path, name, tensors[name])
    )


def _as_numbers(tensor: StoredTensor) -> StoredTensor:
    """Values that can be calculated with: numpy has no bfloat16."""
    return tensor.cast_to(DType.F32) if tensor.dtype is DType.BF16 else tensor


def _number(path: Path, name: str, tensor: StoredTensor) -> float:
    value = float(_as_numbers(tensor).read().reshape(-1)[0])
    if not math.isfinite(value):
        raise WeightError(f"{path}: {name} is {value}, which is no scale; download it again")
    return value


def _diffusers_settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Settings by part, as diffusers puts them into a file's metadata; empty if there are none."""
    try:
        content = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError, RecursionError):
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        part, _, key = name.partition(".")
        settings.setdefault(part, {})[key] = value
    return settings


def _peft_folders(path: Path) -> dict[str | None, Path]:
    """Part -> its folder of PEFT; the part is None where one folder says nothing of it. Empty if there is none."""
    if (path / PEFT_CONFIG).is_file():
        return {None: path}
    return {part: path / part for part in PARTS if (path / part / PEFT_CONFIG).is_file()}


def _open_peft(path: Path, folders: Mapping[str | None, Path], models: Sequence[ModelSpec]) -> OpenedLora:
    factors: dict[str, Factors] = {}
    layers: dict[str, LoraLayer] = {}
    files, families = [], []
    candidates = list(models)
    for part, folder in folders.items():
        settings = read_json(folder / PEFT_CONFIG)
        file = open_tensor_file(_peft_weights(folder))
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        found = recognise_lora(shapes, str(file.path), candidates, (part,) if part else None)
        candidates = [model for model in candidates if model in found.models]
        for name, own in _factors(found.plan, file).items():
            alpha = settings_alpha(settings, name.partition(".")[2], own.rank, str(folder / PEFT_CONFIG))
            factors[name] = replace(own, alpha=alpha)
        layers |= found.plan.layers
        families = list(dict.fromkeys(model.family.value for model in found.models))
        files.append(file)
    plan = replace(found.plan, model=candidates[0], layers=layers)
    return _opened(path, Container.FOLDER, plan, families, factors, files)


def _peft_weights(folder: Path) -> Path:
    found = next((folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise WeightError(f"{folder}: {PEFT_WEIGHTS[0]} is missing; is the download complete?")
    return found

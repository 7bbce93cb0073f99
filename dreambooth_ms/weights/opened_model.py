"""A model in any format, opened: what it is, and its tensors by public name, none of which has been read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.byte_ranges import FileRange
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.stored import Container, StoredTensor, TensorFile
from dreambooth_ms.formats.folder_layout import INDEX, NETWORKS, SCHEDULER, read_json, weight_file
from dreambooth_ms.formats.model_config import Config, read_config, read_latent_settings
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.plan import ReadPlan
from dreambooth_ms.formats.naming.recognise import recognise_model
from dreambooth_ms.formats.naming.report import Report
from dreambooth_ms.formats.naming.slots import Slot
from dreambooth_ms.models.specs import PLAYGROUND_25_VAE, Family, ModelSpec

LATENT_STATISTICS = ("edm_mean", "edm_std")
"""Where Playground v2.5's single file has the mean and the deviation of its latents, by channel."""

PREDICTION_METADATA = "modelspec.prediction_type"
"""Where single files say what they predict, by the Stability ModelSpec: "epsilon" or "v"."""

ABSENT = [None, None]
"""What model_index.json says of a part that is not there."""

_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class OpenedModel:
    """A model in a file or folder."""

    path: Path
    container: Container
    """Of the file, or FOLDER."""
    form: Format
    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]
    """By public name, in the order of the model."""
    parts: tuple[str, ...]
    """The networks that are there."""
    report: Report
    """What does not fit the family's names."""
    prediction_type: str | None
    """"epsilon" or "v_prediction"; None if nothing tells."""
    averages: int
    """How many moving averages (EMA) are there besides the weights."""
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    """The files that hold the tensors."""

    @property
    def dtypes(self) -> dict[DType, int]:
        """The element types, with the number of tensors of each, the most frequent first."""
        counts: dict[DType, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def missing_parts(self) -> list[str]:
        """The networks that the family has and the file has not."""
        absent = {part for part in ("text_encoder", "text_encoder_2") if getattr(self.spec, part) is None}
        return [part for part in NETWORKS if part not in self.parts and part not in absent]

    def of_part(self, part: str) -> dict[str, StoredTensor]:
        """The tensors of a network by their names in it."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): own for name, own in self.tensors.items() if name.startswith(prefix)}

    def check(self) -> None:
        """Stop if a network is not whole, or there are tensors that belong to none.

        Raises:
            WeightError: missing, unexpected, mis-shaped and duplicate names, with their counts.
        """
        self.report.check(str(self.path), f"a model of {self.spec.family.value} in the naming of {self.form.value}")


def open_model(path: Path, variant: str | None = None, use_averages: bool = False) -> OpenedModel:
    """Recognise a model and open it; its tensors are not read, and misfits are in its report.

    Args:
        path: a folder in diffusers' layout, or a file.
        variant: which of the files in a folder; None for the plain ones, or for the only variant.
        use_averages: take the moving averages (EMA) of the weights that have them.

    Raises:
        WeightError: no such file, damaged, or no model of a family that is known.
    """
    if path.is_dir():
        return _open_folder(path, variant)
    file = open_tensor_file(path)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    found = recognise_model(shapes, str(path))
    if found.form is Format.DIFFUSERS:
        raise WeightError(f"{path}: a file with the names of a folder in diffusers' layout; split it by its parts")
    parts = tuple(found.naming.present_parts(shapes))
    plan = found.naming.read_plan(shapes, parts, use_averages)
    if use_averages and not plan.averages:
        raise WeightError(f"{path}: holds no moving averages (EMA) of its weights; leave out --use_ema")
    said = _PREDICTIONS.get(file.metadata.get(PREDICTION_METADATA, ""))
    return OpenedModel(
        path=path,
        container=file.container,
        form=found.form,
        spec=_with_latent_statistics(found.model, file),
        tensors=public_tensors(plan, file.tensors),
        parts=parts,
        report=plan.report,
        prediction_type=said or found.prediction_type,
        averages=len(plan.averages),
        notes=(*(_without(found.notes, "do not tell") if said else found.notes), *_left_out(file)),
        metadata=file.metadata,
        files=(path,),
    )


def _open_folder(path: Path, variant: str | None) -> OpenedModel:
    index = read_json(path / INDEX, f"{path} is not a model folder in diffusers' layout")
    parts = tuple(part for part in NETWORKS if index.get(part, ABSENT) != ABSENT and (path / part).is_dir())
    files = {part: weight_file(path, part, variant) for part in parts}
    opened = {part: open_tensor_file(file) for part, file in files.items()}
    stored = {f"{part}.{name}": tensor for part in parts for name, tensor in opened[part].tensors.items()}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if not shapes:
        raise WeightError(f"{path}: {index.get('_class_name')} is another kind of model; use SD 1.x, SD 2.x or SDXL")
    found = recognise_model(shapes, str(path))
    plan = found.naming.read_plan(shapes, parts)
    scheduler = read_json(path / SCHEDULER) if (path / SCHEDULER).exists() else {}
    said = scheduler.get("prediction_type", "epsilon") if scheduler else found.prediction_type
    return OpenedModel(
        path=path,
        container=Container.FOLDER,
        form=Format.DIFFUSERS,
        spec=_with_vae_settings(found.model, path),
        tensors=public_tensors(plan, stored),
        parts=parts,
        report=plan.report,
        prediction_type=said if isinstance(said, str) else None,
        averages=0,
        # A folder's configurations tell.
        notes=tuple(_without(found.notes, "do not tell", "are assumed")),
        files=tuple(files.values()),
    )


def public_tensors(plan: ReadPlan, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Public name -> tensor, for what a plan reads from the tensors of a file."""
    blocks = _LastRead(stored)
    tensors = {}
    for name, slot in plan.slots.items():
        own = stored[slot.name]
        read = blocks.read if slot.blocks > 1 else partial(_read, stored)
        tensors[name] = StoredTensor(slot.public_shape(own.shape), own.dtype, partial(read, slot), _ranges(slot, own))
    return tensors


def _ranges(slot: Slot, stored: StoredTensor) -> tuple[FileRange, ...]:
    """Where the file has the bytes of a public tensor in their order: a block of rows is a part of its tensor's."""
    if not slot.layout.keeps_order or len(stored.ranges) != 1:
        return ()
    size = stored.byte_count // slot.blocks
    return (stored.ranges[0].part(slot.block * size, size),)


def _read(stored: Mapping[str, StoredTensor], slot: Slot) -> np.ndarray:
    return slot.restore(stored[slot.name].read())


class _LastRead:
    """Tensors that several public ones are blocks of, so that they are read once: weight and bias take turns."""

    KEPT = 2

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self._values: dict[str, np.ndarray] = {}

    def read(self, slot: Slot) -> np.ndarray:
        """The block of a slot."""
        if slot.name not in self._values:
            while len(self._values) >= self.KEPT:
                del self._values[next(iter(self._values))]
            self._values[slot.name] = self._stored[slot.name].read()
        return slot.restore(self._values[slot.name])


def _with_latent_statistics(model: ModelSpec, file: TensorFile) -> ModelSpec:
    """The model with the mean and deviation of its latents as a single file holds them, if it does."""
    if not all(name in file.tensors for name in LATENT_STATISTICS):
        return model
    mean, std = (_statistic(file, name) for name in LATENT_STATISTICS)
    config = {"scaling_factor": PLAYGROUND_25_VAE.scaling_factor, "latents_mean": mean, "latents_std": std}
    return _with_latents(model, file.path, config)


def _statistic(file: TensorFile, name: str) -> list[float]:
    values = file.tensors[name].cast_to(DType.F32).read().reshape(-1)
    # By way of text: the shortest number that is this one in float32, as it stands in configurations.
    return [float(str(value)) for value in values]


def _with_vae_settings(model: ModelSpec, folder: Path) -> ModelSpec:
    """The model with the scale, mean and deviation of its latents as its folder says them."""
    file = folder / "vae" / "config.json"
    return _with_latents(model, file, read_json(file)) if file.exists() else model


def _with_latents(model: ModelSpec, source: Path, config: Config) -> ModelSpec:
    channels = model.vae.latent_channels
    settings = read_config(source, config, lambda said: read_latent_settings(said, channels))
    return replace(model, vae=replace(model.vae, **settings))


def _without(notes: Collection[str], *doubts: str) -> list[str]:
    """The notes but those of some doubts, which something else has removed."""
    return [note for note in notes if not any(doubt in note for doubt in doubts)]


def _left_out(file: TensorFile) -> list[str]:
    return [f"{count} tensors under {where!r} were passed over." for where, count in file.left_out.items()]


def assumed_prediction(model: OpenedModel) -> str:
    """What a model predicts, where nothing tells: the published SD 2.1 predicts velocity, the others noise."""
    return model.prediction_type or ("v_prediction" if model.spec.family is Family.SD2 else "epsilon")


def notes_as_folder(model: OpenedModel) -> tuple[str, ...]:
    """The notes on a single file that is read as a folder, with what is assumed of it."""
    if model.prediction_type is not None:
        return model.notes
    return (*model.notes, f"It is taken to predict {assumed_prediction(model)}; converting can say otherwise.")

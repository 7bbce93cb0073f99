"""A model in any format, opened: what it is, and its tensors by public name, none of which has been read."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from dreambooth_ms.errors import WeightError, count_of
from dreambooth_ms.formats import model_config
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.stored import Container, StoredTensor, TensorFile, tensors_digest
from dreambooth_ms.formats.files.strict_json import parse_json_object
from dreambooth_ms.formats.folder_configs import folder_configs
from dreambooth_ms.formats.folder_layout import ABSENT, INDEX, NETWORKS, SCHEDULER, read_json, weight_file
from dreambooth_ms.formats.model_config import Config, read_config
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.plan import ReadPlan
from dreambooth_ms.formats.naming.recognise import Recognition, recognise_model, recognise_vae
from dreambooth_ms.formats.naming.report import Report
from dreambooth_ms.formats.naming.slots import Shape, Slot
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import PLAYGROUND_25_VAE, Family, ModelSpec

LATENT_STATISTICS = ("edm_mean", "edm_std")
"""Where Playground v2.5's single file has the mean and the deviation of its latents, by channel."""

PREDICTION_METADATA = "modelspec.prediction_type"
"""Where single files say what they predict, by the Stability ModelSpec: "epsilon" or "v"."""

CONFIGURATIONS_METADATA = "dreambooth_ms.configurations"
"""Where our own files keep the configurations of a folder that nothing else in a file tells: a JSON object of these by
their paths."""

ZERO_SNR = "ztsnr"
"""The tensor, without values, by which files say that the last timestep holds no signal."""

_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}

Spec = TypeVar("Spec")


@dataclass(frozen=True)
class StoredNetwork(Generic[Spec]):
    """A network in a file or folder, not read yet."""

    file: Path
    """The file that holds the tensors."""
    spec: Spec
    tensors: Mapping[str, StoredTensor]
    """By their names in the network."""

    def digest(self) -> str:
        """What caches of its results are keyed by: the same for the same weights in any format."""
        return tensors_digest(self.tensors)


@dataclass(frozen=True)
class OpenedModel:
    """A model in a file or folder."""

    path: Path
    container: Container
    """Of the file, or FOLDER."""
    form: Format
    spec: ModelSpec
    """As the names and shapes of the tensors show it."""
    tensors: Mapping[str, StoredTensor]
    """By public name, in the order of the model."""
    parts: tuple[str, ...]
    """The networks that are there."""
    report: Report
    """What does not fit the family's names."""
    prediction_type: str | None = None
    """"epsilon" or "v_prediction"; None if nothing says it."""
    zero_snr: bool = False
    """Whether the last timestep holds no signal (Lin et al., 2024)."""
    averages: int = 0
    """How many moving averages (EMA) are there besides the weights."""
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    """Of networks that are not in the file `path`."""
    configurations: Mapping[str, Config] = field(default_factory=dict)
    """JSON files in place of its own, by their paths in a folder."""

    @property
    def dtypes(self) -> dict[DType, int]:
        """The element types, with the number of tensors of each, the most frequent first."""
        return dict(Counter(tensor.dtype for tensor in self.tensors.values()).most_common())

    @property
    def missing_parts(self) -> list[str]:
        """The networks that the family has and the file has not."""
        return [part for part in NETWORKS if part not in self.parts and getattr(self.spec, part) is not None]

    @property
    def assumed_prediction(self) -> str:
        """What it predicts, where nothing says it: the published SD 2.1 predicts velocity, the others noise."""
        if self.prediction_type in _PREDICTIONS.values():
            return str(self.prediction_type)
        return "v_prediction" if self.spec.family is Family.SD2 else "epsilon"

    def of_part(self, part: str) -> dict[str, StoredTensor]:
        """The tensors of a network by their names in it."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): own for name, own in self.tensors.items() if name.startswith(prefix)}

    def configuration(self, name: str) -> Config:
        """A JSON file of its folder, or of the folder that a single file would be converted to.

        Raises:
            WeightError: the folder does not have it, or it is damaged.
        """
        if self.container is not Container.FOLDER:
            return self.made_configurations()[name]
        return self._as_told(name, self.configurations.get(name) or read_json(self.path / name))

    def made_configurations(self) -> dict[str, Config]:
        """The JSON files of the folder that a single file would be converted to, by their paths in it."""
        guessed = folder_configs(self.spec, self.parts, self.assumed_prediction, self.zero_snr)
        made: dict[str, Config] = {**guessed, **self.configurations}
        return {name: self._as_told(name, content) for name, content in made.items()}

    def scheduler(self) -> Config:
        """The configuration of its scheduler; empty for a folder that has none."""
        lacks = self.container is Container.FOLDER and not (self.path / SCHEDULER).exists()
        return {} if lacks else self.configuration(SCHEDULER)

    def _as_told(self, name: str, content: Config) -> Config:
        """A configuration with what the user says of it."""
        told = self.prediction_type
        if name != SCHEDULER or told in (None, content.get("prediction_type", "epsilon")):
            return content
        return {**content, "prediction_type": told}

    def network(self, part: str, read: Callable[[Config], Spec]) -> StoredNetwork[Spec]:
        """A network as its configuration says it; of a tower that it ends early in, the layers that it has.

        Raises:
            WeightError: `read` does not take the configuration.
        """
        name, known = f"{part}/config.json", model_shapes(self.spec)
        spec = read_config(self.path / name, self.configuration(name), read)
        tensors = {name: own for name, own in self.of_part(part).items() if f"{part}.{name}" in known}
        return StoredNetwork(self.files.get(part, self.path), spec, tensors)

    def check(self) -> None:
        """Stop if a network is not whole, or there are tensors that belong to none.

        Raises:
            WeightError: missing, unexpected, mis-shaped and duplicate names, with their counts.
        """
        self.report.check(str(self.path), f"a model of {self.spec.family.value} in the naming of {self.form.value}")

    def check_configurations(self) -> None:
        """Stop where networks could not be filled: for those who build none.

        Raises:
            WeightError: a configuration is not supported, or says other names and shapes than those of the tensors.
        """
        specs = {
            part: self.network(part, _in_a_list(model_config.NETWORK_READERS[part])).spec[0] for part in self.parts
        }
        shapes, there = model_shapes(replace(self.spec, **specs)), model_shapes(self.spec)
        wanted = {name: shape for name, shape in shapes.items() if name.partition(".")[0] in specs}
        shared = wanted.keys() & self.tensors.keys()
        others = {name: self.tensors[name].shape for name in shared if self.tensors[name].shape != wanted[name]}
        Report(
            missing=tuple(name for name in wanted if name not in shared),
            unexpected=tuple(name for name in there if name in self.tensors and name not in wanted),
            misshaped=tuple(f"{name}: expected {wanted[name]}, got {shape}" for name, shape in sorted(others.items())),
        ).check(str(self.path), "its own configurations")


def open_model(
    path: Path, variant: str | None = None, use_averages: bool = False, parts: Collection[str] | None = None
) -> OpenedModel:
    """Recognise a model and open it; its tensors are not read, and misfits are in its report.

    Args:
        path: a folder in diffusers' layout, or a file.
        variant: which of the files in a folder; None for the plain ones, or for the only variant.
        use_averages: take the moving averages (EMA) of the weights that have them.
        parts: the networks of a folder that are wanted; None for those that are there.

    Raises:
        WeightError: no such file, damaged, or no model of a family that is known.
    """
    if not path.is_dir():
        return _open_file(path, use_averages)
    if use_averages:
        raise WeightError(f"{path}: a folder keeps no moving averages (EMA) beside its weights; leave out --use_ema")
    return _open_folder(path, variant, parts)


def _open_file(path: Path, use_averages: bool) -> OpenedModel:
    file = open_tensor_file(path)
    model = _opened(file, recognise_model, use_averages=use_averages)
    if model.form is Format.DIFFUSERS:
        raise WeightError(f"{path}: a file with the names of a folder in diffusers' layout; split it by its parts")
    if use_averages and not model.averages:
        raise WeightError(f"{path}: holds no moving averages (EMA) of its weights; leave out --use_ema")
    kept = _kept_configurations(file)
    scheduler = kept.get(SCHEDULER, {})
    told = (scheduler.get("prediction_type"), file.metadata.get(PREDICTION_METADATA))
    said = next((_PREDICTIONS[one] for one in map(str, told) if one in _PREDICTIONS), None)
    if model.prediction_type == "v_prediction":
        # By a mark, which is what other programs look at.
        said = model.prediction_type
    doubts = [*(["do not tell"] if said else []), *(["are assumed"] if "unet/config.json" in kept else [])]
    spec = _with_latent_statistics(model.spec, file)
    notes = [f"{count_of(count, 'tensor')} under {where!r} passed over." for where, count in file.left_out.items()]
    if use_averages:
        notes.append(f"Moving averages (EMA) are taken in place of the weights: {model.averages}.")
        doubts.append("besides the weights")
    return replace(
        model,
        spec=_with_latents(spec, path, kept["vae/config.json"]) if "vae/config.json" in kept else spec,
        prediction_type=said or model.prediction_type,
        zero_snr=ZERO_SNR in file.tensors or scheduler.get("rescale_betas_zero_snr") is True,
        notes=(*_without(model.notes, *doubts), *notes),
        averages=0 if use_averages else model.averages,
        metadata=file.metadata,
        configurations=kept,
    )


def _kept_configurations(file: TensorFile) -> dict[str, Config]:
    known = {SCHEDULER, *(f"{part}/config.json" for part in NETWORKS)}
    try:
        found = parse_json_object(file.metadata.get(CONFIGURATIONS_METADATA, "{}").encode())
    except FormatError as error:
        raise WeightError(f"{file.path}: metadata {CONFIGURATIONS_METADATA}: damaged ({error})") from error
    if not (found.keys() <= known and all(isinstance(content, dict) for content in found.values())):
        raise WeightError(f"{file.path}: metadata {CONFIGURATIONS_METADATA}: damaged (no configurations of a folder)")
    return found


def _open_folder(path: Path, variant: str | None, wanted: Collection[str] | None) -> OpenedModel:
    index = read_json(path / INDEX, f"{path} is not a model folder in diffusers' layout")
    there = [part for part in NETWORKS if index.get(part, ABSENT) != ABSENT and (path / part).is_dir()]
    files = {part: weight_file(path / part, part, variant) for part in (there if wanted is None else wanted)}
    stored: dict[str, StoredTensor] = {}
    for part, file in files.items():
        # It must be of the kind that its name says.
        opened = open_tensor_file(file, Container.SAFETENSORS if file.suffix == ".safetensors" else None)
        stored |= {f"{part}.{name}": tensor for name, tensor in opened.tensors.items()}
    if not stored:
        raise WeightError(f"{path}: {index.get('_class_name')} is another kind of model; use SD 1.x, SD 2.x or SDXL")
    model = _opened(TensorFile(path, Container.FOLDER, stored), recognise_model, files)
    scheduler = read_json(path / SCHEDULER) if (path / SCHEDULER).exists() else {}
    said = scheduler.get("prediction_type", "epsilon") if scheduler else model.prediction_type
    vae = path / "vae" / "config.json"
    return replace(
        model,
        spec=_with_latents(model.spec, vae, read_json(vae)) if vae.exists() else model.spec,
        prediction_type=said if isinstance(said, str) else None,
        zero_snr=scheduler.get("rescale_betas_zero_snr") is True,
        # A folder's configurations say it.
        notes=tuple(_without(model.notes, "do not tell", "are assumed")),
        files=files,
    )


def open_lone_vae(path: Path) -> OpenedModel:
    """Recognise an autoencoder that is alone in a file, and open it as a model without other parts.

    Raises:
        WeightError: no such file, damaged, or no autoencoder that is known.
    """
    return _opened(open_tensor_file(path), recognise_vae)


def with_other_vae(model: OpenedModel, path: Path, sample_size: int) -> OpenedModel:
    """A model with another autoencoder in place of its own.

    Args:
        model: the model.
        path: the autoencoder's folder in diffusers' layout, a model folder with one, or a file that holds it alone and
            does not say how its latents are scaled: they are scaled as the model's.
        sample_size: height and width of the model's latents.

    Raises:
        WeightError: there is no autoencoder, or it is not whole.
    """
    is_file, folder, own = path.is_file(), path / "vae" if (path / "vae").is_dir() else path, model.spec.vae
    vae = open_lone_vae(path if is_file else weight_file(folder, "vae", None))
    vae.report.check(str(vae.path), "an autoencoder (VAE) of Stable Diffusion")
    if is_file:
        scale = {name: getattr(own, name) for name in ("scaling_factor", "latents_mean", "latents_std")}
        spec = replace(vae.spec.vae, **scale)
        config: Config = model_config.write_vae_config(spec, sample_size * own.downsampling)
    else:
        config = read_json(folder / "config.json")
        spec = read_config(folder / "config.json", config, model_config.read_vae_config)
    return replace(
        model,
        spec=replace(model.spec, vae=spec),
        tensors={name: one for name, one in model.tensors.items() if not name.startswith("vae.")} | {**vae.tensors},
        parts=tuple(part for part in NETWORKS if part == "vae" or part in model.parts),
        files={**model.files, "vae": vae.path},
        configurations={**model.configurations, "vae/config.json": config},
    )


def _opened(
    file: TensorFile,
    recognise: Callable[[Mapping[str, Shape], str], Recognition],
    parts: Collection[str] | None = None,
    use_averages: bool = False,
) -> OpenedModel:
    """What the names and shapes of tensors say; without `parts`, the networks of which there is anything."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    found = recognise(shapes, str(file.path))
    parts = found.naming.present_parts(shapes) if parts is None else parts
    plan = found.naming.read_plan(shapes, parts, use_averages)
    return OpenedModel(
        path=file.path,
        container=file.container,
        form=found.form,
        spec=found.model,
        tensors=_public_tensors(plan, file),
        parts=tuple(parts),
        report=plan.report,
        prediction_type=found.prediction_type,
        averages=len(plan.averages),
        notes=found.notes,
    )


def _public_tensors(plan: ReadPlan, file: TensorFile) -> dict[str, StoredTensor]:
    """Public name -> tensor, for what a plan reads from a file; none of them may hold NaN or infinity."""
    stored = file.tensors
    # Of what several tensors are blocks of, so that it is read once: weight and bias take turns.
    read_blocks = lru_cache(maxsize=2)(lambda name: stored[name].read())

    def public(slot: Slot) -> StoredTensor:
        def load() -> np.ndarray:
            return slot.restore(read_blocks(slot.name) if slot.blocks > 1 else own.read())

        own = stored[slot.name]
        size = own.byte_count // slot.blocks
        # A block of rows is a part of its tensor's bytes.
        in_order = slot.layout.keeps_order and len(own.ranges) == 1
        ranges = (own.ranges[0].part(slot.block * size, size),) if in_order else ()
        return StoredTensor(slot.public_shape(own.shape), own.dtype, load, ranges, f"{file.path}: {slot.name}")

    return {name: public(slot) for name, slot in plan.slots.items()}


def _with_latent_statistics(model: ModelSpec, file: TensorFile) -> ModelSpec:
    """The model with the mean and deviation of its latents as a single file holds them, if it does."""
    if not all(name in file.tensors for name in LATENT_STATISTICS):
        return model
    # By way of text: the shortest number that is this one in float32, as it stands in configurations.
    mean, std = (
        [float(str(value)) for value in file.tensors[name].cast_to(DType.F32).read().reshape(-1)]
        for name in LATENT_STATISTICS
    )
    config = {"scaling_factor": PLAYGROUND_25_VAE.scaling_factor, "latents_mean": mean, "latents_std": std}
    return _with_latents(model, file.path, config)


def _with_latents(model: ModelSpec, source: Path, config: Config) -> ModelSpec:
    """The model with the scale, mean and deviation of its latents as a configuration of its autoencoder says them."""
    channels = model.vae.latent_channels
    settings = read_config(source, config, lambda said: model_config.read_latent_settings(said, channels))
    return replace(model, vae=replace(model.vae, **settings))


def _in_a_list(read: Callable[[Config], Spec]) -> Callable[[Config], list[Spec]]:
    """A reader whose sizes are not looked at: tensors know nothing of heads and norm groups."""
    return lambda config: [read(config)]


def _without(notes: Collection[str], *doubts: str) -> list[str]:
    """The notes but those of some doubts, which something else has removed."""
    return [note for note in notes if not any(doubt in note for doubt in doubts)]

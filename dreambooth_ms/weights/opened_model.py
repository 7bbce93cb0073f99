"""A model in any format, opened: what it is, and its tensors by public name, none of which has been read."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from dreambooth_ms.errors import WeightError, count_of
from dreambooth_ms.formats import model_config
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import parse_json_object
from dreambooth_ms.formats.files.stored import Container, StoredTensor, TensorFile, raw_bytes
from dreambooth_ms.formats.folder_layout import ABSENT, CONFIG, INDEX, NETWORKS, SCHEDULER, read_json, weight_file
from dreambooth_ms.formats.model_config import Config, folder_configs, read_config
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.plan import ReadPlan, Report, Shape, Slot
from dreambooth_ms.formats.naming.recognise import Recognition, recognise_model, recognise_vae
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import PIXELS, PLAYGROUND_25_VAE, SD_15, Family, ModelSpec

LATENT_STATISTICS = ("edm_mean", "edm_std")
"""Where Playground v2.5's single file has the mean and the deviation of its latents, by channel."""

PREDICTION_METADATA = "modelspec.prediction_type"
"""Where single files say what they predict, by the Stability ModelSpec: "epsilon" or "v"."""

CONFIGURATIONS_METADATA = "dreambooth_ms.configurations"
"""Where our own files keep the configurations of a folder that nothing else in a file tells: a JSON object of these by
their paths."""

ZERO_SNR = "ztsnr"
"""The tensor, without values, by which files say that the last timestep holds no signal."""

VAE_CONFIG = CONFIG.format("vae")
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
        """What caches of its results are keyed by: SHA-256 of names, types, shapes and values, in whatever format."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype.value} {tensor.shape}\n".encode())
            digest.update(raw_bytes(tensor.read()))
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class OpenedModel(TensorFile):
    """A model in a file or folder, whose tensors have public names, in the order of the model."""

    form: Format
    spec: ModelSpec
    """As the names and shapes of the tensors show it."""
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
    files: Mapping[str, Path] = field(default_factory=dict)
    """Of networks that are not in the file `path`."""
    configurations: Mapping[str, Config] = field(default_factory=dict)
    """JSON files that are read already, or in place of its own, by their paths in a folder."""

    @property
    def dtypes(self) -> dict[DType, int]:
        """The element types, with the number of tensors of each, the most frequent first."""
        return dict(Counter(tensor.dtype for tensor in self.tensors.values()).most_common())

    @property
    def missing_parts(self) -> list[str]:
        """The networks that the family has and the file has not."""
        return [part for part in self.spec.networks if part not in self.parts]

    @property
    def assumed_prediction(self) -> str:
        """What it predicts, where nothing says it: the published SD 2.1 predicts velocity, the others noise, also those
        for depth and inpainting, which were made from SD 2's 512 px model."""
        if self.prediction_type in _PREDICTIONS.values():
            return str(self.prediction_type)
        is_velocity = self.spec.family is Family.SD2 and self.spec.unet.in_channels not in (5, 9)
        return "v_prediction" if is_velocity else "epsilon"

    def of_part(self, part: str) -> dict[str, StoredTensor]:
        """The tensors of a network by their names in it."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): own for name, own in self.tensors.items() if name.startswith(prefix)}

    def without(self, parts: Collection[str]) -> "OpenedModel":
        """The same without some of its networks."""
        tensors = {name: own for name, own in self.tensors.items() if name.partition(".")[0] not in parts}
        return replace(self, tensors=tensors, parts=tuple(part for part in self.parts if part not in parts))

    @property
    def configuration_names(self) -> list[str]:
        """The paths of the JSON files of its networks and its scheduler, which a folder may lack."""
        has_scheduler = self.container is not Container.FOLDER or SCHEDULER in self.configurations
        return [*map(CONFIG.format, self.parts), *([SCHEDULER] if has_scheduler else [])]

    def configuration(self, name: str) -> Config:
        """A JSON file of its folder, or of the folder that a single file would be converted to, with what it predicts;
        WeightError if it is missing or damaged."""
        content = self.configurations.get(name)
        if content is None and self.container is Container.FOLDER:
            content = read_json(self.path / name)
        elif content is None:
            content = folder_configs(self.spec, self.parts, self.assumed_prediction, self.zero_snr)[name]
        told = self.prediction_type
        if name != SCHEDULER or told in (None, content.get("prediction_type", "epsilon")):
            return content
        return {**content, "prediction_type": told}

    def network(self, part: str, read: Callable[[Config], Spec]) -> StoredNetwork[Spec]:
        """A network as its configuration says it, WeightError if `read` refuses that; of a tower that it ends early in,
        the layers that it has."""
        name, known = CONFIG.format(part), model_shapes(self.spec)
        spec = read_config(self.path / name, self.configuration(name), read)
        tensors = {name: own for name, own in self.of_part(part).items() if f"{part}.{name}" in known}
        return StoredNetwork(self.files.get(part, self.path), spec, tensors)

    def check(self) -> None:
        """Stop, by a WeightError, if a network is not whole, or there are tensors that belong to none."""
        self.report.check(str(self.path), f"a model of {self.spec.family.value} in the naming of {self.form.value}")

    def check_configurations(self) -> None:
        """Stop, by a WeightError, where configurations do not fit the tensors, or no network; for who builds none."""
        specs = {}
        for part in self.parts:
            name, read = CONFIG.format(part), model_config.NETWORK_READERS[part]
            # Tensors know nothing of heads and norm groups.
            specs[part] = read_config(self.path / name, self.configuration(name), read, check_sizes=False)
        shapes, there = model_shapes(replace(self.spec, **specs)), model_shapes(self.spec)
        wanted = {name: shape for name, shape in shapes.items() if name.partition(".")[0] in specs}
        found = {name: tensor.shape for name, tensor in self.tensors.items() if name in wanted or name in there}
        others = {name: shape for name, shape in found.items() if shape != wanted.get(name, shape)}
        Report(
            missing=tuple(name for name in wanted if name not in found),
            unexpected=tuple(name for name in found if name not in wanted),
            misshaped=tuple(f"{name}: expected {wanted[name]}, got {shape}" for name, shape in others.items()),
        ).check(str(self.path), "its own configurations")


def open_model(
    path: Path, variant: str | None = None, use_averages: bool = False, unused: Collection[str] | None = None
) -> OpenedModel:
    """Recognise a model in a file, or a folder in diffusers' layout, and open it; its tensors are not read, and misfits
    are in its report. WeightError if it is not there, damaged, or no model of a family that is known.

    `variant` says which of the files in a folder; None: the plain ones, or the only variant. With `use_averages`
    weights are their moving averages (EMA), where they have them. Of all networks that a folder's index names, the
    `unused` are passed over; None: those that it lacks.
    """
    if not path.is_dir():
        model = model_of(open_tensor_file(path), use_averages=use_averages)
        if model.form is Format.DIFFUSERS:
            raise WeightError(f"{path}: a file with the names of a folder in diffusers' layout; split it by its parts")
        return model
    if use_averages:
        raise WeightError(f"{path}: a folder keeps no moving averages (EMA) beside its weights; leave out --use_ema")
    index = read_json(path / INDEX, f"{path} is not a model folder in diffusers' layout")
    if "unet" not in index:
        kind = index.get("_class_name")
        raise WeightError(f"{path}: {kind} is another kind of model; use SD 1.x, 2.x, SDXL, IF or AltDiffusion")
    named = [part for part in NETWORKS if index.get(part, ABSENT) != ABSENT and part not in (unused or ())]
    there = named if unused is not None else [part for part in named if (path / part).is_dir()]
    files = {part: weight_file(path / part, part, variant) for part in there}
    stored: dict[str, StoredTensor] = {}
    for part, network in files.items():
        # It must be of the kind that its name says.
        opened = open_tensor_file(network, Container.SAFETENSORS if network.suffix == ".safetensors" else None)
        stored |= {f"{part}.{name}": tensor for name, tensor in opened.tensors.items()}
    named_by = {SCHEDULER, *map(CONFIG.format, ("unet", "vae", "text_encoder"))}
    configurations = {name: read_json(path / name) for name in named_by if (path / name).exists()}
    said = {part: configurations.get(CONFIG.format(part), {}) for part in there}
    family = model_config.family_of(said)
    recognise = partial(_recognise_folder, path, said, family) if family else recognise_model
    file, known = TensorFile(path, Container.FOLDER, stored), {INDEX: index, **configurations}
    return model_of(file, files, known, recognise=recognise)


def _recognise_folder(path: Path, configs: Mapping[str, Config], family: Family, *_: Any) -> Recognition:
    """A model of a family that its configurations tell, whose sizes these tell, too."""
    readers = model_config.NETWORK_READERS
    read = {part: read_config(path / CONFIG.format(part), own, readers[part]) for part, own in configs.items()}
    usual: dict[str, Any] = {"unet": SD_15.unet, "vae": PIXELS if family is Family.IF else SD_15.vae}
    spec = ModelSpec(family=family, **usual | read)
    return Recognition(Format.DIFFUSERS, spec, naming_of(Format.DIFFUSERS, spec), None, ())


def model_of(
    file: TensorFile,
    files: Mapping[str, Path] | None = None,
    configurations: Mapping[str, Config] | None = None,
    use_averages: bool = False,
    recognise: Callable[[Mapping[str, Shape], str], Recognition] = recognise_model,
) -> OpenedModel:
    """The model in the tensors of a file or folder, as `recognise` tells it by names and shapes; see `open_model`.

    Of a folder `files` are those of its networks, and `configurations` its JSON files, by their paths in it; of a file
    there are the networks of which it holds anything, and the configurations in its metadata.
    """
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    found = recognise(shapes, str(file.path))
    parts = tuple(found.naming.present_parts(shapes) if files is None else files)
    plan = found.naming.read_plan(shapes, parts, use_averages)
    if use_averages and not plan.averages:
        raise WeightError(f"{file.path}: holds no moving averages (EMA) of its weights; leave out --use_ema")
    configurations = _kept_configurations(file) if configurations is None else configurations
    said: Any = _PREDICTIONS.get(file.metadata.get(PREDICTION_METADATA, ""))
    if scheduler := configurations.get(SCHEDULER, {}):
        said = scheduler.get("prediction_type", "epsilon")
    if found.prediction_type == "v_prediction" or not isinstance(said, str):
        # By a mark, which is what other programs look at; or nothing says it.
        said = found.prediction_type
    is_folder = file.container is Container.FOLDER
    # What the names alone leave open -> whether something else says it.
    told = {
        "do not tell": is_folder or said is not None,
        "are assumed": is_folder or "unet/config.json" in configurations,
        "besides the weights": use_averages,
    }
    notes = [note for note in found.notes if not any(is_told and doubt in note for doubt, is_told in told.items())]
    notes += [f"{count_of(count, 'tensor')} under {where!r} passed over." for where, count in file.left_out.items()]
    if use_averages:
        notes.append(f"Moving averages (EMA) are taken in place of the weights: {len(plan.averages)}.")
    return OpenedModel(
        path=file.path,
        container=file.container,
        form=found.form,
        spec=_with_latents(found.model, file, configurations.get(VAE_CONFIG)),
        tensors=_public_tensors(plan, file),
        parts=parts,
        report=plan.report,
        prediction_type=said,
        zero_snr=ZERO_SNR in file.tensors or scheduler.get("rescale_betas_zero_snr") is True,
        averages=0 if use_averages else len(plan.averages),
        notes=tuple(notes),
        metadata=file.metadata,
        files=files or {},
        configurations=configurations,
    )


def _kept_configurations(file: TensorFile) -> dict[str, Config]:
    known = {SCHEDULER, *map(CONFIG.format, NETWORKS)}
    try:
        found = parse_json_object(file.metadata.get(CONFIGURATIONS_METADATA, "{}").encode())
    except FormatError as error:
        raise WeightError(f"{file.path}: metadata {CONFIGURATIONS_METADATA}: damaged ({error})") from error
    if not (found.keys() <= known and all(isinstance(content, dict) for content in found.values())):
        raise WeightError(f"{file.path}: metadata {CONFIGURATIONS_METADATA}: damaged (no configurations of a folder)")
    return found


def open_lone_vae(path: Path) -> OpenedModel:
    """An autoencoder that is alone in a file, as a model without other parts; WeightError if it is no known one."""
    return model_of(open_tensor_file(path), recognise=recognise_vae)


def with_other_vae(model: OpenedModel, path: Path, sample_size: int) -> OpenedModel:
    """A model, whose latents have a height and width of `sample_size`, with another autoencoder in place of its own.

    That is in a folder in diffusers' layout, its own or a model's; or alone in a file that does not say how its latents
    are scaled: they are scaled as the model's. WeightError if there is none, or it is not whole.
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
        configurations={**model.configurations, VAE_CONFIG: config},
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


def _with_latents(model: ModelSpec, file: TensorFile, config: Config | None) -> ModelSpec:
    """The model with the scale, mean and deviation of its latents as its configuration says them, or a single file."""
    source = file.path / VAE_CONFIG if file.container is Container.FOLDER else file.path
    if not config and all(name in file.tensors for name in LATENT_STATISTICS):
        # By way of text: the shortest number that is this one in float32, as it stands in configurations.
        mean, std = (
            [float(str(value)) for value in file.tensors[name].cast_to(DType.F32).read().reshape(-1)]
            for name in LATENT_STATISTICS
        )
        config = {"scaling_factor": PLAYGROUND_25_VAE.scaling_factor, "latents_mean": mean, "latents_std": std}
    if not config:
        return model
    read = partial(model_config.read_latent_settings, channels=model.vae.latent_channels)
    return replace(model, vae=replace(model.vae, **read_config(source, config, read)))

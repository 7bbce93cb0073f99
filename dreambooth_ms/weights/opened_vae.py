"""An autoencoder in any format, opened to take the place of a model's own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.stored import StoredTensor, TensorFile
from dreambooth_ms.formats.folder_layout import NETWORKS, read_json, weight_file
from dreambooth_ms.formats.model_config import Config, read_config, read_vae_config, write_vae_config
from dreambooth_ms.formats.naming.recognise import recognise_vae
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.weights.opened_model import OpenedModel, public_tensors


@dataclass(frozen=True)
class OpenedVae:
    """An autoencoder in a file or folder."""

    path: Path
    """The file that holds the tensors."""
    spec: VaeSpec
    config: Config
    """Its config.json, or what it would be."""
    tensors: Mapping[str, StoredTensor]
    """By their names in the network; none of them has been read."""

    def in_place_of_own(self, model: OpenedModel) -> OpenedModel:
        """A model with this autoencoder."""
        others = {name: tensor for name, tensor in model.tensors.items() if not name.startswith("vae.")}
        own = {f"vae.{name}": tensor for name, tensor in self.tensors.items()}
        parts = tuple(part for part in NETWORKS if part == "vae" or part in model.parts)
        return replace(model, spec=replace(model.spec, vae=self.spec), tensors=others | own, parts=parts)


def open_vae(path: Path, latents_of: VaeSpec, sample_size: int) -> OpenedVae:
    """Check an autoencoder and open it.

    Args:
        path: its folder in diffusers' layout, a model folder with one, or a file that holds it alone.
        latents_of: the autoencoder whose place it takes. The latents of one that is alone in a file, which does not say
            how they are scaled, are scaled as this one's.
        sample_size: height and width of the pictures it is for, in pixels.

    Raises:
        WeightError: there is none, or it is not whole.
    """
    if path.is_file():
        file, config_file = open_tensor_file(path), None
    else:
        folder = path / "vae" if (path / "vae").is_dir() else path
        file, config_file = (
            open_tensor_file(weight_file(folder.parent, folder.name, None, "vae")),
            folder / "config.json",
        )
    found, tensors = _recognised(file)
    config = read_json(config_file) if config_file else write_vae_config(_scaled_as(found, latents_of), sample_size)
    return OpenedVae(file.path, read_config(config_file or path, config, read_vae_config), config, tensors)


def _recognised(file: TensorFile) -> tuple[VaeSpec, dict[str, StoredTensor]]:
    """The sizes of an autoencoder, and its tensors by their names in the network."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    spec, naming = recognise_vae(shapes, str(file.path))
    plan = naming.read_plan(shapes)
    plan.report.check(str(file.path), "an autoencoder (VAE) of Stable Diffusion")
    public = public_tensors(plan, file.tensors)
    return spec, {name.removeprefix("vae."): tensor for name, tensor in public.items()}


def _scaled_as(spec: VaeSpec, other: VaeSpec) -> VaeSpec:
    return replace(
        spec,
        scaling_factor=other.scaling_factor,
        latents_mean=other.latents_mean,
        latents_std=other.latents_std,
    )

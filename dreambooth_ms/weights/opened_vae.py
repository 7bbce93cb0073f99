"""An autoencoder in any format, opened to take the place of a model's own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.weights.files.open import open_tensor_file
from dreambooth_ms.weights.files.stored import StoredTensor
from dreambooth_ms.weights.folder_layout import NETWORKS, read_json, weight_file
from dreambooth_ms.weights.model_config import Config, read_config, read_vae_config, write_vae_config
from dreambooth_ms.weights.naming.recognise import recognise_vae
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
    folder = None if path.is_file() else path / "vae" if (path / "vae").is_dir() else path
    file = open_tensor_file(weight_file(folder.parent, folder.name, None, "vae") if folder else path)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    found, naming = recognise_vae(shapes, str(file.path))
    plan = naming.read_plan(shapes)
    plan.report.check(str(file.path), "an autoencoder (VAE) of Stable Diffusion")
    tensors = {name.removeprefix("vae."): tensor for name, tensor in public_tensors(plan, file.tensors).items()}
    if folder:
        config: Config = read_json(folder / "config.json")
        return OpenedVae(file.path, read_config(folder / "config.json", config, read_vae_config), config, tensors)
    spec = replace(
        found,
        scaling_factor=latents_of.scaling_factor,
        latents_mean=latents_of.latents_mean,
        latents_std=latents_of.latents_std,
    )
    return OpenedVae(file.path, spec, write_vae_config(spec, sample_size), tensors)

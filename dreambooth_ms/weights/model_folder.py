"""A model folder in diffusers' layout: model_index.json and a folder per network with its config.json and weights.

    unet/  vae/  text_encoder/  tokenizer/  scheduler/        and in SDXL also text_encoder_2/  tokenizer_2/

Reading gives specs and filled networks; writing gives a folder that diffusers loads.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from mindspore import nn

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, TextEncoders
from dreambooth_ms.models.specs import ClipTextSpec, UNetSpec, VaeSpec
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.weights.atomic import write_bytes
from dreambooth_ms.weights.model_config import (
    Config,
    read_clip_config,
    read_projected_text_config,
    read_scheduler_config,
    read_text_config,
    read_unet_config,
    read_vae_config,
    write_scheduler_config,
)
from dreambooth_ms.weights.naming.formats import OLD_VAE_NAMES
from dreambooth_ms.weights.parameters import load_strict, public_parameters, read_parameters
from dreambooth_ms.weights.tensor_file import check_tensor_file, read_tensors, write_tensors

Spec = TypeVar("Spec")

# Buffers that some versions of the libraries wrote into weight files although they hold no knowledge.
BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

UNMERGED_TOKENS = 2 * 256 + 2
"""Tokens of CLIP's vocabulary that no line of merges.txt makes: each byte, within a word and at its end; two marks."""

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text encoders by the names of their folders, and their tokenizers'."""

SIZE_IDS = (5, 6)
"""Numbers of a picture that SDXL's UNets read: the refiner's, the base's."""

WEIGHT_NAMES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "clip": "model",
}


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder: every part is there and readable; no weight has been read yet."""

    path: Path
    variant: str | None
    unet_spec: UNetSpec
    vae_spec: VaeSpec
    text_spec: ClipTextSpec | None
    text_spec_2: ClipTextSpec | None
    schedule_spec: NoiseScheduleSpec
    scheduler_config: Config
    zeros_for_empty_prompt: bool
    """Whether pictures without a negative prompt are guided by zeros in place of an encoded empty prompt."""
    vae_path: Path
    """Folder of the autoencoder, which may be another model's."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders that there are, by the names of their folders."""
        specs = {"text_encoder": self.text_spec, "text_encoder_2": self.text_spec_2}
        return tuple(name for name, spec in specs.items() if spec)

    @property
    def tokenizer_paths(self) -> tuple[Path, ...]:
        """Where the files of each text encoder's tokenizer are."""
        return tuple(self.path / TOKENIZERS[name] for name in self.text_encoders)

    @property
    def num_size_ids(self) -> int:
        """Numbers of a picture that the UNet reads."""
        return self.unet_spec.num_size_ids((self.text_spec_2 and self.text_spec_2.projection_dim) or 0)

    def weight_file(self, part: str) -> Path:
        """The safetensors file of a network."""
        if part == "vae" and self.vae_path != self.path / "vae":
            return weight_file(self.vae_path.parent, self.vae_path.name, None, "vae")
        return weight_file(self.path, part, self.variant)

    @property
    def picture_size(self) -> int:
        """Height and width the model was trained at, in pixels."""
        return self.unet_spec.sample_size * self.vae_spec.downsampling

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of this size in pixels.

        Raises:
            WeightError: the networks cannot halve the size as often as they must.
        """
        step = self.vae_spec.downsampling * 2 ** (len(self.unet_spec.block_out_channels) - 1)
        if height % step or width % step:
            raise WeightError(f"{self.path}: {width}x{height} pixels do not fit; sides must be multiples of {step}")
        factor = self.vae_spec.downsampling
        return self.vae_spec.latent_channels, height // factor, width // factor

    def load_unet(self) -> UNet2DConditionModel:
        """The denoiser, filled."""
        return self._load("unet", UNet2DConditionModel(self.unet_spec))

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder, filled."""
        return self._load("vae", AutoencoderKL(self.vae_spec), rename=new_vae_name)

    def load_text_encoder(self) -> CLIPTextModel:
        """The first text encoder, filled."""
        assert self.text_spec is not None, "SDXL's refiner has none"
        return self._load("text_encoder", CLIPTextModel(self.text_spec))

    def load_text_encoders(self) -> TextEncoders:
        """All text encoders as one network, filled."""
        second = CLIPTextModelWithProjection(self.text_spec_2) if self.text_spec_2 else None
        return TextEncoders(
            self.load_text_encoder() if self.text_spec else None, second and self._load("text_encoder_2", second)
        )

    def _load(self, part: str, network: nn.Cell, rename: Any = None) -> Any:
        file = self.weight_file(part)
        tensors, _ = read_tensors(file)
        if rename is not None:
            tensors = fit_old_attention({rename(name): tensor for name, tensor in tensors.items()}, network)
        load_strict(network, tensors, str(file), ignore_unexpected=BUFFERS)
        return network


def open_model_folder(path: Path, variant: str | None = None, vae: Path | None = None) -> ModelFolder:
    """Check a folder and read its configurations.

    Args:
        path: the folder.
        variant: of the weight files.
        vae: another autoencoder's folder, or a model folder with one, to be used in place of the folder's own.

    Raises:
        WeightError: it is no model folder, a part is missing, or it holds another kind of model.
    """
    index = read_json(path / "model_index.json", f"{path} is not a model folder in diffusers' layout")
    encoders = [name for name in TOKENIZERS if index.get(name, [None, None]) != [None, None]]
    if not ({"unet", "vae"} <= index.keys() and encoders):
        raise WeightError(f"{path}: {index.get('_class_name')} is another kind of model; use SD 1.x, 2.x or SDXL")
    for part in ("unet", *encoders) if vae else ("unet", "vae", *encoders):
        check_tensor_file(weight_file(path, part, variant))
    for name in encoders:
        _check_tokenizer(path / TOKENIZERS[name])
    vae_path = _vae_folder(vae) if vae else path / "vae"
    readers = {"text_encoder": read_text_config, "text_encoder_2": read_projected_text_config}
    text_specs = {name: _read_spec(path / name / "config.json", readers[name]) for name in encoders}
    folder = ModelFolder(
        path=path,
        variant=variant,
        unet_spec=_read_spec(path / "unet" / "config.json", read_unet_config),
        vae_spec=_read_spec(vae_path / "config.json", read_vae_config),
        text_spec=text_specs.get("text_encoder"),
        text_spec_2=text_specs.get("text_encoder_2"),
        schedule_spec=_read_spec(path / "scheduler" / "scheduler_config.json", read_scheduler_config),
        scheduler_config=read_json(path / "scheduler" / "scheduler_config.json"),
        zeros_for_empty_prompt="text_encoder_2" in encoders and bool(index.get("force_zeros_for_empty_prompt", True)),
        vae_path=vae_path,
    )
    _check_fit(folder)
    return folder


def _vae_folder(path: Path) -> Path:
    """The folder of an autoencoder, or the one inside a model folder; checked."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    check_tensor_file(weight_file(folder.parent, folder.name, None, "vae"))
    return folder


def _check_fit(folder: ModelFolder) -> None:
    path, encoders = folder.path, folder.text_encoders
    unet, latent_channels = folder.unet_spec, folder.vae_spec.latent_channels
    if (unet.in_channels, unet.out_channels) != (latent_channels, latent_channels):
        raise WeightError(
            f"{path}: its unet takes {unet.in_channels} channels and gives {unet.out_channels}, a picture has "
            f"{latent_channels}; use a text-to-image model, not one for inpainting, depth or upscaling"
        )
    width = sum(spec.transformer.hidden_size for spec in (folder.text_spec, folder.text_spec_2) if spec)
    if unet.cross_attention_dim != width:
        raise WeightError(
            f"{path}: its unet reads text of width {unet.cross_attention_dim}, its {' and '.join(encoders)} "
            f"{'gives' if len(encoders) == 1 else 'give'} {width}; take both from one model"
        )
    fits = folder.num_size_ids in SIZE_IDS if folder.text_spec_2 else unet.addition_embed_type is None
    if not fits:
        raise WeightError(
            f"{path}: its unet reads {folder.num_size_ids} numbers of a picture beside the text of its "
            f"{' and '.join(encoders)}; use SD 1.x, 2.x, SDXL or its refiner"
        )


def _check_tokenizer(folder: Path) -> None:
    """With a file cut short, transformers fails, or gives other tokens without a word."""
    vocabulary = read_json(folder / "vocab.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name == "tokenizer_config.json" or (folder / name).exists():
            read_json(folder / name)
    try:
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightError(f"{folder / 'merges.txt'}: missing or not readable; is the download complete?") from error
    made = sum(len(line.split()) == 2 and not line.startswith("#version") for line in merges)
    if made < len(vocabulary) - UNMERGED_TOKENS:
        raise WeightError(f"{folder / 'merges.txt'}: cut short; download it again")


def load_clip(folder: Path) -> CLIPModel:
    """Both towers from a folder in transformers' layout."""
    network = CLIPModel(_read_spec(folder / "config.json", read_clip_config, f"{folder} holds no CLIP model"))
    file = folder / "model.safetensors"
    load_strict(network, read_tensors(file)[0], str(file), ignore_unexpected=BUFFERS)
    return network


def _read_spec(path: Path, read: Callable[[Config], Spec], otherwise: str | None = None) -> Spec:
    """A configuration file as a spec; a key that it lacks is an error that names the file."""
    config = read_json(path, otherwise)
    try:
        return read(config)
    except KeyError as error:
        raise WeightError(f"{path}: {error} is missing; download it again") from error
    except TypeError as error:
        raise WeightError(f"{path}: damaged ({error}); download it again") from error


def weight_file(folder: Path, part: str, variant: str | None, network: str | None = None) -> Path:
    """The safetensors file of a part; `network` says what it is, if its folder has another name.

    Raises:
        WeightError: there is none.
    """
    stem = WEIGHT_NAMES[network or part] + (f".{variant}" if variant else "")
    file = folder / part / f"{stem}.safetensors"
    if not file.is_file():
        held = sorted(p.name for p in (folder / part).glob("*")) if (folder / part).is_dir() else []
        raise WeightError(
            f"{folder}: {part}/{file.name} is missing (found: {', '.join(held) or 'nothing'}); "
            "is the download complete?"
        )
    return file


def read_json(path: Path, otherwise: str | None = None) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightError: missing or not a JSON object; `otherwise` says what that means.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightError(f"{otherwise or path.parent}: {path.name} is missing; is the download complete?") from error
    except (OSError, ValueError) as error:
        raise WeightError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise WeightError(f"{path}: expected a JSON object; download it again")
    return content


def write_json(path: Path, content: Config) -> None:
    """Write a JSON object atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def save_network(
    folder: Path,
    part: str,
    network: nn.Cell,
    config: Config,
    dtype: type[np.floating] = np.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network's config.json and weights into `folder/part`."""
    tensors: dict[str, np.ndarray] = {name: value.astype(dtype) for name, value in read_parameters(network).items()}
    write_json(folder / part / "config.json", config)
    write_tensors(folder / part / f"{WEIGHT_NAMES[part]}.safetensors", tensors, metadata)


def save_index(folder: Path, schedule: NoiseScheduleSpec) -> None:
    """Write what makes saved networks a Stable Diffusion 1 or 2 pipeline: model_index.json and the scheduler."""
    write_json(folder / "scheduler" / "scheduler_config.json", write_scheduler_config(schedule))
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def new_vae_name(name: str) -> str:
    """A name of the autoencoder as current diffusers writes it."""
    for new, old in OLD_VAE_NAMES.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def fit_old_attention(tensors: Mapping[str, np.ndarray], network: nn.Cell) -> dict[str, np.ndarray]:
    """Give attention weights that were stored as 1x1 convolutions, (O, I, 1, 1), their linear shape (O, I)."""
    wanted = public_parameters(network)
    return {
        name: tensor.reshape(tensor.shape[:2])
        if name in wanted and tensor.ndim == 4 and len(wanted[name].shape) == 2 and tensor.shape[2:] == (1, 1)
        else tensor
        for name, tensor in tensors.items()
    }

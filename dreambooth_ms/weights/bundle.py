"""A model folder in diffusers' layout: model_index.json and a folder per network with its config.json and weights.

    unet/  vae/  text_encoder/  tokenizer/  scheduler/        and in SDXL also text_encoder_2/  tokenizer_2/

Reading gives specs and filled networks; writing gives a folder that diffusers loads. A model in a single file of any
format is read as the folder that it would be converted to.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.clip_vocabulary import tokenizer_on_board
from dreambooth_ms.formats.digest import tensors_digest
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.recognise import recognise
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.folder_configs import folder_configs, tokenizers
from dreambooth_ms.formats.folder_layout import INDEX, SCHEDULER, WEIGHT_NAMES, read_json, weight_file, write_json
from dreambooth_ms.formats.model_config import (
    Config,
    Spec,
    is_edm,
    read_clip_config,
    read_config,
    read_projected_text_config,
    read_scheduler_config,
    read_text_config,
    read_unet_config,
    read_vae_config,
    write_scheduler_config,
)
from dreambooth_ms.formats.naming.formats import OLD_VAE_NAMES
from dreambooth_ms.formats.tensor_file import check_weights, read_tensors, write_tensors
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, TextEncoders
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.parameters import public_parameters, read_parameters
from dreambooth_ms.models.specs import ClipTextSpec, UNetSpec, VaeSpec
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import DECODER_LAYERS, ENCODER_LAYERS, AutoencoderKL
from dreambooth_ms.weights.load import load_strict
from dreambooth_ms.weights.model_writing import tokenizers_on_board
from dreambooth_ms.weights.opened_model import ABSENT, OpenedModel, assumed_prediction, notes_as_folder, open_model
from dreambooth_ms.weights.opened_vae import OpenedVae, open_vae

# Buffers that some versions of the libraries wrote into weight files although they hold no knowledge.
BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

UNMERGED_TOKENS = 2 * 256 + 2
"""Tokens of CLIP's vocabulary that no line of merges.txt makes: each byte, within a word and at its end; two marks."""

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text encoders by the names of their folders, and their tokenizers'."""

_TEXT_READERS = {"text_encoder": read_text_config, "text_encoder_2": read_projected_text_config}

NUM_ADD_TIME_IDS = (5, 6)
"""Numbers of a picture that SDXL's UNets read: the refiner's, the base's."""


@dataclass(frozen=True)
class ModelBundle:
    """A checked folder: every part is there and readable; no weight has been read yet."""

    path: Path
    variant: str | None
    unet_spec: UNetSpec
    vae_spec: VaeSpec
    text_spec: ClipTextSpec | None
    text_spec_2: ClipTextSpec | None
    schedule_spec: NoiseScheduleSpec | None
    """None: it was trained in EDM's formulation."""
    scheduler_config: Config
    zeros_for_empty_prompt: bool
    """Whether pictures without a negative prompt are guided by zeros in place of an encoded empty prompt."""
    file: OpenedModel | None = None
    """The model, if it is a single file."""
    vae: OpenedVae | None = None
    """Another model's autoencoder, if it takes the place of its own."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders that there are, by the names of their folders."""
        specs = {"text_encoder": self.text_spec, "text_encoder_2": self.text_spec_2}
        return tuple(name for name, spec in specs.items() if spec)

    @property
    def tokenizer_paths(self) -> tuple[Path, ...]:
        """Where each text encoder's tokenizer is: in the model's folder, or for a single file on board."""
        names = [TOKENIZERS[encoder] for encoder in self.text_encoders]
        if self.file is None:
            return tuple(self.path / name for name in names)
        pad_tokens = tokenizers(self.file.spec)
        return tuple(tokenizer_on_board(pad_tokens[name]) for name in names)

    @property
    def num_add_time_ids(self) -> int:
        """Numbers of a picture that the UNet reads."""
        return self.unet_spec.num_add_time_ids((self.text_spec_2 and self.text_spec_2.projection_dim) or 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about it, one sentence each."""
        return notes_as_folder(self.file) if self.file else ()

    def opened(self) -> OpenedModel:
        """The tensors of the whole model by public name, none of which is read yet."""
        model = self.file or open_model(self.path, self.variant)
        return self.vae.in_place_of_own(model) if self.vae else model

    def weight_file(self, part: str) -> Path:
        """The file with the weights of a network."""
        if part == "vae" and self.vae:
            return self.vae.path
        return self.path if self.file else weight_file(self.path, part, self.variant)

    def tensors(self, part: str) -> dict[str, StoredTensor]:
        """The tensors of a network by their names in it, none of which is read yet."""
        if part == "vae" and self.vae:
            return dict(self.vae.tensors)
        if self.file:
            # Files may hold more of a text encoder than its network reads.
            read = model_shapes(self.file.spec)
            return {name: own for name, own in self.file.of_part(part).items() if f"{part}.{name}" in read}
        stored = open_tensor_file(self.weight_file(part)).tensors
        named = {current_name(part, name): tensor for name, tensor in stored.items()}
        return {name: tensor for name, tensor in named.items() if name not in BUFFERS}

    def digest(self, part: str) -> str:
        """What caches of a network's results are keyed by: the same for the same weights in any format."""
        return tensors_digest(self.tensors(part))

    def config(self, part: str) -> Config:
        """The configuration of a network."""
        if part == "vae" and self.vae:
            return self.vae.config
        return _configs(self.path, self.file)(f"{part}/config.json", None)

    def trained_schedule(self) -> NoiseScheduleSpec:
        """The forward process that training follows.

        Raises:
            WeightError: it was trained in EDM's formulation, which ours does not follow.
        """
        return self.schedule_spec or read_config(self.path, self.scheduler_config, read_scheduler_config)

    @property
    def picture_size(self) -> int:
        """Height and width the model was trained at, in pixels."""
        return self.unet_spec.sample_size * self.vae_spec.downsampling

    @property
    def side_multiple(self) -> int:
        """What the sides of pictures must be multiples of: the networks halve them so often."""
        return self.vae_spec.downsampling * 2 ** (len(self.unet_spec.block_out_channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of this size in pixels.

        Raises:
            WeightError: the networks cannot halve the size as often as they must.
        """
        step = self.side_multiple
        if height % step or width % step:
            raise WeightError(f"{self.path}: {width}x{height} pixels do not fit; sides must be multiples of {step}")
        factor = self.vae_spec.downsampling
        return self.vae_spec.latent_channels, height // factor, width // factor

    def load_unet(self) -> UNet2DConditionModel:
        """The denoiser, filled."""
        return self._load("unet", UNet2DConditionModel(self.unet_spec))

    def load_vae(self, encodes: bool = True, decodes: bool = True) -> AutoencoderKL:
        """The autoencoder, filled; or one of its directions, which takes less memory."""
        unused = (*(() if encodes else ENCODER_LAYERS), *(() if decodes else DECODER_LAYERS))
        return self._load("vae", AutoencoderKL(self.vae_spec, encodes, decodes), unused)

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

    def _load(self, part: str, network: nn.Cell, unused: Collection[str] = ()) -> Any:
        """Fill a network that has all layers of its file but the unused ones."""
        tensors = {name: one for name, one in self.tensors(part).items() if name.partition(".")[0] not in unused}
        load_strict(network, fit_old_attention(tensors, network), str(self.weight_file(part)))
        return network


def open_bundle(path: Path, variant: str | None = None, vae: Path | None = None) -> ModelBundle:
    """Check a folder, or a model in a single file, and read its configurations.

    Args:
        path: the folder or file.
        variant: of a folder's weight files.
        vae: another autoencoder to be used in place of its own: its folder, a model folder with one, or a file that
            holds it alone.

    Raises:
        WeightError: it is no model, a part is missing, or it holds another kind of model.
    """
    file = None if path.is_dir() else _open_file(path)
    config = _configs(path, file)
    index = config(INDEX, f"{path} is not a model folder in diffusers' layout")
    encoders = _encoders(index, file)
    if not ({"unet", "vae"} <= index.keys() and encoders):
        raise WeightError(f"{path}: {index.get('_class_name')} is another kind of model; use SD 1.x, 2.x or SDXL")
    parts = ["unet", *encoders] if vae else ["unet", "vae", *encoders]
    if file:
        _check_file(file, parts)
    else:
        _check_parts(path, variant, parts, encoders)
    unet_spec = _read_spec(path, config, "unet/config.json", read_unet_config)
    vae_spec = file.spec.vae if file else _read_spec(path, config, "vae/config.json", read_vae_config)
    other_vae = open_vae(vae, vae_spec, unet_spec.sample_size * vae_spec.downsampling) if vae else None
    text_specs = {name: _read_spec(path, config, f"{name}/config.json", _TEXT_READERS[name]) for name in encoders}
    folder = ModelBundle(
        path=path,
        variant=variant,
        unet_spec=unet_spec,
        vae_spec=other_vae.spec if other_vae else vae_spec,
        text_spec=text_specs.get("text_encoder"),
        text_spec_2=text_specs.get("text_encoder_2"),
        schedule_spec=_read_spec(path, config, SCHEDULER, _read_schedule),
        scheduler_config=config(SCHEDULER, None),
        zeros_for_empty_prompt="text_encoder_2" in encoders and bool(index.get("force_zeros_for_empty_prompt", True)),
        file=file,
        vae=other_vae,
    )
    _check_fit(folder)
    return folder


def _read_schedule(scheduler_config: Config) -> NoiseScheduleSpec | None:
    return None if is_edm(scheduler_config) else read_scheduler_config(scheduler_config)


def _encoders(index: Config, file: OpenedModel | None) -> list[str]:
    """The text encoders that a folder has, or that a single file should have, by the names of their folders."""
    if file:
        return [name for name in TOKENIZERS if getattr(file.spec, name)]
    return [name for name in TOKENIZERS if index.get(name, ABSENT) != ABSENT]


def _check_parts(path: Path, variant: str | None, parts: Collection[str], encoders: Collection[str]) -> None:
    """A folder must hold the weights of every network, and the tokenizers of its text encoders."""
    for part in parts:
        check_weights(weight_file(path, part, variant))
    for name in encoders:
        _check_tokenizer(path / TOKENIZERS[name])


def _check_fit(folder: ModelBundle) -> None:
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
    fits = folder.num_add_time_ids in NUM_ADD_TIME_IDS if folder.text_spec_2 else unet.addition_embed_type is None
    if not fits:
        raise WeightError(
            f"{path}: its unet reads {folder.num_add_time_ids} numbers of a picture beside the text of its "
            f"{' and '.join(encoders)}; use SD 1.x, 2.x, SDXL or its refiner"
        )


def _open_file(path: Path) -> OpenedModel:
    try:
        recognise(path)
    except WeightError as error:
        raise WeightError(f"{path}: expected a model folder, got a file that holds no model ({error})") from error
    return open_model(path)


def _check_file(file: OpenedModel, parts: Collection[str]) -> None:
    """A single file must hold every network, and words that the vocabulary on board has."""
    file.check()
    lacking = [part for part in parts if part not in file.parts]
    if lacking:
        raise WeightError(
            f"{file.path}: holds no {' and no '.join(lacking)}; convert it into a folder and put them into that"
        )
    unknown = tokenizers(file.spec).keys() - tokenizers_on_board(file).keys()
    if unknown:
        raise WeightError(
            f"{file.path}: its words are not CLIP's; convert it into a folder and put its tokenizer into that"
        )


ConfigReader = Callable[[str, str | None], dict[str, Any]]
"""From a path within the folder, and what it means that it is missing, to the JSON object there."""


def _configs(path: Path, file: OpenedModel | None) -> ConfigReader:
    if file is None:
        return lambda name, otherwise: read_json(path / name, otherwise)
    made = folder_configs(file.spec, file.parts, assumed_prediction(file))
    return lambda name, otherwise: made[name]


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
    otherwise = f"{folder} holds no CLIP model"
    network = CLIPModel(_read_spec(folder, _configs(folder, None), "config.json", read_clip_config, otherwise))
    file = folder / "model.safetensors"
    load_strict(network, read_tensors(file)[0], str(file), ignore_unexpected=BUFFERS)
    return network


def _read_spec(
    path: Path, config: ConfigReader, name: str, read: Callable[[Config], Spec], otherwise: str | None = None
) -> Spec:
    """A configuration file as a spec; a key that it lacks is an error that names the file."""
    return read_config(path / name, config(name, otherwise), read)


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


def current_name(part: str, name: str) -> str:
    """A name in a network's file as current diffusers writes it, and transformers before 5.6."""
    if part == "vae":
        for new, old in OLD_VAE_NAMES.items():
            name = name.replace(f".{old}.", f".{new}.")
    if part.startswith("text_encoder") and name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"text_model.{name}"
    return name


def fit_old_attention(tensors: Mapping[str, StoredTensor], network: nn.Cell) -> dict[str, StoredTensor]:
    """Give attention weights that were stored as 1x1 convolutions, (O, I, 1, 1), their linear shape (O, I)."""
    wanted = public_parameters(network)
    return {
        name: tensor.reshaped(tensor.shape[:2])
        if name in wanted and len(tensor.shape) == 4 and len(wanted[name].shape) == 2 and tensor.shape[2:] == (1, 1)
        else tensor
        for name, tensor in tensors.items()
    }

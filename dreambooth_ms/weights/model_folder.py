"""A model folder in diffusers' layout: model_index.json and a folder per network with its config.json and weights.

    unet/  vae/  text_encoder/  tokenizer/  scheduler/

Reading gives specs and filled networks; writing gives a folder that diffusers loads.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec, PredictionType
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel
from dreambooth_ms.models.specs import (
    ClipSpec,
    ClipTextSpec,
    ClipVisionSpec,
    TransformerSpec,
    UNetSpec,
    VaeSpec,
)
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.weights.atomic import write_bytes
from dreambooth_ms.weights.parameters import load_strict, public_parameters, read_parameters
from dreambooth_ms.weights.tensor_file import read_tensors, write_tensors

Config = Mapping[str, Any]

# Buffers that some versions of the libraries wrote into weight files although they hold no knowledge.
BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

# The names of the autoencoder's attention before diffusers 0.17, still in most published files.
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

# What the configuration of a UNet may say besides the fields of the spec; the first value is diffusers' default.
SUPPORTED_UNET_SETTINGS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}
SUPPORTED_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}

WEIGHT_NAMES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "clip": "model",
}


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder: every part is there and readable; no weight has been read yet."""

    path: Path
    variant: str | None
    unet_spec: UNetSpec
    vae_spec: VaeSpec
    text_spec: ClipTextSpec
    schedule_spec: NoiseScheduleSpec
    scheduler_config: Config

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer's files are."""
        return self.path / "tokenizer"

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
        """The text encoder, filled."""
        return self._load("text_encoder", CLIPTextModel(self.text_spec))

    def _load(self, part: str, network: nn.Cell, rename: Any = None) -> Any:
        file = weight_file(self.path, part, self.variant)
        tensors, _ = read_tensors(file)
        if rename is not None:
            tensors = fit_old_attention({rename(name): tensor for name, tensor in tensors.items()}, network)
        load_strict(network, tensors, str(file), ignore_unexpected=BUFFERS)
        return network


def open_model_folder(path: Path, variant: str | None = None) -> ModelFolder:
    """Check a folder and read its configurations.

    Raises:
        WeightError: it is no model folder, a part is missing, or it holds another kind of model.
    """
    index = read_json(path / "model_index.json", f"{path} is not a model folder in diffusers' layout")
    if "text_encoder_2" in index:
        raise WeightError(f"{path}: this is an SDXL model, which this version cannot train yet; use SD 1.x or 2.x")
    for part in ("unet", "vae", "text_encoder"):
        weight_file(path, part, variant)
    if not (path / "tokenizer" / "vocab.json").is_file():
        raise WeightError(f"{path}: tokenizer/vocab.json is missing; is the download complete?")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    with _complete_configuration(path):
        return ModelFolder(
            path=path,
            variant=variant,
            unet_spec=read_unet_config(read_json(path / "unet" / "config.json")),
            vae_spec=read_vae_config(read_json(path / "vae" / "config.json")),
            text_spec=read_text_config(read_json(path / "text_encoder" / "config.json")),
            schedule_spec=read_scheduler_config(scheduler),
            scheduler_config=scheduler,
        )


def load_clip(folder: Path) -> CLIPModel:
    """Both towers from a folder in transformers' layout."""
    config = read_json(folder / "config.json", f"{folder} holds no CLIP model")
    with _complete_configuration(folder):
        network = CLIPModel(read_clip_config(config))
    file = folder / "model.safetensors"
    load_strict(network, read_tensors(file)[0], str(file), ignore_unexpected=BUFFERS)
    return network


@contextmanager
def _complete_configuration(folder: Path) -> Iterator[None]:
    """Turns a key that a configuration lacks into an error for users."""
    try:
        yield
    except KeyError as error:
        raise WeightError(f"{folder}: a config.json lacks {error}; download it again") from error


def weight_file(folder: Path, part: str, variant: str | None) -> Path:
    """The safetensors file of a part.

    Raises:
        WeightError: there is none.
    """
    stem = WEIGHT_NAMES[part] + (f".{variant}" if variant else "")
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
        raise WeightError(f"{otherwise or path.parent}: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise WeightError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise WeightError(f"{path}: expected a JSON object; download it again")
    return content


def write_json(path: Path, content: Config) -> None:
    """Write a JSON object atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def save_network(
    folder: Path, part: str, network: nn.Cell, config: Config, dtype: type[np.floating] = np.float32
) -> None:
    """Write a network's config.json and weights into `folder/part`."""
    tensors: dict[str, np.ndarray] = {name: value.astype(dtype) for name, value in read_parameters(network).items()}
    write_json(folder / part / "config.json", config)
    write_tensors(folder / part / f"{WEIGHT_NAMES[part]}.safetensors", tensors)


def new_vae_name(name: str) -> str:
    """A name of the autoencoder as current diffusers writes it."""
    for old, new in OLD_VAE_NAMES.items():
        name = name.replace(old, new)
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


def read_unet_config(config: Config) -> UNetSpec:
    """diffusers' UNet2DConditionModel configuration -> spec.

    Raises:
        WeightError: the configuration asks for something these networks do not have.
    """
    for key, supported in SUPPORTED_UNET_SETTINGS.items():
        if config.get(key, supported[0]) not in supported:
            raise WeightError(
                f"unet/config.json: {key} {config[key]!r} is not supported (only {supported[0]!r}); use SD 1.x or 2.x"
            )
    kinds = set(config["down_block_types"]) | set(config["up_block_types"])
    if kinds - SUPPORTED_BLOCKS:
        raise WeightError(f"unet/config.json: blocks {sorted(kinds - SUPPORTED_BLOCKS)} are not supported yet")
    channels = tuple(config["block_out_channels"])
    # diffusers names the number of heads "attention_head_dim" in SD 1 and 2, for historical reasons.
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    return UNetSpec(
        block_out_channels=channels,
        has_attention=tuple(kind.startswith("CrossAttn") for kind in config["down_block_types"]),
        num_heads=(heads,) * len(channels) if isinstance(heads, int) else tuple(heads),
        cross_attention_dim=config["cross_attention_dim"],
        layers_per_block=config["layers_per_block"],
        use_linear_projection=config.get("use_linear_projection", False),
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        norm_num_groups=config.get("norm_num_groups", 32),
        norm_eps=config.get("norm_eps", 1e-5),
        sample_size=config["sample_size"],
    )


def write_unet_config(spec: UNetSpec) -> dict[str, Any]:
    """The inverse of `read_unet_config`."""
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in spec.has_attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(spec.has_attention)]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(spec.num_heads),
        "block_out_channels": list(spec.block_out_channels),
        "center_input_sample": False,
        "cross_attention_dim": spec.cross_attention_dim,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": spec.in_channels,
        "layers_per_block": spec.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": spec.norm_eps,
        "norm_num_groups": spec.norm_num_groups,
        "out_channels": spec.out_channels,
        "sample_size": spec.sample_size,
        "up_block_types": up,
        "use_linear_projection": spec.use_linear_projection,
    }


def read_vae_config(config: Config) -> VaeSpec:
    """diffusers' AutoencoderKL configuration -> spec."""
    return VaeSpec(
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        in_channels=config.get("in_channels", 3),
        latent_channels=config["latent_channels"],
        norm_num_groups=config.get("norm_num_groups", 32),
        scaling_factor=config.get("scaling_factor", 0.18215),
    )


def write_vae_config(spec: VaeSpec, sample_size: int) -> dict[str, Any]:
    """The inverse of `read_vae_config`."""
    levels = len(spec.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(spec.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": spec.in_channels,
        "latent_channels": spec.latent_channels,
        "layers_per_block": spec.layers_per_block,
        "norm_num_groups": spec.norm_num_groups,
        "out_channels": spec.in_channels,
        "sample_size": sample_size,
        "scaling_factor": spec.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def read_text_config(config: Config) -> ClipTextSpec:
    """transformers' CLIPTextModel configuration -> spec."""
    return ClipTextSpec(
        transformer=_read_transformer(config),
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        eos_token_id=config.get("eos_token_id", 2),
    )


def write_text_config(spec: ClipTextSpec, projection_dim: int) -> dict[str, Any]:
    """The inverse of `read_text_config`."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **_write_transformer(spec.transformer),
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "bos_token_id": spec.eos_token_id - 1,
        "eos_token_id": spec.eos_token_id,
        "pad_token_id": spec.eos_token_id,
        "projection_dim": projection_dim,
    }


def read_clip_config(config: Config) -> ClipSpec:
    """transformers' CLIPModel configuration -> spec."""
    vision = config["vision_config"]
    return ClipSpec(
        text=read_text_config(config["text_config"]),
        vision=ClipVisionSpec(
            transformer=_read_transformer(vision), image_size=vision["image_size"], patch_size=vision["patch_size"]
        ),
        projection_dim=config["projection_dim"],
    )


def write_clip_config(spec: ClipSpec) -> dict[str, Any]:
    """The inverse of `read_clip_config`."""
    vision = {
        "model_type": "clip_vision_model",
        **_write_transformer(spec.vision.transformer),
        "image_size": spec.vision.image_size,
        "patch_size": spec.vision.patch_size,
        "projection_dim": spec.projection_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": spec.projection_dim,
        "text_config": write_text_config(spec.text, spec.projection_dim),
        "vision_config": vision,
    }


def read_scheduler_config(config: Config) -> NoiseScheduleSpec:
    """Any diffusers scheduler's configuration -> the forward process.

    Raises:
        WeightError: the model predicts something else than noise or velocity.
    """
    kind = config.get("prediction_type", "epsilon")
    if kind not in {member.value for member in PredictionType}:
        raise WeightError(f"scheduler_config.json: prediction_type {kind!r}: expected epsilon or v_prediction")
    return NoiseScheduleSpec(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 0.00085),
        beta_end=config.get("beta_end", 0.012),
        beta_schedule=config.get("beta_schedule", "scaled_linear"),
        prediction_type=PredictionType(kind),
    )


def _read_transformer(config: Config) -> TransformerSpec:
    return TransformerSpec(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        hidden_act=config.get("hidden_act", "quick_gelu"),
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
    )


def _write_transformer(spec: TransformerSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "hidden_act": spec.hidden_act,
        "layer_norm_eps": spec.layer_norm_eps,
    }

"""The config.json files of diffusers and transformers -> specs, and back."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec, PredictionType
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.specs import (
    SD_VAE,
    ClipSpec,
    ClipTextSpec,
    ClipVisionSpec,
    TransformerSpec,
    UNetSpec,
    VaeSpec,
)

Config = Mapping[str, Any]
Spec = TypeVar("Spec")

# What the configuration of a UNet may say besides the fields of the spec; the first value is diffusers' default.
SUPPORTED_UNET_SETTINGS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
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
}
SUPPORTED_BETA_SCHEDULES = ("scaled_linear", "linear")
SUPPORTED_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}


def read_config(path: Path, content: Config, read: Callable[[Config], Spec]) -> Spec:
    """The spec that a configuration file says, by one of the readers below.

    Raises:
        WeightError: a key is missing, a value is of another kind, or the reader refuses it; the message names the file.
    """
    try:
        return read(content)
    except WeightError as error:
        raise WeightError(f"{path}: {error}") from error
    except KeyError as error:
        raise WeightError(f"{path}: {error} is missing; download it again") from error
    except TypeError as error:
        raise WeightError(f"{path}: damaged ({error}); download it again") from error


def read_unet_config(config: Config) -> UNetSpec:
    """diffusers' UNet2DConditionModel configuration -> spec.

    Raises:
        WeightError: the configuration asks for something these networks do not have.
    """
    for key, supported in SUPPORTED_UNET_SETTINGS.items():
        if config.get(key, supported[0]) not in supported:
            values = " or ".join(map(repr, supported))
            raise WeightError(f"{key} {config[key]!r} is not supported (only {values}); use SD 1.x, 2.x or SDXL")
    kinds = set(config["down_block_types"]) | set(config["up_block_types"])
    if kinds - SUPPORTED_BLOCKS:
        unknown = ", ".join(sorted(kinds - SUPPORTED_BLOCKS))
        raise WeightError(f"blocks {unknown} are not supported yet; use SD 1.x, 2.x or SDXL")
    channels = tuple(config["block_out_channels"])
    # diffusers names the number of heads "attention_head_dim" in SD 1 and 2, for historical reasons.
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    layers = config.get("transformer_layers_per_block", 1)
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
        transformer_layers_per_block=layers if isinstance(layers, int) else tuple(layers),
        addition_embed_type=config.get("addition_embed_type"),
        addition_time_embed_dim=config.get("addition_time_embed_dim"),
        projection_class_embeddings_input_dim=config.get("projection_class_embeddings_input_dim"),
    )


def write_unet_config(spec: UNetSpec) -> dict[str, Any]:
    """The inverse of `read_unet_config`."""
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in spec.has_attention]
    layers = spec.transformer_layers_per_block
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(spec.has_attention)]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": spec.addition_embed_type,
        "addition_time_embed_dim": spec.addition_time_embed_dim,
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
        "projection_class_embeddings_input_dim": spec.projection_class_embeddings_input_dim,
        "sample_size": spec.sample_size,
        "transformer_layers_per_block": layers if isinstance(layers, int) else list(layers),
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
        **read_latent_settings(config, config["latent_channels"]),
    )


def read_latent_settings(config: Config, channels: int) -> dict[str, Any]:
    """What a VaeSpec says of the scale, mean and deviation of latents, from diffusers' AutoencoderKL configuration.

    Raises:
        TypeError: a value is no number, or there is not one for each of the channels.
    """
    factor = _numbers([config.get("scaling_factor", SD_VAE.scaling_factor)], "scaling_factor", 1)[0]
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    return {
        "scaling_factor": factor,
        "latents_mean": _numbers(mean, "latents_mean", channels) if mean else None,
        "latents_std": _numbers(std, "latents_std", channels) if std else None,
    }


_LARGEST = 1e30
"""Of numbers that can be calculated with in float32; neither infinity nor what is no number is below."""


def _numbers(values: Any, name: str, count: int) -> tuple[float, ...]:
    numbers = [value for value in values if isinstance(value, (int, float)) and abs(value) < _LARGEST]
    if len(numbers) != len(values) or len(values) != count:
        raise TypeError(f"{name}: expected {count} numbers, got {values}")
    return tuple(numbers)


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
        "latents_mean": spec.latents_mean and list(spec.latents_mean),
        "latents_std": spec.latents_std and list(spec.latents_std),
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


def read_projected_text_config(config: Config) -> ClipTextSpec:
    """transformers' CLIPTextModelWithProjection configuration -> spec."""
    return replace(read_text_config(config), projection_dim=config["projection_dim"])


def write_text_config(spec: ClipTextSpec, projection_dim: int) -> dict[str, Any]:
    """The inverse of `read_text_config`, or of `read_projected_text_config` for a spec with a projection."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if spec.projection_dim else "CLIPTextModel"],
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


def is_edm(scheduler_config: Config) -> bool:
    """Whether a diffusers scheduler is for models trained in EDM's formulation (Karras et al., 2022)."""
    return str(scheduler_config.get("_class_name")).startswith("EDM")


def read_scheduler_config(config: Config) -> NoiseScheduleSpec:
    """Any diffusers scheduler's configuration but EDM's -> the forward process.

    Raises:
        WeightError: the model predicts something else than noise or velocity, or has another noise schedule.
    """
    if is_edm(config):
        raise WeightError(
            f"{config['_class_name']}: models trained in EDM's formulation can be drawn with, not trained; "
            "use SD 1.x, 2.x or SDXL"
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in {member.value for member in PredictionType}:
        raise WeightError(f"prediction_type {kind!r}: expected epsilon or v_prediction; use SD 1.x, 2.x or SDXL")
    betas = config.get("beta_schedule", "scaled_linear")
    if betas not in SUPPORTED_BETA_SCHEDULES:
        raise WeightError(
            f"beta_schedule {betas!r}: expected {' or '.join(SUPPORTED_BETA_SCHEDULES)}; use SD 1.x, 2.x or SDXL"
        )
    return NoiseScheduleSpec(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 0.00085),
        beta_end=config.get("beta_end", 0.012),
        beta_schedule=betas,
        prediction_type=PredictionType(kind),
    )


def write_scheduler_config(spec: NoiseScheduleSpec) -> dict[str, Any]:
    """The inverse of `read_scheduler_config`, for DDIM as Stable Diffusion 1 has it."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": spec.beta_end,
        "beta_schedule": spec.beta_schedule,
        "beta_start": spec.beta_start,
        "clip_sample": False,
        "num_train_timesteps": spec.num_train_timesteps,
        "prediction_type": spec.prediction_type.value,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


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

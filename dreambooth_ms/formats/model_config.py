"""The config.json files of diffusers and transformers -> specs, and back.

The fields of the specs have the names of the configurations' keys, and their defaults, unless a reader says otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec, PredictionType
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.specs import ClipSpec, ClipTextSpec, ClipVisionSpec, TransformerSpec, UNetSpec, VaeSpec

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
    return _read(
        UNetSpec,
        config,
        *("layers_per_block", "in_channels", "out_channels", "sample_size"),
        block_out_channels=channels,
        has_attention=tuple(kind.startswith("CrossAttn") for kind in config["down_block_types"]),
        num_heads=(heads,) * len(channels) if isinstance(heads, int) else tuple(heads),
    )


def write_unet_config(spec: UNetSpec) -> dict[str, Any]:
    """The inverse of `read_unet_config`."""
    config = _config_of(
        spec,
        _class_name="UNet2DConditionModel",
        act_fn="silu",
        attention_head_dim=list(spec.num_heads),
        center_input_sample=False,
        down_block_types=[f"{'CrossAttn' * attends}DownBlock2D" for attends in spec.has_attention],
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        mid_block_scale_factor=1,
        up_block_types=[f"{'CrossAttn' * attends}UpBlock2D" for attends in reversed(spec.has_attention)],
    )
    del config["has_attention"], config["num_heads"]
    return config


def read_vae_config(config: Config) -> VaeSpec:
    """diffusers' AutoencoderKL configuration -> spec."""
    return _read(
        VaeSpec,
        config,
        *("layers_per_block", "latent_channels"),
        block_out_channels=tuple(config["block_out_channels"]),
        **read_latent_settings(config, config["latent_channels"]),
    )


def read_latent_settings(config: Config, channels: int) -> dict[str, Any]:
    """What a VaeSpec says of the scale, mean and deviation of latents, from diffusers' AutoencoderKL configuration.

    Raises:
        TypeError: a value is not a finite number, or there is not one for each of the channels.
    """
    factor = _numbers([config.get("scaling_factor", VaeSpec.scaling_factor)], "scaling_factor", 1)[0]
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    return {
        "scaling_factor": factor,
        "latents_mean": _numbers(mean, "latents_mean", channels) if mean else None,
        "latents_std": _numbers(std, "latents_std", channels) if std else None,
    }


_LARGEST = 1e30
"""Of numbers that can be calculated with in float32; neither infinity nor NaN is below."""


def _numbers(values: Any, name: str, count: int) -> tuple[float, ...]:
    numbers = [value for value in values if isinstance(value, (int, float)) and abs(value) < _LARGEST]
    if len(numbers) != len(values) or len(values) != count:
        raise TypeError(f"{name}: expected {count} numbers, got {values}")
    return tuple(numbers)


def write_vae_config(spec: VaeSpec, sample_size: int) -> dict[str, Any]:
    """The inverse of `read_vae_config`."""
    levels = len(spec.block_out_channels)
    return _config_of(
        spec,
        _class_name="AutoencoderKL",
        act_fn="silu",
        down_block_types=["DownEncoderBlock2D"] * levels,
        out_channels=spec.in_channels,
        sample_size=sample_size,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )


def read_text_config(config: Config) -> ClipTextSpec:
    """transformers' CLIPTextModel configuration -> spec."""
    own = {"transformer": _read(TransformerSpec, config), "eos_token_id": config.get("eos_token_id", 2)}
    return _read(ClipTextSpec, config, "vocab_size", "max_position_embeddings", **own, projection_dim=None)


def read_projected_text_config(config: Config) -> ClipTextSpec:
    """transformers' CLIPTextModelWithProjection configuration -> spec."""
    return replace(read_text_config(config), projection_dim=config["projection_dim"])


def write_text_config(spec: ClipTextSpec, projection_dim: int) -> dict[str, Any]:
    """The inverse of `read_text_config`, or of `read_projected_text_config` for a spec with a projection."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if spec.projection_dim else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **vars(spec.transformer),
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
        vision=_read(ClipVisionSpec, vision, "image_size", "patch_size", transformer=_read(TransformerSpec, vision)),
        projection_dim=config["projection_dim"],
    )


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
            f"{config['_class_name']}: models trained in EDM's formulation can be sampled, not trained; "
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
    return _read(NoiseScheduleSpec, config, prediction_type=PredictionType(kind))


def write_scheduler_config(spec: NoiseScheduleSpec) -> dict[str, Any]:
    """The inverse of `read_scheduler_config`, for DDIM as Stable Diffusion 1 has it."""
    return _config_of(
        spec,
        _class_name="DDIMScheduler",
        clip_sample=False,
        prediction_type=spec.prediction_type.value,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _read(kind: type[Spec], config: Config, *required: str, **own: Any) -> Spec:
    """A spec from the keys that its fields are named for; `own` are values of fields that are not read so.

    Raises:
        KeyError: a key is missing that is required, or that has no default.
    """
    read = [one for one in fields(kind) if one.name not in own]  # type: ignore[arg-type]
    wanted = [one.name for one in read if one.name in {*config, *required} or one.default is MISSING]
    values = {name: config[name] for name in wanted} | own
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _config_of(spec: Any, **more: Any) -> dict[str, Any]:
    """The fields of a spec as JSON has them, and more keys, in alphabetical order."""
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(spec).items()}
    return dict(sorted((own | more).items()))

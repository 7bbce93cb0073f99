"""The JSON files of a model folder -> specs; and back, for a model that came without them.

The fields of the specs have the names of the configurations' keys, and their defaults, unless a reader says otherwise.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from dreambooth_ms.diffusion import EdmSpec, NoiseSchedule, NoiseScheduleSpec
from dreambooth_ms.errors import UserError, WeightError
from dreambooth_ms.formats.config_keys import TABLES, check_keys
from dreambooth_ms.formats.folder_layout import ABSENT, INDEX, NETWORKS, SCHEDULER, TOKENIZERS
from dreambooth_ms.models import specs
from dreambooth_ms.models.specs import FAMILIES, ClipTextSpec, Family, ModelSpec, TransformerSpec, UNetSpec, VaeSpec

Config = Mapping[str, Any]
Spec = TypeVar("Spec")
Files = dict[str, dict[str, Any]]
"""Path within a model folder -> content."""

EDM_SCHEDULER: Config = FAMILIES["Playground v2.5"]["scheduler"]

BETAS = {kind: own["betas"] for own in TABLES["scheduler"]["classes"] for kind in own["names"]} | {None: {}}
"""What a class of diffusers takes for betas where a configuration says none; without a class, Stable Diffusion's."""


def read_config(path: Path, content: Config, read: Callable[[Config], Spec], check_sizes: bool = True) -> Spec:
    """The spec that a configuration file says, by one of the readers below. WeightError, which names the file, if a key
    is missing or not known, a value is not supported, or no network has such sizes (with `check_sizes`)."""
    try:
        spec = read(content)
    except UserError as error:
        raise WeightError(f"{path}: {error}") from error
    except KeyError as error:
        raise WeightError(f"{path}: {error} is missing; download it again") from error
    problems = "; ".join(getattr(spec, "problems", list)())
    if problems and check_sizes:
        raise WeightError(f"{path}: {problems}: no network has these sizes; take the original model's configuration")
    return spec


def read_unet_config(config: Config) -> UNetSpec:
    """diffusers' UNet2DConditionModel configuration -> spec; WeightError if it asks for what these networks lack."""
    check_keys(config, "unet")
    has_attention = tuple("CrossAttn" in kind for kind in config["down_block_types"])
    simple = "Simple" in config.get("mid_block_type", "")
    channels = tuple(config["block_out_channels"])
    # diffusers names the number of heads "attention_head_dim" in SD 1 and 2, for historical reasons.
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    heads = (heads,) * len(channels) if isinstance(heads, int) else tuple(heads)
    spec = _read(
        UNetSpec,
        config,
        *("layers_per_block", "in_channels", "out_channels", "sample_size"),
        block_out_channels=channels,
        has_attention=has_attention,
        num_heads=tuple(width // head for width, head in zip(channels, heads, strict=False)) if simple else heads,
        simple_blocks=simple,
    )
    if any(list(config[key]) != kinds for key, kinds in _block_types(spec).items()):
        raise WeightError("up_block_types is not down_block_types in reverse, or mid_block_type is of other blocks")
    # diffusers takes the widths of heads in one order on both ways.
    sizes = [size for size, attends in zip(channels, (*has_attention[:-1], True), strict=False) if attends]
    if simple and (len({*heads}) > 1 or any(size % head for size in sizes for head in heads)):
        raise WeightError(f"attention_head_dim: expected one divisor of {sizes}, got {config['attention_head_dim']}")
    for key in () if simple else OF_SIMPLE_BLOCKS:
        if (value := getattr(spec, key)) != getattr(UNetSpec, key):
            raise WeightError(f"{key}: expected {getattr(UNetSpec, key)} beside blocks of these types, got {value!r}")
    if config.get("mid_block_only_cross_attention") is False and spec.only_cross_attention:
        raise WeightError("mid_block_only_cross_attention: expected null beside only_cross_attention, got False")
    if config.get("encoder_hid_dim_type") and not spec.encoder_hid_dim:
        raise WeightError("encoder_hid_dim_type is given without encoder_hid_dim; download it again")
    return spec


_UNET_KEYS = [one.name for one in fields(UNetSpec)]
OF_SIMPLE_BLOCKS = _UNET_KEYS[_UNET_KEYS.index("simple_blocks") + 1 :]
"""Fields that count for those blocks alone: diffusers ignores some in others."""


def _block_types(spec: UNetSpec) -> dict[str, list[str]]:
    """diffusers' names of the blocks, on both ways."""
    attend = "SimpleCrossAttn" if spec.simple_blocks else "CrossAttn"
    down, up = ("ResnetDownsample", "ResnetUpsample") if spec.simple_blocks else ("Down", "Up")
    return {
        "down_block_types": [f"{attend}DownBlock2D" if own else f"{down}Block2D" for own in spec.has_attention],
        "up_block_types": [f"{attend}UpBlock2D" if own else f"{up}Block2D" for own in reversed(spec.has_attention)],
    }


def write_unet_config(spec: UNetSpec) -> dict[str, Any]:
    """The inverse of `read_unet_config`."""
    own: dict[str, Any] = {"attention_head_dim": list(spec.num_heads)}
    if spec.simple_blocks:
        width = spec.block_out_channels[-1] // spec.num_heads[-1]
        own = {"attention_head_dim": width, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    config = config_of("unet", spec, _class_name="UNet2DConditionModel", **_block_types(spec), **own)
    return {key: value for key, value in config.items() if key not in ("has_attention", "num_heads", "simple_blocks")}


def read_vae_config(config: Config) -> VaeSpec:
    """diffusers' AutoencoderKL configuration -> spec."""
    check_keys(config, "vae")
    required = ("layers_per_block", "latent_channels", "block_out_channels")
    spec = _read(VaeSpec, config, *required, **read_latent_settings(config, config["latent_channels"]))
    for key in ("down_block_types", "up_block_types"):
        if len(config.get(key, spec.block_out_channels)) != len(spec.block_out_channels):
            raise WeightError(f"{key} and block_out_channels have not as many entries; download it again")
    if config.get("out_channels", spec.in_channels) != spec.in_channels:
        raise WeightError(f"out_channels {config['out_channels']} is not in_channels {spec.in_channels}")
    return spec


def read_latent_settings(config: Config, channels: int) -> dict[str, Any]:
    """What a VaeSpec says of the scale, mean and deviation of latents, from diffusers' AutoencoderKL configuration;
    WeightError if a value is not a finite number, or there is not one for each of the channels."""
    names = ("scaling_factor", "latents_mean", "latents_std")
    check_keys({name: config[name] for name in names if name in config}, "vae")
    statistics = {name: tuple(config[name]) if config.get(name) else None for name in names[1:]}
    _check_counts(statistics, channels)
    return {"scaling_factor": config.get("scaling_factor", VaeSpec.scaling_factor), **statistics}


def _check_counts(lists: Mapping[str, Sequence[float] | None], expected: int) -> None:
    for name, values in lists.items():
        if values is not None and len(values) != expected:
            raise WeightError(f"{name}: expected {expected} numbers, got {len(values)}; download it again")


def write_vae_config(spec: VaeSpec, sample_size: int) -> dict[str, Any]:
    """The inverse of `read_vae_config`."""
    levels = len(spec.block_out_channels)
    return config_of(
        "vae",
        spec,
        _class_name="AutoencoderKL",
        down_block_types=["DownEncoderBlock2D"] * levels,
        out_channels=spec.in_channels,
        sample_size=sample_size,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )


def read_text_config(config: Config) -> ClipTextSpec:
    """transformers' CLIPTextModel configuration -> spec."""
    check_keys(config, "text")
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


def read_t5_config(config: Config) -> specs.T5Spec:
    """transformers' T5EncoderModel configuration, or that of a whole T5 -> spec; WeightError if it is no T5 v1.1."""
    # Without the key it is the first T5, with another feed-forward part.
    check_keys({"feed_forward_proj": "relu", **config}, "t5")
    return _read(specs.T5Spec, config)


def read_roberta_config(config: Config) -> specs.RobertaSpec:
    """FlagAI's RobertaSeriesModelWithTransformation configuration -> spec."""
    check_keys(config, "roberta")
    # Of these, transformers' XLM-R and our tower say otherwise where nothing is said.
    tower = _read(TransformerSpec, config, "hidden_act", "layer_norm_eps")
    return _read(specs.RobertaSpec, config, transformer=tower)


def read_any_text_config(config: Config) -> specs.TextSpec:
    """The configuration of a text encoder of whatever kind it says it is -> spec; if it says none, CLIP's."""
    return _reader_of_text(config)(config)


def _reader_of_text(config: Config) -> Callable[[Config], Any]:
    said, kinds = str((config.get("model_type"), config.get("architectures"))), _OTHER_TEXTS.items()
    return next((read for kind, read in kinds if kind.lower() in said.lower()), read_text_config)


_OTHER_TEXTS: Mapping[str, Callable[[Config], Any]] = {"T5": read_t5_config, "RobertaSeries": read_roberta_config}

NETWORK_READERS: Mapping[str, Callable[[Config], Any]] = {
    "unet": read_unet_config,
    "vae": read_vae_config,
    "text_encoder": read_any_text_config,
    "text_encoder_2": read_projected_text_config,
}
"""By the names of the networks' folders."""


def family_of(configs: Mapping[str, Config]) -> Family | None:
    """The family that the configurations of a folder's networks tell: DeepFloyd IF by its UNet's blocks, AltDiffusion
    by its text encoder. None: names and shapes tell it."""
    if "Simple" in str(configs.get("unet", {}).get("mid_block_type")):
        return Family.IF
    return Family.ALT if _reader_of_text(configs.get("text_encoder", {})) is read_roberta_config else None


def read_clip_config(config: Config) -> specs.ClipSpec:
    """transformers' CLIPModel configuration -> spec."""
    check_keys(config, "clip")
    vision = config["vision_config"]
    check_keys(vision, "vision")
    tower = _read(TransformerSpec, vision)
    return specs.ClipSpec(
        text=read_text_config(config["text_config"]),
        vision=_read(specs.ClipVisionSpec, vision, "image_size", "patch_size", transformer=tower),
        projection_dim=config["projection_dim"],
    )


def read_vit_config(config: Config) -> specs.ClipVisionSpec:
    """transformers' ViTModel configuration -> spec."""
    check_keys(config, "vit")
    transformer = _read(TransformerSpec, config, "hidden_act", "layer_norm_eps")
    return _read(specs.ClipVisionSpec, config, "image_size", "patch_size", transformer=transformer)


def read_image_statistics(config: Config) -> list[list[float]]:
    """Mean and deviation of the three colours, from the configuration of a preprocessing in transformers."""
    statistics = {name: config[name] for name in ("image_mean", "image_std")}
    check_keys(statistics, "image statistics")
    _check_counts(statistics, 3)
    return list(statistics.values())


def is_edm(scheduler_config: Config) -> bool:
    """Whether a diffusers scheduler is for models trained in EDM's formulation (Karras et al., 2022)."""
    return str(scheduler_config.get("_class_name")).startswith("EDM")


def read_scheduler_config(config: Config) -> NoiseScheduleSpec | EdmSpec:
    """Any diffusers scheduler's configuration -> the forward process; WeightError if the model was trained otherwise,
    or a key is not known or not supported; ConfigError if its noise is none."""
    name = config.get("_class_name")
    kind = None if name is None else str(name).removeprefix("Flax").removesuffix("Scheduler")
    if is_edm(config):
        check_keys(config, "edm scheduler")
        return _read(EdmSpec, config)
    if kind not in BETAS:
        raise WeightError(
            f"{name}: for models that are trained in another way (flow matching, or one that is not known); "
            "use SD 1.x, 2.x, SDXL, IF or AltDiffusion"
        )
    check_keys(config, "scheduler")
    switches = [key for key in ("karras", "exponential", "beta") if config.get(f"use_{key}_sigmas")]
    if len(switches) > 1:
        raise WeightError(f"use_{switches[0]}_sigmas and use_{switches[1]}_sigmas are both true; set one to false")
    spec = _read(NoiseScheduleSpec, {**BETAS[kind], **config})
    NoiseSchedule.from_spec(spec)
    return spec


def write_scheduler_config(spec: NoiseScheduleSpec) -> dict[str, Any]:
    """The inverse of `read_scheduler_config`, for DDIM as Stable Diffusion 1 has it.

    With zero terminal SNR steps begin where there is nothing but noise (Lin et al., 2024, section 3.3).
    """
    own: dict[str, Any] = {"_class_name": "DDIMScheduler"}
    own |= {"timestep_spacing": "trailing"} if spec.rescale_betas_zero_snr else {}
    config, rare = config_of("scheduler", spec, **own), ("trained_betas", "rescale_betas_zero_snr")
    return {key: value for key, value in config.items() if value or key not in rare}


def folder_configs(model: ModelSpec, parts: Collection[str], prediction_type: str, zero_snr: bool = False) -> Files:
    """The files of a folder with these networks of a model; with `zero_snr`, its last timestep holds no signal."""
    unet = model.unet
    if model.family is Family.SD2 and prediction_type == "epsilon":
        unet = replace(unet, sample_size=64)  # Those that predict velocity have 96.
    schedule = NoiseScheduleSpec(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    files: Files = {}
    if "unet" in parts:
        files["unet/config.json"] = write_unet_config(unet)
    if "vae" in parts:
        vae = write_vae_config(model.vae, unet.sample_size * model.vae.downsampling)
        files["vae/config.json"] = vae | FAMILIES[model.family.value]["vae"]
    for part in TOKENIZERS:
        spec = getattr(model, part)
        if spec and part in parts:
            width = spec.projection_dim or spec.transformer.hidden_size
            files[f"{part}/config.json"] = write_text_config(spec, width)
    return files | pipeline_configs(model, parts, schedule)


def pipeline_configs(model: ModelSpec, parts: Collection[str], schedule: NoiseScheduleSpec) -> Files:
    """The files that make the folders of these parts a pipeline: its index and its scheduler."""
    own = FAMILIES[model.family.value]
    written = write_scheduler_config(schedule)
    scheduler = own["scheduler"] | written | {"_class_name": own["scheduler"]["_class_name"]}
    if model.vae.latents_mean:
        scheduler = dict(EDM_SCHEDULER)
    absent = {component for part in NETWORKS if part not in parts for component in (part, TOKENIZERS.get(part))}
    index = {
        "_class_name": own["pipelines"].get(model.unet.in_channels, own["pipelines"][4]),
        **{name: ABSENT if name in absent else content for name, content in own["index"].items()},
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    return {INDEX: index, SCHEDULER: scheduler}


def _read(kind: type[Spec], config: Config, *required: str, **own: Any) -> Spec:
    """A spec from the keys that its fields are named for, and from `own`; KeyError if one lacks that must be there."""
    read = [one for one in fields(kind) if one.name not in own]  # type: ignore[arg-type]
    wanted = [one.name for one in read if one.name in {*config, *required} or one.default is MISSING]
    values = {name: config[name] for name in wanted} | own
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def config_of(table: str, spec: Any, **more: Any) -> dict[str, Any]:
    """The fields of a spec as JSON has them, what its table says, and more keys, in alphabetical order."""
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(spec).items()}
    return dict(sorted((own | TABLES[table]["written"] | more).items()))

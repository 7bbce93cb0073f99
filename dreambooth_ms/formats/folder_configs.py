"""The JSON files of a model folder, for a model that came without them."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec
from dreambooth_ms.formats import model_config
from dreambooth_ms.formats.clip_tokenizer import END, SIZE
from dreambooth_ms.formats.folder_layout import ABSENT, INDEX, NETWORKS, SCHEDULER, TOKENIZERS
from dreambooth_ms.models.specs import Family, ModelSpec

Files = dict[str, dict[str, Any]]
"""Path within the folder -> content."""

_PIPELINES = {
    (Family.SD1, 4): "StableDiffusionPipeline",
    (Family.SD2, 4): "StableDiffusionPipeline",
    (Family.SDXL, 4): "StableDiffusionXLPipeline",
    (Family.SDXL_REFINER, 4): "StableDiffusionXLImg2ImgPipeline",
    (Family.SD1, 8): "StableDiffusionInstructPix2PixPipeline",
    (Family.SD1, 9): "StableDiffusionInpaintPipeline",
    (Family.SD2, 5): "StableDiffusionDepth2ImgPipeline",
    (Family.SD2, 9): "StableDiffusionInpaintPipeline",
    (Family.SDXL, 9): "StableDiffusionXLInpaintPipeline",
}
"""By the channels that the UNet takes; others are treated as 4."""

EDM_SCHEDULER: Mapping[str, Any] = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
}
"""Of Playground v2.5, the one model whose latents have a mean and deviation of their own, as diffusers has it."""


def folder_configs(model: ModelSpec, parts: Collection[str], prediction_type: str, zero_snr: bool = False) -> Files:
    """The files of a folder in which these parts of a model are.

    Args:
        model: its sizes.
        parts: the networks that are there.
        prediction_type: "epsilon" or "v_prediction".
        zero_snr: whether the last timestep holds no signal.
    """
    unet = model.unet
    if model.family is Family.SD2 and prediction_type == "epsilon":
        unet = replace(unet, sample_size=64)  # Those that predict velocity have 96.
    schedule = NoiseScheduleSpec(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    files = pipeline_configs(model, parts, schedule)
    if "unet" in parts:
        files["unet/config.json"] = model_config.write_unet_config(unet)
    if "vae" in parts:
        pixels = unet.sample_size * model.vae.downsampling
        more = {"force_upcast": True} if _is_xl(model) else {}
        files["vae/config.json"] = model_config.write_vae_config(model.vae, pixels) | more
    for part in TOKENIZERS:
        spec = getattr(model, part)
        if spec and part in parts:
            width = spec.projection_dim or spec.transformer.hidden_size
            files[f"{part}/config.json"] = model_config.write_text_config(spec, width)
    return files


def pipeline_configs(model: ModelSpec, parts: Collection[str], schedule: NoiseScheduleSpec) -> Files:
    """The files that make the folders of these parts a pipeline: its index and its scheduler."""
    scheduler = dict(EDM_SCHEDULER) if model.vae.latents_mean else model_config.write_scheduler_config(schedule)
    if _is_xl(model) and not model.vae.latents_mean:
        # It keeps keys of other schedulers, as the published one does: DDIM would clip latents without them.
        scheduler = {"timestep_spacing": "leading"} | scheduler | {"_class_name": "EulerDiscreteScheduler"}
    return {INDEX: _index(model, parts, scheduler["_class_name"]), SCHEDULER: scheduler}


def pad_tokens(model: ModelSpec) -> dict[str, str | None]:
    """A model's text encoders -> what their tokenizers fill a short prompt with; None if their words are not CLIP's."""
    trained = {"text_encoder": "!" if model.family is Family.SD2 else END, "text_encoder_2": "!"}
    specs = {part: getattr(model, part) for part in trained}
    return {part: trained[part] if spec.vocab_size == SIZE else None for part, spec in specs.items() if spec}


def _is_xl(model: ModelSpec) -> bool:
    return model.family in (Family.SDXL, Family.SDXL_REFINER)


def _index(model: ModelSpec, parts: Collection[str], scheduler: str) -> dict[str, Any]:
    components = {
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not _is_xl(model):
        del components["text_encoder_2"], components["tokenizer_2"]
    absent = {component for part in NETWORKS if part not in parts for component in (part, TOKENIZERS.get(part))}
    pipeline = _PIPELINES.get((model.family, model.unet.in_channels), _PIPELINES[model.family, 4])
    index: dict[str, Any] = {"_class_name": pipeline}
    index |= {part: ABSENT if part in absent else library for part, library in components.items()}
    if not _is_xl(model):
        return index | {"feature_extractor": ABSENT, "requires_safety_checker": False, "safety_checker": ABSENT}
    if model.family is Family.SDXL_REFINER:
        return index | {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    return index | {"force_zeros_for_empty_prompt": True}

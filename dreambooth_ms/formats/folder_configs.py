"""The JSON files of a model folder, for a model that came without them."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec, PredictionType
from dreambooth_ms.formats.clip_vocabulary import END
from dreambooth_ms.formats.folder_layout import INDEX, SCHEDULER
from dreambooth_ms.formats.model_config import (
    write_scheduler_config,
    write_text_config,
    write_unet_config,
    write_vae_config,
)
from dreambooth_ms.models.specs import Family, ModelSpec

Files = dict[str, dict[str, Any]]
"""Path within the folder -> content."""

_PIPELINES = {
    Family.SD1: "StableDiffusionPipeline",
    Family.SD2: "StableDiffusionPipeline",
    Family.SDXL: "StableDiffusionXLPipeline",
    Family.SDXL_REFINER: "StableDiffusionXLImg2ImgPipeline",
}
_SPECIAL_PIPELINES = {
    (Family.SD1, 8): "StableDiffusionInstructPix2PixPipeline",
    (Family.SD1, 9): "StableDiffusionInpaintPipeline",
    (Family.SD2, 5): "StableDiffusionDepth2ImgPipeline",
    (Family.SD2, 9): "StableDiffusionInpaintPipeline",
    (Family.SDXL, 9): "StableDiffusionXLInpaintPipeline",
}
"""By the channels that the UNet takes."""

EDM_SCHEDULER = {
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

_SD2_NOISE_SAMPLE_SIZE = 64
"""Latents of the SD 2.x models that predict noise; those that predict velocity have 96."""


def folder_configs(model: ModelSpec, parts: Collection[str], prediction_type: str) -> Files:
    """The files of a folder in which these parts of a model are.

    Args:
        model: the networks.
        parts: the parts that are there.
        prediction_type: "epsilon" or "v_prediction".
    """
    unet = model.unet
    if model.family is Family.SD2 and prediction_type == PredictionType.EPSILON.value:
        unet = replace(unet, sample_size=_SD2_NOISE_SAMPLE_SIZE)
    pixels = unet.sample_size * model.vae.downsampling
    files = {
        INDEX: _index(model, parts),
        SCHEDULER: _scheduler(model, prediction_type),
        "unet/config.json": write_unet_config(unet),
        "vae/config.json": write_vae_config(model.vae, pixels) | ({"force_upcast": True} if _is_xl(model) else {}),
    }
    for part, spec in (("text_encoder", model.text_encoder), ("text_encoder_2", model.text_encoder_2)):
        if spec:
            files[f"{part}/config.json"] = write_text_config(spec, spec.projection_dim or spec.transformer.hidden_size)
    return {name: content for name, content in files.items() if _is_wanted(name, parts)}


def tokenizers(model: ModelSpec) -> dict[str, str]:
    """The folders of a model's tokenizers -> what each fills a short prompt with, as its encoder was trained."""
    first = {} if model.text_encoder is None else {"tokenizer": "!" if model.family is Family.SD2 else END}
    return first | ({} if model.text_encoder_2 is None else {"tokenizer_2": "!"})


def _is_xl(model: ModelSpec) -> bool:
    return model.family in (Family.SDXL, Family.SDXL_REFINER)


def _is_wanted(name: str, parts: Collection[str]) -> bool:
    part = name.partition("/")[0]
    return not name.endswith("/config.json") or part in parts


def _index(model: ModelSpec, parts: Collection[str]) -> dict[str, Any]:
    special = _SPECIAL_PIPELINES.get((model.family, model.unet.in_channels))
    components = {
        "scheduler": ["diffusers", _scheduler(model, PredictionType.EPSILON.value)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not _is_xl(model):
        del components["text_encoder_2"], components["tokenizer_2"]
    absent = {part for part in components if part.startswith(("text_encoder", "vae", "unet")) and part not in parts}
    absent |= {part.replace("text_encoder", "tokenizer") for part in absent if part.startswith("text_encoder")}
    index: dict[str, Any] = {"_class_name": special or _PIPELINES[model.family]}
    index |= {part: [None, None] if part in absent else library for part, library in components.items()}
    if not _is_xl(model):
        return index | {
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        }
    if model.family is Family.SDXL_REFINER:
        return index | {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    return index | {"force_zeros_for_empty_prompt": True}


def _scheduler(model: ModelSpec, prediction_type: str) -> dict[str, Any]:
    if model.vae.latents_mean:
        return EDM_SCHEDULER
    config = write_scheduler_config(NoiseScheduleSpec(prediction_type=PredictionType(prediction_type)))
    if not _is_xl(model):
        return config
    for key in ("clip_sample", "set_alpha_to_one"):
        del config[key]
    return config | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}

"""The JSON files of a model folder, for a model that came without them."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec
from dreambooth_ms.formats import model_config
from dreambooth_ms.formats.clip_tokenizer import SIZE
from dreambooth_ms.formats.folder_layout import ABSENT, INDEX, NETWORKS, SCHEDULER, TOKENIZERS
from dreambooth_ms.formats.model_config import Config
from dreambooth_ms.models.specs import FAMILIES, Family, ModelSpec

Files = dict[str, dict[str, Any]]
"""Path within the folder -> content."""

EDM_SCHEDULER: Config = FAMILIES["Playground v2.5"]["scheduler"]


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
    files: Files = {}
    if "unet" in parts:
        files["unet/config.json"] = model_config.write_unet_config(unet)
    if "vae" in parts:
        vae = model_config.write_vae_config(model.vae, unet.sample_size * model.vae.downsampling)
        files["vae/config.json"] = vae | FAMILIES[model.family.value]["vae"]
    for part in TOKENIZERS:
        spec = getattr(model, part)
        if spec and part in parts:
            width = spec.projection_dim or spec.transformer.hidden_size
            files[f"{part}/config.json"] = model_config.write_text_config(spec, width)
    return files | pipeline_configs(model, parts, schedule)


def pipeline_configs(model: ModelSpec, parts: Collection[str], schedule: NoiseScheduleSpec) -> Files:
    """The files that make the folders of these parts a pipeline: its index and its scheduler."""
    own = FAMILIES[model.family.value]
    written = model_config.write_scheduler_config(schedule)
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


def pad_tokens(model: ModelSpec) -> dict[str, str | None]:
    """A model's text encoders -> what their tokenizers fill a short prompt with; None if their words are not CLIP's."""
    specs, tokens = vars(model), FAMILIES[model.family.value]["pad_tokens"]
    return {part: token if specs[part].vocab_size == SIZE else None for part, token in tokens.items() if specs[part]}

"""What users bring from other programs: the same thing under another name, or with its value written in another way.

A spelling only applies where its field exists, so one table serves every command. What is not here at all is in
refusals.py.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from dreambooth_ms.errors import ConfigError

_OTHER_NAMES: dict[str, str] = {
    # The base model and the files
    "alpha": "lora_config_alpha",
    "base": "weight_base weight_pretrained",
    "lora": "weight_lora",
    "output_dir": "save_path output_path",
    "pretrained_model_name_or_path": "pretrained_model_path model_path",
    "pretrained_vae_model_name_or_path": "pretrained_vae_name_or_path vae",
    "refiner": "pipeline_weight",
    "source": "model_path",
    "target": "weight_merged dump_path",
    # Pictures, of the subject and of its class
    "class_data_dir": "class_data_path",
    "image": "img init_image",
    "image_interpolation_mode": "resize_interpolation",
    "instance_data_dir": "instance_data_path",
    "random_flip": "hflip flip_aug",
    "resolution": "image_size",
    "with_prior_preservation": "prior_preservation",
    # What is trained, and how
    "adam_weight_decay": "weight_decay",
    "gradient_checkpointing": "use_recompute",
    "is_parallel": "distributed use_parallel",
    "learning_rate": "base_learning_rate lr start_learning_rate unet_lr",
    "lora_alpha": "network_alpha",
    "lora_dropout": "drop_out",
    "lr_num_cycles": "lr_cycles lr_scheduler_num_cycles",
    "lr_power": "lr_scheduler_power",
    "lr_warmup_steps": "warmup_steps",
    "mixed_precision": "ms_amp_level",
    "ms_mode": "mode",
    "optimizer": "optim optimizer_type",
    "rank": "lora_dim lora_r lora_rank network_dim",
    "snr_gamma": "min_snr_gamma",
    "text_encoder_lr": "learning_rate_te",
    "train_text_encoder": "lora_ft_text_encoder",
    # The run
    "checkpointing_steps": "save_ckpt_interval save_every_n_steps save_interval save_model_every_n_steps",
    "checkpoints_total_limit": "max_num_ckpt",
    "max_train_steps": "total_step",
    "num_train_epochs": "epochs max_train_epochs",
    "num_validation_images": "n_save_sample test_num_per_prompt",
    "resume_from_checkpoint": "resume",
    "train_batch_size": "per_batch_size",
    "validation_epochs": "sample_every_n_epochs",
    "validation_prompt": "save_sample_prompt test_prompt",
    "validation_scheduler": "sample_sampler",
    "validation_steps": "sample_every_n_steps",
    # Generating pictures
    "denoising_end": "denoising_start high_noise_frac",
    "guidance_scale": "cfg_scale scale",
    "infer_steps": "sampling_steps",
    "num_inference_steps": "sample_step sampling_steps steps",
    "sample_batch_size": "infer_batch_size",
    "scheduler": "sampler sampler_name",
}
"""Field -> what others call it."""


def _inverted(table: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Another name -> what it may stand for."""
    pairs = [(other, name) for name, others in table.items() for other in others.split()]
    return {other: tuple(name for one, name in pairs if one == other) for other, _ in pairs}


SPELLINGS: dict[str, tuple[str, ...]] = _inverted(_OTHER_NAMES)
"""Another name -> the fields that it may stand for: the one that the command has."""

BASE_THEN_ADAPTERS = "weight"
"""`--weight base,adapter,adapter`: a list whose first entry is the base model and whose others are adapters."""


def _true(value: Any) -> bool:
    return str(value).lower() not in ("false", "none", "no", "0", "")


def _whole(value: Any, change: Callable[[int], int]) -> Any:
    """A whole number, changed; anything else as it is, for the field to refuse."""
    return change(int(value)) if re.fullmatch(r"-?\d+", str(value)) else value


CONVERTED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "clip_stop_at_last_layers": lambda value: {"clip_skip": _whole(value, lambda count: count - 1)},
    "half": lambda value: {"dtype": "fp16" if _true(value) else None},
    "optimizer": lambda value: (
        {"optimizer": "AdamW", "use_8bit_adam": True} if squeezed(value) == "adamw8bit" else {"optimizer": value}
    ),
    "random_crop": lambda value: {"center_crop": not _true(value)},
    "resolution": lambda value: {
        "resolution": re.sub(r"^(\d+),\1$", r"\1", value) if isinstance(value, str) else value
    },
    "stop_at_clip_layer": lambda value: {"clip_skip": _whole(value, lambda layer: -layer - 1)},
    "use_lora": lambda value: {"method": "lora" if _true(value) else "full"},
    "v_parameterization": lambda value: {"prediction_type": "v_prediction" if _true(value) else None},
}
"""A flag whose value says it in another way -> what it sets here. A1111 counts the text encoder's layers from 1,
ComfyUI from -1; kohya's sides of a square are two numbers."""

_CHOICES: dict[str, dict[str, str]] = {
    "lr_scheduler": {"cosine_with_restarts": "cosine_with_hard_restarts"},
    "mixed_precision": {"no": "fp32 false o0", "fp16": "o1 o2 o3"},
    "scheduler": {
        "ddim": "ddimscheduler",
        "ddpm": "ddpmscheduler",
        "pndm": "plms pndmscheduler",
        "lms": "k_lms linearmultistepsampler lmsdiscretescheduler",
        "euler": "eulerdiscretescheduler euleredmsampler k_euler",
        "euler_a": "ancestralsampler euler_ancestral eulerancestraldiscretescheduler eulerancestralsampler k_euler_a",
        "heun": "heundiscretescheduler heunedmsampler",
        "dpm++_2m": "dpmpp2msampler dpmsolver++ dpmsolvermultistepscheduler",
        "dpm++_2s": "dpmsingle dpmsolversinglestepscheduler",
        "dpm++_sde": "dpmpp_sde_gpu",
        "unipc": "uni_pc_bh2 unipcmultistepscheduler",
        "deis": "deismultistepscheduler",
        "lcm": "lcmsampler lcmscheduler",
        "edm_euler": "edmeulerscheduler",
        "edm_dpm++_2m": "edmdpmsolvermultistepscheduler",
    },
    "validation_scheduler": {"DPMSolverMultistepScheduler": "dpm++_2m dpmsolver++", "DDIMScheduler": "ddim"},
}
"""Field -> choice -> how others write it: schedulers by diffusers' classes, mindone's samplers, whose noise levels are
the model's own unless they say otherwise, and by the names of A1111, ComfyUI and kohya. MindSpore's levels of precision
differ in which operations are half; here norms, softmax and loss never are. A YAML file's bare `no` is false."""

_NEIGHBOURS: dict[str, dict[str, str]] = {
    "scheduler": {
        "pndm": "ipndm ipndm_v ipndmscheduler",
        "euler_a": "dpm_2_a dpm_2_ancestral k_dpm_2_a kdpm2ancestraldiscretescheduler restart",
        "heun": "dpm_2 heunpp2 k_dpm_2 kdpm2discretescheduler",
        "dpm++_2m": "dpm_adaptive dpm_fast dpmsolver res_multistep",
        "dpm++_2m_karras": "karras",
        "dpm++_2s": "dpmpp2sancestralsampler dpmpp_2s_a dpmpp_2s_ancestral",
        "dpm++_sde": "dpmpp_2m_sde dpmpp_2m_sde_heun dpmpp_3m_sde dpmsolversdescheduler",
    },
}
"""Field -> choice -> what is not here and comes nearest to it."""

_STYLES = re.compile("(cfgpp|exponential|gpu|karras)+$")
"""What A1111 and ComfyUI add to the name of a scheduler."""


def squeezed(value: object) -> str:
    """A choice without what people write differently: `DPM++ 2M Karras`, `dpmpp_2m_karras`, `dpm++_2m_karras`."""
    return re.sub(r"[\W_]", "", str(value).lower().replace("++", "pp"))


def choice_of(field: str, choices: tuple[str, ...], value: object) -> str | None:
    """The choice that the value spells; None if it spells none.

    Raises:
        ConfigError: it spells something that is not here, but has a neighbour that is.
    """
    spelled = {squeezed(choice): choice for choice in choices}
    near: dict[str, str] = {}
    for table, found in ((_CHOICES, spelled), (_NEIGHBOURS, near)):
        pairs = _inverted(table.get(field, {})).items()
        found.update({squeezed(other): choice for other, (choice,) in pairs if choice in choices})
    text = squeezed(value)
    if text in spelled:
        return spelled[text]
    stem = _STYLES.sub("", text)
    neighbour = near.get(text) or near.get(stem) or (spelled.get(stem) if stem != text else None)
    if neighbour:
        raise ConfigError(f"{value} is not in this version; the nearest is {neighbour}")
    return None

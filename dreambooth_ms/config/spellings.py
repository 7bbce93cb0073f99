"""What users bring from other trainers: the same thing under another name, and things that are not here.

A spelling only applies where its field exists, so one table serves every command.
"""

from collections.abc import Mapping
from typing import NamedTuple

_OTHER_NAMES: dict[str, str] = {
    "pretrained_model_name_or_path": "pretrained_model_path",
    "pretrained_vae_model_name_or_path": "pretrained_vae_name_or_path",
    "instance_data_dir": "instance_data_path",
    "class_data_dir": "class_data_path",
    "resolution": "image_size",
    "random_flip": "hflip",
    "sample_batch_size": "infer_batch_size",
    "infer_steps": "sampling_steps",
    "num_inference_steps": "sampling_steps sample_step",
    "guidance_scale": "scale",
    "scheduler": "sampler",
    "image": "img init_image",
    "refiner": "pipeline_weight",
    "denoising_end": "denoising_start high_noise_frac",
    "rank": "lora_r lora_rank lora_dim network_dim",
    "lora_alpha": "network_alpha",
    "learning_rate": "start_learning_rate base_learning_rate",
    "lr_warmup_steps": "warmup_steps",
    "lr_num_cycles": "lr_cycles",
    "adam_weight_decay": "weight_decay",
    "train_batch_size": "per_batch_size",
    "gradient_checkpointing": "use_recompute",
    "max_train_steps": "total_step",
    "num_train_epochs": "epochs",
    "output_dir": "save_path output_path",
    "checkpointing_steps": "save_interval save_ckpt_interval save_model_every_n_steps",
    "checkpoints_total_limit": "max_num_ckpt",
    "resume_from_checkpoint": "resume",
    "validation_prompt": "save_sample_prompt",
    "num_validation_images": "n_save_sample",
    "lora_dropout": "drop_out",
    "mixed_precision": "ms_amp_level",
    "ms_mode": "mode",
    "base": "weight_base weight_pretrained",
    "lora": "weight_lora",
    "target": "weight_merged",
    "alpha": "lora_config_alpha",
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

_CHOICES: dict[str, dict[str, str]] = {
    "scheduler": {
        "ddim": "ddimscheduler",
        "ddpm": "ddpmscheduler",
        "pndm": "pndmscheduler",
        "lms": "lmsdiscretescheduler linearmultistepsampler",
        "euler": "eulerdiscretescheduler euleredmsampler",
        "euler_a": "eulerancestraldiscretescheduler eulerancestralsampler ancestralsampler",
        "heun": "heundiscretescheduler heunedmsampler",
        "dpm++_2m": "dpmsolvermultistepscheduler dpmpp2msampler",
        "dpm++_2s": "dpmsolversinglestepscheduler",
        "unipc": "unipcmultistepscheduler",
        "deis": "deismultistepscheduler",
        "lcm": "lcmscheduler lcmsampler",
        "edm_euler": "edmeulerscheduler",
        "edm_dpm++_2m": "edmdpmsolvermultistepscheduler",
    },
    "mixed_precision": {"no": "fp32 false o0", "fp16": "o1 o2 o3"},
}

VALUE_SPELLINGS: dict[str, dict[str, str]] = {
    field: {other: choice for other, (choice,) in _inverted(choices).items()} for field, choices in _CHOICES.items()
}
"""Field -> another spelling of a choice, in lower case -> the choice.

Schedulers have the names of diffusers' classes, and of mindone's samplers, whose noise levels are the model's own
unless they say otherwise. MindSpore's levels differ in which operations are half precision; here norms, softmax
and loss never are. A YAML file's bare `no` arrives as false.
"""


class Refusal(NamedTuple):
    """Why a flag is refused, and the values for which there is nothing to refuse."""

    reason: str
    unless: tuple[str, ...] = ()


def _not_yet(reason: str, *unless: str) -> Refusal:
    return Refusal(f"not in this version: {reason}", unless)


_REFUSALS: dict[str, Refusal] = {
    "hub_model_id hub_token push_to_hub": Refusal(
        "nothing is uploaded; publish the files of --output_dir with huggingface-cli"
    ),
    "report_to": _not_yet("the run is logged to TensorBoard only", "tensorboard"),
    "wandb": _not_yet("the run is logged to TensorBoard only"),
    "prior_generation_precision": _not_yet("class pictures are generated in float32", "fp32"),
    "use_dora": _not_yet("the update is plain LoRA"),
    "text_encoder_use_attention_mask": _not_yet("only models with CLIP text encoders are trained"),
    "tokenizer_name": Refusal("the tokenizer of the base model is used"),
    "tokenizer_max_length": Refusal("a prompt is always 77 tokens", ("77",)),
    "do_edm_style_training": _not_yet("training follows the base model's own noise schedule"),
    "validation_epochs": Refusal("give the optimiser steps from one validation to the next, --validation_steps"),
    "validation_images": _not_yet("validation pictures are generated from text only"),
    "class_labels_conditioning": _not_yet("only models that are conditioned on text are trained"),
    "infer_during_train": Refusal("give --validation_prompt"),
    "save_sample_negative_prompt": _not_yet("validation pictures have no negative prompt"),
    "class_negative_prompt": _not_yet("class pictures are generated without a negative prompt"),
    "dataset_name dataset_config_name": _not_yet("pictures are read from the folder --instance_data_dir"),
    "image_column": _not_yet("pictures are read from the folder --instance_data_dir", "image"),
    "cache_dir": Refusal("set HF_HOME: downloads are kept where huggingface_hub keeps them"),
    "caption_column use_txt_as_label use_filename_as_label read_prompt_from_txt": _not_yet(
        "all pictures of the subject share --instance_prompt"
    ),
    "concepts_list": _not_yet("one run teaches one subject"),
    "repeats train_data_repeat": Refusal(
        "set the length of the run with --max_train_steps or --num_train_epochs", ("1",)
    ),
    "use_aspect_ratio_bucket": _not_yet("pictures are cropped to a square of --resolution"),
    "modifier_token initializer_token freeze_model": _not_yet("Custom Diffusion is not a --method yet"),
    "real_prior": _not_yet("put your own pictures into --class_data_dir"),
    "output_kohya_format": _not_yet("adapters are written with diffusers' names"),
    "clip_skip": _not_yet("the text encoder's layer is the base model's own"),
    "data_sink": _not_yet("every step is driven from Python"),
    "enable_modelarts": _not_yet("copy the data to this machine first and give local folders"),
    "sd_xl_base_ratios": Refusal("training pictures are squares of --resolution", ("1.0",)),
    "task": Refusal("this command has one task", ("txt2img",)),
    "strength": Refusal("this command does not start from a picture"),
    "add_pipeline": Refusal("name the second model with --refiner"),
    "stage2strength": Refusal("give the base's share with --denoising_end, or let it finish with --refiner_strength"),
    "finish_denoising": Refusal("give --denoising_end, or let the base finish with --refiner_strength"),
    "pipeline_config": Refusal("the refiner takes the flags of the base"),
    "textual_inversion_weight": _not_yet("embeddings of new words are not read"),
    "controlnet_mode": _not_yet("pictures are generated from text, or from a picture"),
    "guider": Refusal("guidance is turned off with --guidance_scale 1", ("vanillacfg",)),
    "thresholding": _not_yet("predictions are rescaled with --guidance_rescale"),
    "discretization": Refusal("the noise levels are those of the model", ("legacyddpmdiscretization",)),
    "init_latent_path": Refusal("the starting noise is a function of --seed"),
}

REFUSED: dict[str, Refusal] = {name: refusal for names, refusal in _REFUSALS.items() for name in names.split()}
"""Flags of other trainers that are not here -> why, and what to do. A value that turns one off asks for nothing."""

METHODS_NOT_YET: dict[str, str] = dict.fromkeys(
    ("custom_diffusion", "textual_inversion", "pivotal_tuning"), "not in this version; use lora or full"
)
"""Values of --method that are refused by name."""

_ATTENTION = "the attention that suits the device is chosen by itself"
_FEW_PICTURES = "a few pictures gain nothing from being loaded in parallel"

HARMLESS: dict[str, str] = {
    "allow_tf32": "TF32 is a mode of NVIDIA GPUs",
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "enable_npu_flash_attention": _ATTENTION,
    "set_grads_to_none": "gradients are values of a function here, never kept between steps",
    "version": "the family is recognised from the model itself",
    "clip_grad": "gradients are always clipped to --max_grad_norm",
    "log_interval": "every step is logged",
    "dataset_load_tokenizer": "prompts are always turned into tokens before the step",
    "local_rank": "it is set by PyTorch's launcher, which is not used here",
    "dataloader_num_workers": _FEW_PICTURES,
    "num_parallel_workers": _FEW_PICTURES,
    "pre_compute_text_embeddings": "prompts are always encoded once",
    "lora_config_rank": "the rank follows from the LoRA's shapes",
    "deterministic": "the same seed always generates the same pictures",
    "skip_save_text_encoder": "only what was trained is saved",
}
"""Flags that are accepted and ignored -> why nothing is lost."""

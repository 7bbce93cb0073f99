"""What users bring from other trainers: the same thing under another name, and things that are not here.

A spelling only applies where its field exists, so one table serves every command.
"""

from typing import NamedTuple

SPELLINGS: dict[str, tuple[str, ...]] = {
    "pretrained_model_path": ("pretrained_model_name_or_path",),
    "pretrained_vae_name_or_path": ("pretrained_vae_model_name_or_path",),
    "instance_data_path": ("instance_data_dir",),
    "class_data_path": ("class_data_dir",),
    "image_size": ("resolution",),
    "hflip": ("random_flip",),
    "infer_batch_size": ("sample_batch_size",),
    "sampling_steps": ("infer_steps", "num_inference_steps"),
    "sample_step": ("num_inference_steps",),
    "scale": ("guidance_scale",),
    "sampler": ("scheduler",),
    "img": ("image",),
    "init_image": ("image",),
    "pipeline_weight": ("refiner",),
    "denoising_start": ("denoising_end",),
    "high_noise_frac": ("denoising_end",),
    "lora_r": ("rank",),
    "lora_rank": ("rank",),
    "lora_dim": ("rank",),
    "network_dim": ("rank",),
    "network_alpha": ("lora_alpha",),
    "start_learning_rate": ("learning_rate",),
    "base_learning_rate": ("learning_rate",),
    "warmup_steps": ("lr_warmup_steps",),
    "lr_cycles": ("lr_num_cycles",),
    "weight_decay": ("adam_weight_decay",),
    "per_batch_size": ("train_batch_size",),
    "use_recompute": ("gradient_checkpointing",),
    "total_step": ("max_train_steps",),
    "epochs": ("num_train_epochs",),
    "save_path": ("output_dir",),
    "output_path": ("output_dir",),
    "save_interval": ("checkpointing_steps",),
    "save_ckpt_interval": ("checkpointing_steps",),
    "save_model_every_n_steps": ("checkpointing_steps",),
    "max_num_ckpt": ("checkpoints_total_limit",),
    "resume": ("resume_from_checkpoint",),
    "save_sample_prompt": ("validation_prompt",),
    "n_save_sample": ("num_validation_images",),
    "drop_out": ("lora_dropout",),
    "ms_amp_level": ("mixed_precision",),
    "mode": ("ms_mode",),
    "weight_base": ("base",),
    "weight_pretrained": ("base",),
    "weight_lora": ("lora",),
    "weight_merged": ("target",),
    "lora_config_alpha": ("alpha",),
}
"""Another name -> the fields that it may stand for: the one that the command has."""

BASE_THEN_ADAPTERS = "weight"
"""`--weight base,adapter,adapter`: a list whose first entry is the base model and whose others are adapters."""


VALUE_SPELLINGS: dict[str, dict[str, str]] = {
    "scheduler": {
        "ddimscheduler": "ddim",
        "ddpmscheduler": "ddpm",
        "pndmscheduler": "pndm",
        "lmsdiscretescheduler": "lms",
        "eulerdiscretescheduler": "euler",
        "eulerancestraldiscretescheduler": "euler_a",
        "heundiscretescheduler": "heun",
        "dpmsolvermultistepscheduler": "dpm++_2m",
        "dpmsolversinglestepscheduler": "dpm++_2s",
        "unipcmultistepscheduler": "unipc",
        "deismultistepscheduler": "deis",
        "lcmscheduler": "lcm",
        "edmeulerscheduler": "edm_euler",
        "edmdpmsolvermultistepscheduler": "edm_dpm++_2m",
        "euleredmsampler": "euler",
        "heunedmsampler": "heun",
        "eulerancestralsampler": "euler_a",
        "ancestralsampler": "euler_a",
        "dpmpp2msampler": "dpm++_2m",
        "linearmultistepsampler": "lms",
        "lcmsampler": "lcm",
    },
    "mixed_precision": {"fp32": "no", "false": "no", "o0": "no"} | dict.fromkeys(("o1", "o2", "o3", "auto"), "fp16"),
}
"""Field -> another spelling of a choice, in lower case -> the choice.

Schedulers have the names of diffusers' classes, and of mindone's samplers, whose noise levels are the model's own
unless they are told otherwise. MindSpore's levels differ in which operations are half precision; here norms, softmax
and loss never are. A YAML file's bare `no` arrives as false.
"""


class Refusal(NamedTuple):
    """Why a flag is refused, and the values for which there is nothing to refuse."""

    reason: str
    unless: tuple[str, ...] = ()


_NO_HUB_UPLOAD = Refusal("nothing is uploaded; publish the files of --output_dir with huggingface-cli")
_NO_CAPTIONS = Refusal("not in this version: all pictures of the subject share --instance_prompt")
_NO_CONCEPTS = Refusal("not in this version: one run teaches one subject")
_NO_DATASETS = Refusal("not in this version: pictures are read from the folder --instance_data_dir")
_NO_MODELARTS = Refusal("not in this version: copy the data to this machine first and give local folders")
_NO_CUSTOM_DIFFUSION = Refusal("not in this version: Custom Diffusion is not a --method yet")
_NO_IMAGE_INPUT = Refusal("not in this version: pictures are drawn from text only")

REFUSED: dict[str, Refusal] = {
    "hub_model_id": _NO_HUB_UPLOAD,
    "hub_token": _NO_HUB_UPLOAD,
    "push_to_hub": _NO_HUB_UPLOAD,
    "report_to": Refusal("not in this version: the run is logged to TensorBoard only", ("tensorboard",)),
    "wandb": Refusal("not in this version: the run is logged to TensorBoard only"),
    "prior_generation_precision": Refusal("not in this version: class pictures are drawn in float32", ("fp32",)),
    "use_dora": Refusal("not in this version: the update is plain LoRA"),
    "text_encoder_use_attention_mask": Refusal("not in this version: only models with CLIP text encoders are trained"),
    "tokenizer_name": Refusal("the tokenizer of the base model is used"),
    "tokenizer_max_length": Refusal("a prompt is always 77 tokens", ("77",)),
    "do_edm_style_training": Refusal("not in this version: training follows the base model's own noise schedule"),
    "validation_epochs": Refusal("give the optimiser steps between drawings, --validation_steps"),
    "validation_images": _NO_IMAGE_INPUT,
    "class_labels_conditioning": Refusal("not in this version: only models that are conditioned on text are trained"),
    "infer_during_train": Refusal("give --validation_prompt"),
    "save_sample_negative_prompt": Refusal("not in this version: validation pictures have no negative prompt"),
    "class_negative_prompt": Refusal("not in this version: class pictures are generated without a negative prompt"),
    "dataset_name": _NO_DATASETS,
    "dataset_config_name": _NO_DATASETS,
    "image_column": Refusal("not in this version: pictures are read from the folder --instance_data_dir", ("image",)),
    "cache_dir": Refusal("set HF_HOME: downloads are kept where huggingface_hub keeps them"),
    "caption_column": _NO_CAPTIONS,
    "use_txt_as_label": _NO_CAPTIONS,
    "use_filename_as_label": _NO_CAPTIONS,
    "read_prompt_from_txt": _NO_CAPTIONS,
    "concepts_list": _NO_CONCEPTS,
    "repeats": Refusal("set the length of the run with --max_train_steps or --num_train_epochs", ("1",)),
    "train_data_repeat": Refusal("set the length of the run with --max_train_steps or --num_train_epochs", ("1",)),
    "use_aspect_ratio_bucket": Refusal("not in this version: pictures are cropped to a square of --resolution"),
    "modifier_token": _NO_CUSTOM_DIFFUSION,
    "initializer_token": _NO_CUSTOM_DIFFUSION,
    "freeze_model": _NO_CUSTOM_DIFFUSION,
    "real_prior": Refusal("not in this version: put your own pictures into --class_data_dir"),
    "output_kohya_format": Refusal("not in this version: adapters are written with diffusers' names"),
    "clip_skip": Refusal("not in this version: the text encoder's layer is the base model's own"),
    "data_sink": Refusal("not in this version: every step is driven from Python"),
    "enable_modelarts": _NO_MODELARTS,
    "sd_xl_base_ratios": Refusal("training pictures are squares of --resolution", ("1.0",)),
    "task": Refusal("this command has one task", ("txt2img",)),
    "strength": Refusal("nothing is drawn from a picture here"),
    "add_pipeline": Refusal("name the second model with --refiner"),
    "stage2strength": Refusal("give the base's share with --denoising_end, or let it finish with --refiner_strength"),
    "finish_denoising": Refusal("give --denoising_end, or let the base finish with --refiner_strength"),
    "pipeline_config": Refusal("the refiner draws with the flags of the base"),
    "textual_inversion_weight": Refusal("not in this version: embeddings of new words are not read"),
    "controlnet_mode": Refusal("not in this version: pictures are drawn from text, or from a picture"),
    "guider": Refusal("guidance is turned off with --guidance_scale 1", ("vanillacfg",)),
    "thresholding": Refusal("not in this version: predictions are rescaled with --guidance_rescale"),
    "discretization": Refusal("the noise levels are those of the model", ("legacyddpmdiscretization",)),
    "init_latent_path": Refusal("the starting noise is a function of --seed"),
}
"""Flags of other trainers that are not here -> why, and what to do. A value that turns one off asks for nothing."""

METHODS_NOT_YET: dict[str, str] = dict.fromkeys(
    ("custom_diffusion", "textual_inversion", "pivotal_tuning"),
    "not in this version; use lora or full",
)
"""Values of --method that are refused by name."""

HARMLESS: dict[str, str] = {
    "allow_tf32": "TF32 is a mode of NVIDIA GPUs",
    "enable_xformers_memory_efficient_attention": "the attention that suits the device is chosen by itself",
    "enable_npu_flash_attention": "the attention that suits the device is chosen by itself",
    "set_grads_to_none": "gradients are values of a function here, never kept between steps",
    "version": "the family is recognised from the model itself",
    "clip_grad": "gradients are always clipped to --max_grad_norm",
    "log_interval": "every step is logged",
    "dataset_load_tokenizer": "prompts are always turned into tokens before the step",
    "local_rank": "it is set by PyTorch's launcher, which is not used here",
    "dataloader_num_workers": "a few pictures gain nothing from being loaded in parallel",
    "num_parallel_workers": "a few pictures gain nothing from being loaded in parallel",
    "pre_compute_text_embeddings": "prompts are always encoded once",
    "lora_config_rank": "the rank is told from the LoRA's shapes",
    "deterministic": "the same seed always draws the same pictures",
    "skip_save_text_encoder": "only what was trained is saved",
}
"""Flags that are accepted and ignored -> why nothing is lost."""

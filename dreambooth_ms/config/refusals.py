"""Flags of other programs that are not here: refused with a reason, or harmless and ignored with one.

They are those of diffusers' and mindone's scripts, of kohya's sd-scripts, and of the notebooks that guides are for.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

_Answer = TypeVar("_Answer")


class Refusal(NamedTuple):
    """Why a flag is refused."""

    reason: str
    unless: tuple[str, ...] = ()
    """Values for which there is nothing to refuse, beside those of NOTHING."""
    gives: tuple[str, ...] = ()
    """Fields that it would have given, or ALL: they are not also reported as missing."""


NOTHING = ("false", "none", "no", "", "0", "0.0", "-1")
"""Values that turn any of these flags off."""
ALL = ("*",)
_SUBJECT, _CLASS = ("instance_data_dir", "instance_prompt"), ("class_data_dir", "class_prompt")


def _not_yet(reason: str, *unless: str, gives: tuple[str, ...] = ()) -> Refusal:
    return Refusal(f"not in this version: {reason}", unless, gives)


def _by_name(table: Mapping[str, _Answer]) -> dict[str, _Answer]:
    return {name: answer for names, answer in table.items() for name in names.split()}


_PICTURES = {
    "aspect_ratio_bucket enable_bucket use_aspect_ratio_bucket": _not_yet("pictures are squares of --resolution"),
    "caption_column caption_dropout_rate caption_extension combine_prompt_from_txt keep_tokens read_prompt_from_txt "
    "shuffle_caption use_filename_as_label use_txt_as_label weighted_captions": _not_yet(
        "all pictures of the subject share --instance_prompt", gives=("instance_prompt",)
    ),
    "class_negative_prompt": _not_yet("class pictures are generated without a negative prompt"),
    "concept_list concepts_list": _not_yet("one run teaches one subject", gives=(*_SUBJECT, *_CLASS)),
    "data_path dataset_config_name dataset_name": _not_yet("give a folder, --instance_data_dir", gives=_SUBJECT),
    "dataset_repeats repeats train_data_repeat train_data_repeats": Refusal("give --max_train_steps", ("1",)),
    "generate_class_image_config": Refusal("class pictures follow --infer_steps and --guidance_scale"),
    "image_column": _not_yet("pictures are read from the folder --instance_data_dir", "image"),
    "prior_generation_precision": _not_yet("class pictures are generated in float32", "fp32"),
    "real_prior": _not_yet("put your own pictures into --class_data_dir"),
    "reg_data_dir": Refusal("give its folder of pictures as --class_data_dir, with --class_prompt", gives=_CLASS),
    "sd_xl_base_ratios": Refusal("training pictures are squares of --resolution", ("1.0",)),
    "train_data_dir": Refusal(
        "give its folder of pictures (10_sks dog) as --instance_data_dir, with --instance_prompt", gives=_SUBJECT
    ),
}

_TRAINING = {
    "alpha_mask debiased_estimation_loss huber_c huber_schedule loss_type masked_loss max_timestep min_timestep "
    "multires_noise_discount multires_noise_iterations timestep_bias_strategy": _not_yet(
        "the loss is changed by --snr_gamma and --noise_offset alone", "l2", "1000"
    ),
    "betas optimizer_args": Refusal("give the optimiser's numbers by flags of their own, as --adam_beta1"),
    "class_labels_conditioning": _not_yet("only models that are conditioned on text are trained"),
    "clip_skip": _not_yet("the text encoder's layer is the base model's own, which A1111 and kohya call 1"),
    "data_sink enable_mindspore_data_sink": _not_yet("every step is driven from Python"),
    "decay_steps end_learning_rate": Refusal("the learning rate follows --lr_scheduler"),
    "do_edm_style_training": _not_yet("training follows the base model's own noise schedule"),
    "fp8_base full_bf16 full_fp16 param_fp16": Refusal("give --mixed_precision; trained weights are always float32"),
    "freeze_model initializer_token modifier_token": _not_yet("Custom Diffusion is not a --method yet"),
    "last_epoch optimizer_weight resume_step": Refusal("give the checkpoint, --resume_from_checkpoint"),
    "lora_unet_blocks network_args network_dropout network_module network_weights use_blora use_dora": _not_yet(
        "adapters are new and plain LoRA, with --lora_target_modules and --lora_dropout", "networks.lora"
    ),
    "lpw max_embeddings_multiples max_token_length support_long_prompts tokenizer_max_length": Refusal(
        "a prompt is always 77 tokens in training", ("75", "77")
    ),
    "network_train_text_encoder_only": _not_yet("the UNet is always trained"),
    "num_new_tokens_per_abstraction token_abstraction train_text_encoder_ti train_text_encoder_ti_frac": _not_yet(
        "embeddings of new words are not trained", "2", "0.5", "tok"
    ),
    "text_encoder_use_attention_mask": _not_yet("only models with CLIP text encoders are trained"),
    "train_text_encoder_frac": _not_yet("the text encoder is trained to the end", "1.0"),
    "use_lion_optimizer": _not_yet("choose another --optimizer"),
    "zero_terminal_snr": Refusal("the noise schedule is that of the base model's scheduler configuration"),
}

_RUN = {
    "cache_dir tokenizer_cache_dir": Refusal("set HF_HOME: downloads are kept where huggingface_hub keeps them"),
    "checkpoint_path": Refusal(
        "give what to read, then what to write: dreambooth-ms convert SOURCE TARGET", gives=("source", "target")
    ),
    "ckpt_dir ckpt_url enable_modelarts multi_data_url pretrain_url train_url": _not_yet(
        "copy the data to this machine first and give local folders", "/cache/pretrain_ckpt/"
    ),
    "ckpt_save_interval save_every_n_epochs": Refusal("give optimiser steps, --checkpointing_steps"),
    "config_file dataset_config train_config": Refusal("give a YAML file of these flags, by --config", gives=ALL),
    "hub_model_id hub_token huggingface_repo_id huggingface_token push_to_hub": Refusal(
        "nothing is uploaded; publish the files of --output_dir with huggingface-cli"
    ),
    "infer_during_train sample_prompts test_prompts_file": Refusal("give one prompt, --validation_prompt"),
    "infer_interval": Refusal("give optimiser steps, --validation_steps", ("1",)),
    "log_tracker_name log_with report_to wandb wandb_run_name": _not_yet(
        "the run is logged to TensorBoard only", "tensorboard"
    ),
    "model": Refusal("give --pretrained_model_name_or_path", gives=("pretrained_model_name_or_path",)),
    "no_safe_serialization output_kohya_format save_model_as": Refusal(
        "adapters are safetensors with diffusers' names; dreambooth-ms convert writes others", ("safetensors",)
    ),
    "sample_at_first": Refusal("dreambooth-ms sample shows what the base model makes of a prompt"),
    "save_last_n_epochs save_last_n_steps": Refusal("give the number to keep, --checkpoints_total_limit"),
    "save_sample_negative_prompt test_negative_prompt": _not_yet("validation pictures have no negative prompt"),
    "source_version text_encoder_2_name text_encoder_name unet_name vae_name": Refusal("files are recognised"),
    "task": Refusal("this command has one task", ("txt2img",)),
    "tokenizer_name": Refusal("the tokenizer of the base model is used"),
    "validation_images": _not_yet("validation pictures are generated from text only"),
}

_SAMPLING = {
    "add_pipeline": Refusal("name the second model with --refiner"),
    "control_image_path controlnet_mode": _not_yet("pictures are generated from text, or from a picture"),
    "discretization": Refusal("the noise levels are those of the model", ("legacyddpmdiscretization",)),
    "finish_denoising": Refusal("give --denoising_end, or let the base finish with --refiner_strength"),
    "guider": Refusal("guidance is turned off with --guidance_scale 1", ("vanillacfg",)),
    "init_latent_path init_noise_scheduler_path": Refusal("the starting noise is a function of --seed"),
    "num_vectors placeholder_token textual_inversion_weight": _not_yet("embeddings of new words are not read"),
    "pipeline_config": Refusal("the refiner takes the flags of the base"),
    "stage2strength": Refusal("give the base's share with --denoising_end, or let it finish with --refiner_strength"),
    "strength": Refusal("this command does not start from a picture"),
    "thresholding": _not_yet("predictions are rescaled with --guidance_rescale"),
}

REFUSED: dict[str, Refusal] = _by_name(_PICTURES | _TRAINING | _RUN | _SAMPLING)
"""Flags that are not here -> why, and what to do."""

METHODS_NOT_YET: dict[str, str] = dict.fromkeys(
    ("custom_diffusion", "textual_inversion", "pivotal_tuning"), "not in this version; use lora or full"
)
"""Values of --method that are refused by name."""

VALUES: dict[str, dict[str, str]] = {
    "method": METHODS_NOT_YET,
    "jit_level": {"o2": "hands graphs over to GE, which MindSpore has deprecated since 2.9; use O0 or O1"},
}
"""Field -> values that are refused by name, in lower case -> why."""

HARMLESS: dict[str, str] = _by_name({
    "allow_tf32": "TF32 is a mode of NVIDIA GPUs",
    "auto_test_model": "pictures are generated whenever --validation_prompt gives them a prompt",
    "bucket_reso_steps debug_arb dynamic_thresholding_ratio high_threshold low_threshold max_bucket_reso "
    "min_bucket_reso rho sample_max_value save_detected_map sigma_max sigma_min sink_queue_size sink_size "
    "timestep_bias_begin timestep_bias_end timestep_bias_multiplier timestep_bias_portion":
        "it goes with another flag that is not in this version",
    "cache_latent cache_latents cache_latents_to_disk cache_path cache_text_embedding cache_text_encoder_outputs "
    "cache_text_encoder_outputs_to_disk not_cache_latents pre_compute_text_embeddings vae_batch_size":
        "every crop and prompt of the run is encoded once and kept in --output_dir",
    "callback_size log_interval log_level log_prefix": "every step is logged",
    "clip_grad": "gradients are always clipped to --max_grad_norm",
    "dataloader_num_workers max_data_loader_n_workers num_parallel_workers persistent_data_loader_workers":
        "a few pictures gain nothing from being loaded in parallel",
    "dataset_load_tokenizer": "prompts are always turned into tokens before the step",
    "test_seed": "the same --seed always generates the same pictures",
    "enable_npu_flash_attention enable_xformers_memory_efficient_attention mem_eff_attn sdpa xformers":
        "the attention that suits the device is chosen by itself",
    "local_rank": "it is set by PyTorch's launcher, which is not used here",
    "lora_config_rank": "the rank follows from the LoRA's shapes",
    "lora_fp16 save_precision save_unet_half": "results are float32; dreambooth-ms convert --dtype fp16 halves a file",
    "lora_ft_unet": "the UNet is always trained",
    "model_config original_config_file sdxl_base_ckpt v2 version": "the family is recognised from the model itself",
    "ms_enable_allreduce_fusion ms_enable_graph_kernel ms_jit": "MindSpore decides what it compiles and fuses",
    "network_train_unet_only": "the text encoder is trained with --train_text_encoder alone",
    "no_half_vae precision_keep_origin_dtype": "the autoencoder computes in float32",
    "noaug": "pictures are neither enlarged nor reduced at random",
    "output_name use_safetensors": "files have diffusers' names and format",
    "overflow_still_update": "a step that overflows is always skipped, and said",
    "save_optimizer save_state": "every checkpoint holds the optimiser's state",
    "save_path_with_time": "the run's folder is --output_dir, where the same command goes on",
    "scheduler_type": "the scheduler is chosen when pictures are generated",
    "set_grads_to_none": "gradients are values of a function here, never kept between steps",
    "skip_save_text_encoder": "only what was trained is saved",
})  # fmt: skip
"""Flags that are accepted and ignored -> why nothing is lost."""

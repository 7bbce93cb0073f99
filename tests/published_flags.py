"""The flags of the scripts and guides that users come from: names, and of diffusers' scripts the defaults, too."""

from dataclasses import MISSING
from typing import Any


def _names(text: str) -> list[str]:
    return text.split()


# The flags of diffusers' train_dreambooth.py with their defaults; MISSING is required, False a switch that is off.
FULL_SCRIPT: dict[str, Any] = {
    "pretrained_model_name_or_path": MISSING, "revision": None, "variant": None, "tokenizer_name": None,
    "instance_data_dir": MISSING, "instance_prompt": MISSING, "class_data_dir": None, "class_prompt": None,
    "with_prior_preservation": False, "prior_loss_weight": 1.0, "num_class_images": 100, "resolution": 512,
    "center_crop": False, "dataloader_num_workers": 0, "output_dir": "dreambooth-model", "seed": None,
    "checkpointing_steps": 500, "checkpoints_total_limit": None, "resume_from_checkpoint": None,
    "skip_save_text_encoder": False, "train_batch_size": 4, "sample_batch_size": 4, "num_train_epochs": 1,
    "max_train_steps": None, "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "learning_rate": 5e-6,
    "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500, "lr_num_cycles": 1, "lr_power": 1.0,
    "use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0, "set_grads_to_none": False, "offset_noise": False, "snr_gamma": None,
    "train_text_encoder": False, "pre_compute_text_embeddings": False, "tokenizer_max_length": None,
    "text_encoder_use_attention_mask": False, "validation_prompt": None, "num_validation_images": 4,
    "validation_steps": 100, "validation_images": None, "validation_scheduler": "DPMSolverMultistepScheduler",
    "class_labels_conditioning": None, "push_to_hub": False, "hub_token": None, "hub_model_id": None,
    "logging_dir": "logs", "report_to": ["tensorboard"], "mixed_precision": None, "prior_generation_precision": None,
    "allow_tf32": False, "local_rank": -1, "enable_xformers_memory_efficient_attention": False,
}  # fmt: skip
_NOT_IN_LORA_SCRIPT = (
    "validation_steps", "set_grads_to_none", "offset_noise", "snr_gamma", "skip_save_text_encoder",
    "validation_scheduler",
)  # fmt: skip
LORA_SCRIPT = {name: default for name, default in FULL_SCRIPT.items() if name not in _NOT_IN_LORA_SCRIPT} | {
    "output_dir": "lora-dreambooth-model", "learning_rate": 5e-4, "validation_epochs": 50, "rank": 4,
    "lora_dropout": 0.0, "image_interpolation_mode": "lanczos",
}  # fmt: skip
BY_METHOD = ("output_dir", "learning_rate")
"""Fields whose None stands for the default of the method's script."""
_NOT_IN_SDXL_SCRIPT = (
    *("tokenizer_name", "pre_compute_text_embeddings", "tokenizer_max_length", "text_encoder_use_attention_mask"),
    *("validation_images", "class_labels_conditioning"),
)
SDXL_SCRIPT = {name: default for name, default in LORA_SCRIPT.items() if name not in _NOT_IN_SDXL_SCRIPT} | {
    **{"resolution": 1024, "learning_rate": 1e-4, "adam_weight_decay": 1e-4, "text_encoder_lr": 5e-6},
    **{"pretrained_vae_model_name_or_path": None, "dataset_name": None, "dataset_config_name": None},
    **{"cache_dir": None, "caption_column": None, "image_column": "image", "repeats": 1, "random_flip": False},
    **{"do_edm_style_training": False, "snr_gamma": None, "adam_weight_decay_text_encoder": 1e-3},
    **{"use_dora": False, "output_kohya_format": False, "optimizer": "AdamW", "prodigy_beta3": None},
    **{"prodigy_decouple": True, "prodigy_use_bias_correction": True, "prodigy_safeguard_warmup": True},
}


ADVANCED_SCRIPT = _names("""
cache_latents clip_skip lora_unet_blocks noise_offset num_new_tokens_per_abstraction token_abstraction
train_text_encoder_frac train_text_encoder_ti train_text_encoder_ti_frac use_blora
""")  # fmt: skip
"""What diffusers' advanced script for SDXL adds."""

_NOT_IN_CUSTOM_DIFFUSION_SCRIPT = (
    *("lr_num_cycles", "lr_power", "offset_noise", "pre_compute_text_embeddings", "skip_save_text_encoder"),
    *("snr_gamma", "text_encoder_use_attention_mask", "tokenizer_max_length", "train_text_encoder"),
    *("validation_images", "validation_scheduler", "class_labels_conditioning"),
)
CUSTOM_DIFFUSION_SCRIPT = {
    name: default for name, default in FULL_SCRIPT.items() if name not in _NOT_IN_CUSTOM_DIFFUSION_SCRIPT
} | {
    "concepts_list": None, "freeze_model": "crossattn_kv", "hflip": False, "initializer_token": "ktn+pll+ucd",
    "modifier_token": None, "no_safe_serialization": False, "noaug": False, "real_prior": False, "seed": 42,
    "num_class_images": 200, "num_validation_images": 2, "validation_steps": 50, "checkpointing_steps": 250,
    "output_dir": "custom-diffusion-model", "learning_rate": 1e-5, "dataloader_num_workers": 2,
}  # fmt: skip
TEXTUAL_INVERSION_SCRIPT: dict[str, Any] = {
    "pretrained_model_name_or_path": MISSING, "revision": None, "variant": None, "tokenizer_name": None,
    "train_data_dir": MISSING, "placeholder_token": MISSING, "initializer_token": MISSING, "num_vectors": 1,
    "learnable_property": "object", "repeats": 100, "save_steps": 500, "save_as_full_pipeline": False,
    "output_dir": "text-inversion-model", "seed": None, "resolution": 512, "center_crop": False,
    "train_batch_size": 16, "num_train_epochs": 100, "max_train_steps": 5000, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "learning_rate": 1e-4, "scale_lr": False, "lr_scheduler": "constant",
    "lr_warmup_steps": 500, "lr_num_cycles": 1, "dataloader_num_workers": 0, "use_8bit_adam": False, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "push_to_hub": False, "hub_token": None,
    "hub_model_id": None, "logging_dir": "logs", "mixed_precision": None, "allow_tf32": False,
    "report_to": ["tensorboard"], "validation_prompt": None, "num_validation_images": 4, "validation_steps": 100,
    "validation_epochs": None, "local_rank": -1, "checkpointing_steps": 500, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "enable_xformers_memory_efficient_attention": False,
    "no_safe_serialization": False,
}  # fmt: skip
"""Of textual_inversion.py and of that for SDXL together; the mixed precision "no" is None here."""

NOTEBOOKS = _names("""
aspect_ratio_bucket auto_test_model class_negative_prompt clip_skip combine_prompt_from_txt concept_list concepts_list
debug_arb guidance_scale infer_batch_size infer_steps last_epoch log_with lr_cycles n_save_sample not_cache_latents
optimizer pretrained_vae_name_or_path prior_preservation read_prompt_from_txt save_interval save_model_every_n_steps
save_sample_negative_prompt save_sample_prompt save_unet_half test_negative_prompt test_num_per_prompt test_prompt
test_prompts_file test_seed use_aspect_ratio_bucket use_filename_as_label use_txt_as_label wandb
""")  # fmt: skip
"""What the practitioner's guide names beyond diffusers."""

MODELARTS = _names("ckpt_dir ckpt_url enable_modelarts multi_data_url pretrain_url train_url")

MINDONE_SDXL_TRAINING = [*MODELARTS, *_names("""
cache_latent cache_path cache_text_embedding class_data_path class_prompt clip_grad config data_path data_sink
dataset_load_tokenizer device_target generate_class_image_config gradient_accumulation_steps infer_during_train
infer_interval instance_data_path instance_prompt is_parallel log_interval lpw max_device_memory
max_embeddings_multiples max_grad_norm max_num_ckpt ms_amp_level ms_enable_allreduce_fusion ms_enable_graph_kernel
ms_mode num_class_images optimizer_weight overflow_still_update param_fp16 per_batch_size prior_loss_weight resume_step
sample_batch_size save_ckpt_interval save_optimizer save_path save_path_with_time scale_lr sd_xl_base_ratios seed
sink_queue_size sink_size snr_gamma task timestep_bias_begin timestep_bias_end timestep_bias_multiplier
timestep_bias_portion timestep_bias_strategy train_data_repeat use_ema version weight
""")]  # fmt: skip
MINDONE_DIFFUSERS_TRAINING = _names("distributed enable_mindspore_data_sink lora_rank")
MINDONE_SD2_TRAINING = _names("""
betas callback_size ckpt_save_interval class_data_dir class_prompt clip_grad decay_steps end_learning_rate epochs
gradient_accumulation_steps image_size init_loss_scale instance_data_dir instance_prompt log_level lora_fp16
lora_ft_text_encoder lora_ft_unet lora_rank loss_scale_factor max_grad_norm mode model_config num_class_images optim
output_path pretrained_model_path prior_loss_weight random_crop sample_batch_size sampling_steps scale scale_window seed
start_learning_rate train_batch_size train_config train_data_repeats train_text_encoder use_ema use_lora use_parallel
warmup_steps weight_decay with_prior_preservation
""")  # fmt: skip

MINDONE_SAMPLING = [*MODELARTS, *_names("""
add_pipeline aesthetic_score config control_image_path controlnet_mode crop_coords_left crop_coords_top deterministic
device_target discretization dynamic_thresholding_ratio finish_denoising guidance_scale guider high_threshold img
init_latent_path init_noise_scheduler_path low_threshold ms_amp_level ms_enable_graph_kernel ms_jit ms_mode
negative_aesthetic_score negative_prompt num_cols num_rows num_vectors orig_height orig_width pipeline_config
pipeline_weight placeholder_token precision_keep_origin_dtype prompt rho sample_max_value sample_step sampler
save_detected_map save_path sd_xl_base_ratios seed sigma_max sigma_min stage2strength strength support_long_prompts
target_height target_width task textual_inversion_weight thresholding weight
""")]  # fmt: skip

CONVERSION = _names("""
checkpoint_path dump_path half model model_path original_config_file scheduler_type sdxl_base_ckpt source source_version
target text_encoder_2_name text_encoder_name unet_name use_safetensors vae_name
""")  # fmt: skip
"""Of the scripts of diffusers, mindone and the guide that convert models."""

KOHYA_TRAINING = _names("""
alpha_mask bucket_reso_steps cache_latents cache_latents_to_disk cache_text_encoder_outputs
cache_text_encoder_outputs_to_disk caption_dropout_rate caption_extension clip_skip config_file dataset_config
dataset_repeats debiased_estimation_loss enable_bucket flip_aug fp8_base full_bf16 full_fp16
gradient_accumulation_steps gradient_checkpointing huber_c huber_schedule huggingface_repo_id huggingface_token
keep_tokens learning_rate learning_rate_te log_prefix log_tracker_name log_with logging_dir loss_type lr_scheduler
lr_scheduler_num_cycles lr_scheduler_power lr_warmup_steps masked_loss max_bucket_reso max_data_loader_n_workers
max_grad_norm max_timestep max_token_length max_train_epochs max_train_steps mem_eff_attn min_bucket_reso min_snr_gamma
min_timestep mixed_precision multires_noise_discount multires_noise_iterations network_alpha network_args network_dim
network_dropout network_module network_train_text_encoder_only network_train_unet_only network_weights no_half_vae
noise_offset optimizer_args optimizer_type output_dir output_name persistent_data_loader_workers
pretrained_model_name_or_path prior_loss_weight random_crop reg_data_dir resize_interpolation resolution resume
sample_at_first sample_every_n_epochs sample_every_n_steps sample_prompts sample_sampler save_every_n_epochs
save_every_n_steps save_last_n_epochs save_last_n_steps save_model_as save_precision save_state sdpa seed
shuffle_caption text_encoder_lr tokenizer_cache_dir train_batch_size train_data_dir unet_lr use_8bit_adam
use_lion_optimizer use_safetensors v2 v_parameterization vae vae_batch_size wandb_run_name weighted_captions xformers
zero_terminal_snr
""")  # fmt: skip
"""What the documents of kohya's sd-scripts use for LoRA, and their like."""

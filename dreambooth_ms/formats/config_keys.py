"""What the keys of a model's configurations may hold: a table for each, in which a key has the type of its values.

A `Literal` is all that these networks and schedulers can do; `Any` is known to change nothing here, as bookkeeping of
the libraries and what counts in their own trainings alone.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.specs import ClipTextSpec, ClipVisionSpec, TransformerSpec, UNetSpec, VaeSpec

Keys: TypeAlias = Mapping[str, Any]
"""Key of a configuration -> type of its values."""

_LARGEST, _MOST = 1e38, 1_000_000
"""Numbers that can be calculated with in float32, NaN and infinity left out; and sizes that networks have."""
_WORDS = {int: "a whole number above 0", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _fields_of(*kinds: type) -> dict[str, Any]:
    return {one.name: one.type for kind in kinds for one in fields(kind)}  # type: ignore[arg-type]


def _each(kind: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


def _only(**values: Any) -> dict[str, Any]:
    return {name: Literal.__getitem__(value) for name, value in values.items()}


UNET_KEYS: Keys = {
    **_fields_of(UNetSpec),
    **_each(Any, "addition_embed_type_num_heads dropout reverse_transformer_layers_per_block upcast_attention"),
    # Of diffusers' moving averages.
    **_each(Any, "decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup"),
    **_only(act_fn="silu", attention_type="default", conv_in_kernel=3, conv_out_kernel=3, downsample_padding=1),
    **_only(flip_sin_to_cos=True, freq_shift=0, mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn"),
    **_only(resnet_out_scale_factor=1, resnet_time_scale_shift="default", time_embedding_type="positional"),
    "addition_embed_type": Literal[None, "text_time"],
    "attention_head_dim": int | tuple[int, ...],
    "down_block_types": tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...],
    "num_attention_heads": int | tuple[int, ...] | None,
    "up_block_types": tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...],
}
VAE_KEYS: Keys = {
    **_fields_of(VaeSpec),
    **_each(Any, "sample_size force_upcast"),
    **_only(act_fn="silu", mid_block_add_attention=True, use_post_quant_conv=True, use_quant_conv=True),
    "down_block_types": tuple[Literal["DownEncoderBlock2D"], ...],
    "out_channels": int,
    "shift_factor": Literal[None, 0],
    "up_block_types": tuple[Literal["UpDecoderBlock2D"], ...],
}

_TRANSFORMERS = """
architectures attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range label2id
length_penalty logit_scale_init_value max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
num_labels num_return_sequences output_attentions output_hidden_states pad_token_id prefix problem_type projection_dim
pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
task_specific_params temperature tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
torchscript transformers_version typical_p use_bfloat16 use_cache
"""
TEXT_KEYS: Keys = _each(Any, _TRANSFORMERS) | _fields_of(ClipTextSpec, TransformerSpec)
VISION_KEYS: Keys = _each(Any, _TRANSFORMERS) | _fields_of(ClipVisionSpec, TransformerSpec) | _only(num_channels=3)
CLIP_KEYS: Keys = {
    **_each(Any, f"{_TRANSFORMERS} text_config_dict vision_config_dict"),
    **_each(dict, "text_config vision_config"),
    "projection_dim": int,
}

_SOLVERS: Keys = {
    **_each(Any, "corrector_order flow_shift lambda_min_clipped noise_sampler_seed predictor_order tau_func"),
    **_each(Any, "tensor_format time_shift_type"),
    **_each(bool | None, "clip_sample euler_at_final lower_order_final predict_x0 set_alpha_to_one skip_prk_steps"),
    **_each(bool | None, "thresholding use_beta_sigmas use_exponential_sigmas use_karras_sigmas use_lu_lambdas"),
    **_each(float, "clip_sample_range dynamic_thresholding_ratio sample_max_value timestep_scaling"),
    **_each(float | None, "sigma_max sigma_min"),
    **_only(predict_epsilon=True, timestep_type="discrete"),
    "algorithm_type": Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"],
    "disable_corrector": tuple[Literal[0] | int, ...],
    "final_sigmas_type": Literal["zero", "sigma_min"],
    "interpolation_type": Literal["linear", "log_linear"],
    "original_inference_steps": int,
    "prediction_type": Literal["epsilon", "v_prediction"],
    "solver_order": Literal[1, 2, 3],
    "solver_type": Literal["midpoint", "heun", "logrho", "bh1", "bh2"],
    "steps_offset": Literal[0] | int,
    "timestep_spacing": Literal["linspace", "leading", "trailing"],
    "variance_type": Literal[None, "fixed_small", "fixed_small_log", "fixed_large"],
}
SCHEDULER_KEYS: Keys = {**_fields_of(NoiseScheduleSpec), **_SOLVERS}
EDM_KEYS: Keys = {
    **_SOLVERS,
    **_each(float, "rho sigma_data sigma_max sigma_min"),
    "num_train_timesteps": int,
    "sigma_schedule": Literal["karras", "exponential"],
}

TOKENIZER_KEYS: Keys = {
    **_each(str | dict, "bos_token eos_token"),
    **_each(str | dict | None, "pad_token unk_token"),
    "model_max_length": float | None,
    "tokenizer_class": Literal["CLIPTokenizer", "CLIPTokenizerFast", None],
}
"""Others go to transformers' own class, and newer ones write whatever they were called with."""


def check_keys(config: Mapping[str, Any], keys: Keys) -> None:
    """Stop at a key that is not known, or at a value that is not of its type.

    Nothing follows from a key that nobody knows if it is null, false or empty: so libraries write what is not used.

    Raises:
        WeightError: what was found and what is expected.
    """
    for key, value in config.items():
        if key not in keys and not (key.startswith("_") or _is_off(value)):
            raise WeightError(
                f"{key} {reprlib.repr(value)} is not known, and may mean another network; use SD 1.x, 2.x or SDXL, "
                "or take the key out if it means nothing"
            )
        if key in keys and not _fits(value, keys[key]):
            raise WeightError(
                f"{key}: expected {_words(keys[key])}, got {reprlib.repr(value)}; "
                "download it again, or use SD 1.x, 2.x or SDXL"
            )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == "" or (isinstance(value, (list, dict)) and not any(value))


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == part for part in parts)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(one, parts[0]) for one in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and 1 <= value <= _MOST
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) < _LARGEST
    return kind is Any or isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join("null" if part is None else str(part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0])}"
    return " or ".join(map(_words, get_args(kind))) or _WORDS.get(kind, "an object")

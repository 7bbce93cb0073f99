"""What the keys of a model's configurations may hold: a table for each, in which a key has the type of its values.

A `Literal` is all that these networks and schedulers can do; `Any` is known to change nothing here, as bookkeeping of
the libraries and what counts in their own trainings alone.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from types import UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

from dreambooth_ms.diffusion.noise_schedule import NoiseScheduleSpec, PredictionType
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.specs import ClipTextSpec, ClipVisionSpec, TransformerSpec, UNetSpec, VaeSpec

Keys: TypeAlias = Mapping[str, Any]
"""Key of a configuration -> type of its values."""

_LARGEST, _MOST = 1e38, 1_000_000
"""Numbers that can be calculated with in float32, NaN and infinity left out; and sizes that networks have."""
_WORDS = {int: "a whole number above 0", float: "a number", bool: "true or false", str: "text", Mapping: "an object"}

_Count: TypeAlias = Literal[0] | int
_Switch: TypeAlias = bool | None
_Never: TypeAlias = Literal[False, None]


def _fields_of(*kinds: type) -> dict[str, Any]:
    return {one.name: one.type for kind in kinds for one in fields(kind)}


def _any(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), Any)


UNET_KEYS: Keys = {
    **_fields_of(UNetSpec),
    **_any("addition_embed_type_num_heads dropout reverse_transformer_layers_per_block upcast_attention"),
    "act_fn": Literal["silu"],
    "addition_embed_type": Literal[None, "text_time"],
    "attention_head_dim": int | tuple[int, ...],
    "attention_type": Literal["default"],
    "center_input_sample": _Never,
    "class_embed_type": Literal[None],
    "conv_in_kernel": Literal[3],
    "conv_out_kernel": Literal[3],
    "down_block_types": tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...],
    "downsample_padding": Literal[1],
    "dual_cross_attention": _Never,
    "encoder_hid_dim": Literal[None],
    "flip_sin_to_cos": Literal[True],
    "freq_shift": Literal[0],
    "mid_block_scale_factor": Literal[1],
    "mid_block_type": Literal["UNetMidBlock2DCrossAttn"],
    "num_attention_heads": int | tuple[int, ...] | None,
    "only_cross_attention": _Never | tuple[_Never, ...],
    "resnet_out_scale_factor": Literal[1],
    "resnet_time_scale_shift": Literal["default"],
    "time_cond_proj_dim": Literal[None],
    "time_embedding_type": Literal["positional"],
    "timestep_post_act": Literal[None],
    "up_block_types": tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...],
}
VAE_KEYS: Keys = {
    **_fields_of(VaeSpec),
    **_any("sample_size force_upcast"),
    "act_fn": Literal["silu"],
    "down_block_types": tuple[Literal["DownEncoderBlock2D"], ...],
    "mid_block_add_attention": Literal[True],
    "out_channels": int,
    "shift_factor": Literal[None, 0],
    "up_block_types": tuple[Literal["UpDecoderBlock2D"], ...],
    "use_post_quant_conv": Literal[True],
    "use_quant_conv": Literal[True],
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
TEXT_KEYS: Keys = {**_any(_TRANSFORMERS), **_fields_of(ClipTextSpec, TransformerSpec)}
VISION_KEYS: Keys = {
    **_any(_TRANSFORMERS),
    **_fields_of(ClipVisionSpec, TransformerSpec),
    "num_channels": Literal[3],
}
CLIP_KEYS: Keys = {
    **_any(f"{_TRANSFORMERS} text_config_dict vision_config_dict"),
    "projection_dim": int,
    "text_config": Mapping,
    "vision_config": Mapping,
}

_SOLVERS: Keys = {
    **_any("flow_shift lambda_min_clipped noise_sampler_seed tensor_format time_shift_type"),
    **dict.fromkeys(("clip_sample", "euler_at_final", "lower_order_final", "predict_x0", "set_alpha_to_one"), _Switch),
    **dict.fromkeys(("skip_prk_steps", "thresholding", "use_beta_sigmas", "use_exponential_sigmas"), _Switch),
    **dict.fromkeys(("use_karras_sigmas", "use_lu_lambdas"), _Switch),
    **dict.fromkeys(("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "timestep_scaling"), float),
    **dict.fromkeys(("sigma_max", "sigma_min"), float | None),
    "algorithm_type": Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"],
    "disable_corrector": tuple[_Count, ...],
    "final_sigmas_type": Literal["zero", "sigma_min"],
    "interpolation_type": Literal["linear", "log_linear"],
    "original_inference_steps": int,
    "predict_epsilon": Literal[True],
    "solver_order": Literal[1, 2, 3],
    "solver_type": Literal["midpoint", "heun", "logrho", "bh1", "bh2"],
    "steps_offset": _Count,
    "timestep_spacing": Literal["linspace", "leading", "trailing"],
    "timestep_type": Literal["discrete"],
    "use_flow_sigmas": _Never,
    "variance_type": Literal[None, "fixed_small", "fixed_small_log", "fixed_large"],
}
SCHEDULER_KEYS: Keys = {**_SOLVERS, **_fields_of(NoiseScheduleSpec)}
EDM_KEYS: Keys = {
    **_SOLVERS,
    **dict.fromkeys(("rho", "sigma_data", "sigma_max", "sigma_min"), float),
    "num_train_timesteps": int,
    "prediction_type": PredictionType,
    "sigma_schedule": Literal["karras", "exponential"],
}

TOKENIZER_KEYS: Keys = {
    **_any("add_bos_token add_eos_token added_tokens_decoder additional_special_tokens backend chat_template"),
    **_any("clean_up_tokenization_spaces do_lower_case errors extra_special_tokens is_local max_length name_or_path"),
    **_any("pad_to_multiple_of pad_token_type_id padding_side processor_class special_tokens_map_file stride"),
    **_any("tokenizer_file truncation truncation_side truncation_strategy use_fast"),
    **dict.fromkeys(("bos_token", "eos_token"), str | Mapping),  # type: ignore[type-arg]
    **dict.fromkeys(("pad_token", "unk_token"), str | Mapping | None),  # type: ignore[type-arg]
    "model_max_length": float | None,
    "tokenizer_class": Literal["CLIPTokenizer", "CLIPTokenizerFast", None],
}


def check_keys(config: Mapping[str, Any], keys: Keys) -> None:
    """Stop at a key that is not known, or at a value that is not of its type.

    Nothing follows from a key that nobody knows if it is null, false or empty: so libraries write what is not used.

    Raises:
        WeightError: what was found and what is expected.
    """
    for key, value in config.items():
        if key not in keys:
            if key.startswith("_") or value is None or value is False or value in ([], {}, ""):
                continue
            raise WeightError(
                f"{key} {reprlib.repr(value)} is not known, and may mean another network; "
                "use SD 1.x, 2.x or SDXL, or take the key out if it means nothing"
            )
        if _fits(value, keys[key]):
            continue
        if _is_choice(keys[key]):
            words = _words(keys[key])
            raise WeightError(f"{key} {reprlib.repr(value)} is not supported (only {words}); use SD 1.x, 2.x or SDXL")
        raise WeightError(f"{key}: expected {_words(keys[key])}, got {reprlib.repr(value)}; correct it")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == part for part in parts)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(one, parts[0]) for one in value)
    if kind is Any:
        return True
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and 1 <= value <= _MOST
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) < _LARGEST
    if issubclass(kind, Enum):
        return any(value == one.value for one in kind)
    return isinstance(value, kind)


def _is_choice(kind: Any) -> bool:
    """Whether the values are what is supported of more that there are."""
    return get_origin(kind) is Literal or any(map(_is_choice, get_args(kind))) or kind is PredictionType


def _words(kind: Any) -> str:
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, parts))
    if get_origin(kind) is tuple:
        return f"a list, each {_words(parts[0])}"
    if parts:
        return " or ".join(map(_words, parts))
    if kind in _WORDS:
        return _WORDS[kind]
    return " or ".join(repr(one.value) for one in kind) if issubclass(kind, Enum) else "null"

"""Ranges of fields, in words and as tests."""

import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from dreambooth_ms.config.aspect_ratios import SD_XL_BASE_RATIOS


class Findings(NamedTuple):
    """What a check of one configuration found, one line per entry."""

    problems: list[str]
    warnings: list[str]


class Range(NamedTuple):
    """The values that a field may take: in words, and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _at_least(lowest: float) -> Range:
    return Range(f"at least {lowest}", lambda value: lowest <= value < math.inf)


_POSITIVE = Range("greater than 0", lambda value: 0 < value < math.inf)


_DECAY = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)


_NOT_EMPTY = Range("not empty", lambda value: len(value) > 0)


_STEPS = Range("from 1 to 1000", lambda value: 1 <= value <= 1000)


_SHARE = Range("greater than 0 and at most 1", lambda value: 0 < value <= 1)


_SCORE = Range("from 0 to 10", lambda value: 0 <= value <= 10)


_SIDE = Range("a multiple of 8, at least 32", lambda value: value >= 32 and value % 8 == 0)


_MEMORY_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([GM])i?B?", re.IGNORECASE)


def memory_size(text: str) -> int | None:
    """Bytes of a size as MindSpore spells it, "16GB" for 16 times 2^30; None if it is none."""
    found = _MEMORY_SIZE.fullmatch(text)
    return int(float(found[1]) * 2 ** (30 if found[2] in "gG" else 20)) if found else None


RANGES: dict[str, Range] = {
    "pretrained_model_name_or_path": _NOT_EMPTY,
    "pretrained_vae_model_name_or_path": _NOT_EMPTY,
    "instance_data_dir": _NOT_EMPTY,
    "instance_prompt": _NOT_EMPTY,
    "resolution": _SIDE,
    "prior_loss_weight": _at_least(0),
    "class_data_dir": _NOT_EMPTY,
    "class_prompt": _NOT_EMPTY,
    "num_class_images": _at_least(1),
    "sample_batch_size": _at_least(1),
    "infer_steps": _STEPS,
    "guidance_scale": _at_least(0),
    "rank": _at_least(1),
    "lora_alpha": _at_least(1),
    "lora_target_modules": _NOT_EMPTY,
    "lora_dropout": _DECAY,
    "ema_decay": _DECAY,
    "snr_gamma": _POSITIVE,
    "noise_offset": _at_least(0),
    "learning_rate": _POSITIVE,
    "text_encoder_lr": _POSITIVE,
    "gradient_accumulation_steps": _at_least(1),
    "validation_prompt": _NOT_EMPTY,
    "num_validation_images": _at_least(1),
    "validation_steps": _at_least(1),
    "lr_warmup_steps": _at_least(0),
    "lr_num_cycles": _at_least(1),
    "lr_power": _POSITIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_weight_decay": _at_least(0),
    "adam_weight_decay_text_encoder": _at_least(0),
    "adam_epsilon": _POSITIVE,
    "prodigy_beta3": _DECAY,
    "max_grad_norm": _POSITIVE,
    "init_loss_scale": _at_least(1),
    "loss_scale_factor": Range("greater than 1", lambda value: 1 < value < math.inf),
    "scale_window": _at_least(1),
    "train_batch_size": _at_least(1),
    "max_device_memory": Range("a size such as 16GB", lambda value: bool(memory_size(value))),
    "max_train_steps": _at_least(1),
    "num_train_epochs": _at_least(1),
    "seed": Range("from 0 to 2**64 - 1", lambda value: 0 <= value < 2**64),
    "output_dir": _NOT_EMPTY,
    "checkpointing_steps": _at_least(1),
    "checkpoints_total_limit": _at_least(1),
    "resume_from_checkpoint": _NOT_EMPTY,
    "logging_dir": _NOT_EMPTY,
    "num_processes": _at_least(1),
    "zero_stage": Range("0 or 1", lambda value: value in (0, 1)),
    "ms_mode": Range("0 or 1", lambda value: value in (0, 1)),
    "lora_scale": Range("finite numbers", lambda value: len(value) > 0 and all(map(math.isfinite, value))),
    "prompt": _NOT_EMPTY,
    "num_images_per_prompt": _at_least(1),
    "batch_size": _at_least(1),
    "height": _SIDE,
    "width": _SIDE,
    "num_inference_steps": _STEPS,
    "sd_xl_base_ratios": Range(f"one of {', '.join(SD_XL_BASE_RATIOS)}", lambda value: value in SD_XL_BASE_RATIOS),
    "guidance_rescale": Range("from 0 to 1", lambda value: 0 <= value <= 1),
    "clip_skip": _at_least(0),
    "vae_whole_up_to": _SIDE,
    "num_rows": _at_least(1),
    "num_cols": _at_least(1),
    "image": _NOT_EMPTY,
    "strength": _SHARE,
    "orig_height": _at_least(1),
    "orig_width": _at_least(1),
    "target_height": _at_least(1),
    "target_width": _at_least(1),
    "crop_coords_top": _at_least(0),
    "crop_coords_left": _at_least(0),
    "aesthetic_score": _SCORE,
    "negative_aesthetic_score": _SCORE,
    "refiner": _NOT_EMPTY,
    "denoising_end": Range("greater than 0 and less than 1", lambda value: 0 < value < 1),
    "refiner_strength": _SHARE,
    "clip": _NOT_EMPTY,
    "source": _NOT_EMPTY,
    "target": _NOT_EMPTY,
    "base": _NOT_EMPTY,
    "scale": Range("a finite number", math.isfinite),
    "alpha": Range("a finite number", math.isfinite),
}
"""Ranges by field name, the same in every command. None is never out of range."""


def out_of_range(config: Any) -> list[str]:
    """One line per field of a sectioned config whose value is outside its entry in RANGES."""
    lines = []
    for section in fields(config):
        for name, value in vars(getattr(config, section.name)).items():
            if value is not None and name in RANGES and not RANGES[name].holds(value):
                lines.append(f"--{name}: expected {RANGES[name].expected}, got {value!r}")
    return lines


def _changed(section: Any) -> list[str]:
    """Names of the fields that differ from their defaults."""
    defaults = type(section)()
    return [name for name, value in vars(section).items() if value != getattr(defaults, name)]

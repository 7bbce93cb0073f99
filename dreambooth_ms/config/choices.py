"""Choices that other rooms know, too: the values that a flag takes, by the names users write."""

from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
FloatType: TypeAlias = Literal["fp32", "fp16", "bf16"]
Method: TypeAlias = Literal["lora", "full", "custom_diffusion", "textual_inversion"]
AdapterKind: TypeAlias = Literal["lora", "locon", "dora", "loha", "lokr", "oft"]
PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]
LearningRateSchedule: TypeAlias = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
ValidationScheduler: TypeAlias = Literal["DPMSolverMultistepScheduler", "DDIMScheduler"]
SamplingScheduler: TypeAlias = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_a", "heun", "dpm++_2m", "dpm++_2m_karras", "dpm++_2s", "dpm++_sde",
    "unipc", "deis", "lcm", "edm_euler", "edm_dpm++_2m",
]  # fmt: skip


def read_table(path: Path) -> dict[str, Any]:
    """A YAML file of this package. By libyaml where PyYAML has it, which takes a twentieth of the time."""
    content: dict[str, Any] = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return content


_SIZES = read_table(Path(__file__).with_name("sizes.yaml"))
BUCKETS: dict[int, list[tuple[int, int]]] = {side: [*map(tuple, own)] for side, own in _SIZES["buckets"].items()}
SD_XL_BASE_RATIOS: dict[str, tuple[int, int]] = {name: tuple(own) for name, own in _SIZES["sd_xl_base_ratios"].items()}

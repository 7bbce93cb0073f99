"""Choices that other rooms know, too: the values that a flag takes, by the names users write."""

from typing import Literal, TypeAlias

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

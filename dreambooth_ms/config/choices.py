"""Choices of fields: the values that a flag takes, by the names users write."""

from typing import Literal, TypeAlias

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Method: TypeAlias = Literal["lora", "full"]
Optimizer: TypeAlias = Literal["AdamW", "adafactor", "prodigy"]
MixedPrecision: TypeAlias = Literal["no", "fp16", "bf16"]
LossScalerType: TypeAlias = Literal["dynamic", "static"]
PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]
LearningRateSchedule: TypeAlias = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
DeviceTarget: TypeAlias = Literal["auto", "CPU", "Ascend"]
ValidationScheduler: TypeAlias = Literal["DPMSolverMultistepScheduler", "DDIMScheduler"]
SamplingScheduler: TypeAlias = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_a", "heun", "dpm++_2m", "dpm++_2m_karras", "dpm++_2s", "dpm++_sde",
    "unipc", "deis", "lcm", "edm_euler", "edm_dpm++_2m",
]  # fmt: skip
SamplingTask: TypeAlias = Literal["txt2img", "img2img"]
WeightType: TypeAlias = Literal["fp32", "fp16", "bf16"]
ModelFormat: TypeAlias = Literal["diffusers", "stability", "mindone"]
WeightFormat: TypeAlias = Literal[
    "diffusers", "stability", "mindone", "kohya", "kohya_diffusers", "peft", "diffusers_peft", "diffusers_processors"
]

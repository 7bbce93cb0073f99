"""Choices that other rooms know, too: the values that a flag takes, by the names users write."""

from typing import Literal, TypeAlias

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
FloatType: TypeAlias = Literal["fp32", "fp16", "bf16"]
Method: TypeAlias = Literal["lora", "full"]
PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]
LearningRateSchedule: TypeAlias = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
ValidationScheduler: TypeAlias = Literal["DPMSolverMultistepScheduler", "DDIMScheduler"]
SamplingScheduler: TypeAlias = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_a", "heun", "dpm++_2m", "dpm++_2m_karras", "dpm++_2s", "dpm++_sde",
    "unipc", "deis", "lcm", "edm_euler", "edm_dpm++_2m",
]  # fmt: skip
SD_XL_BASE_RATIOS: dict[str, tuple[int, int]] = {
    "0.5": (704, 1408), "0.52": (704, 1344), "0.57": (768, 1344), "0.6": (768, 1280),
    "0.68": (832, 1216), "0.72": (832, 1152), "0.78": (896, 1152), "0.82": (896, 1088),
    "0.88": (960, 1088), "0.94": (960, 1024), "1.0": (1024, 1024), "1.0_768": (768, 768),
    "1.0_512": (512, 512), "1.07": (1024, 960), "1.13": (1088, 960), "1.21": (1088, 896),
    "1.29": (1152, 896), "1.38": (1152, 832), "1.46": (1216, 832), "1.67": (1280, 768),
    "1.75": (1344, 768), "1.91": (1344, 704), "2.0": (1408, 704), "2.09": (1472, 704),
    "2.4": (1536, 640), "2.5": (1600, 640), "2.89": (1664, 576), "3.0": (1728, 576),
}  # fmt: skip
"""The sizes that SDXL was trained at, by the names that mindone's guide gives them (width over height, rounded) ->
(width, height) in pixels."""

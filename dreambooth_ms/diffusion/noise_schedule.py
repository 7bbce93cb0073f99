"""The forward process of DDPM (Ho et al., 2020): how much signal and noise a timestep holds. Float64 numpy."""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from dreambooth_ms.errors import ConfigError


class PredictionType(str, Enum):
    """What the UNet predicts: the noise, or the velocity (Salimans and Ho, 2022)."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"


@dataclass(frozen=True, kw_only=True)
class NoiseScheduleSpec:
    """The forward process the model was trained with."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: PredictionType = PredictionType.EPSILON


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = signal_t x_0 + noise_t eps (eq. 4), with signal_t^2 + noise_t^2 = 1."""

    alphas_cumprod: np.ndarray
    """(T,) float64: the products written alpha-bar in the paper."""

    @classmethod
    def from_spec(cls, spec: NoiseScheduleSpec) -> "NoiseSchedule":
        """The schedule of a model folder. `scaled_linear` is linear in the square root of beta (latent diffusion)."""
        power = {"linear": 1, "scaled_linear": 2}.get(spec.beta_schedule)
        if power is None:
            raise ConfigError(f"beta_schedule {spec.beta_schedule!r}: expected scaled_linear or linear")
        start, end = spec.beta_start ** (1 / power), spec.beta_end ** (1 / power)
        return cls(np.cumprod(1 - np.linspace(start, end, spec.num_train_timesteps, dtype=np.float64) ** power))

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps run from 0 (almost clean) to T - 1 (almost noise)."""
        return len(self.alphas_cumprod)

    def signal(self, timesteps: np.ndarray) -> np.ndarray:
        """Factor of the clean latents at these timesteps."""
        return np.sqrt(self.alphas_cumprod[timesteps])

    def noise(self, timesteps: np.ndarray) -> np.ndarray:
        """Factor of the noise at these timesteps."""
        return np.sqrt(1 - self.alphas_cumprod[timesteps])

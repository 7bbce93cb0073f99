"""The forward process of DDPM (Ho et al., 2020): how much signal and noise a timestep holds. Float64 numpy."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dreambooth_ms.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NoiseScheduleSpec:
    """The forward process the model was trained with, by the keys of diffusers' schedulers."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    """In place of those that `beta_schedule` makes, one for each timestep."""
    rescale_betas_zero_snr: bool = False
    """Whether the last timestep holds no signal (Lin et al., 2024)."""
    prediction_type: str = "epsilon"
    """What the UNet predicts: the noise, or the velocity, "v_prediction" (Salimans and Ho, 2022)."""


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = signal_t x_0 + noise_t eps (eq. 4), with signal_t^2 + noise_t^2 = 1."""

    alphas_cumprod: np.ndarray
    """(T,) float64: the products written alpha-bar in the paper."""

    @classmethod
    def from_spec(cls, spec: NoiseScheduleSpec) -> "NoiseSchedule":
        """The schedule of a model folder.

        Raises:
            ConfigError: the betas are none, or the noise is predicted where there is nothing else.
        """
        betas, count = _betas(spec), spec.num_train_timesteps
        if len(betas) != count or count < 2 or not (betas.min() > 0 and betas[:-1].max() < 1 >= betas[-1]):
            raise ConfigError(
                f"betas: expected one above 0 and below 1 for each of {count} timesteps, got {len(betas)} from "
                f"{betas.min(initial=1):g} to {betas.max(initial=0):g}; take the scheduler of the original model"
            )
        alphas_cumprod = np.cumprod(1 - betas)
        if spec.rescale_betas_zero_snr:
            # Algorithm 1 of Lin et al.: the first stays as it is, the last becomes 0.
            root = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        if alphas_cumprod[-1] == 0 and spec.prediction_type == "epsilon":
            raise ConfigError(
                "prediction_type epsilon with zero terminal SNR (rescale_betas_zero_snr): no picture follows from the "
                "noise where there is nothing else; such models predict v_prediction"
            )
        return cls(alphas_cumprod)

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

    def betas(self, least: float = 0.0) -> np.ndarray:
        """The betas (T,) float64 of these products, none of which is taken to be below `least`."""
        products = np.maximum(self.alphas_cumprod, least)
        return 1 - products / np.append(1.0, products[:-1])


def _betas(spec: NoiseScheduleSpec) -> np.ndarray:
    """(T,) float64. `scaled_linear` is linear in the square root of beta (latent diffusion)."""
    if spec.trained_betas is not None:
        return np.array(spec.trained_betas, np.float64)
    power = {"linear": 1, "scaled_linear": 2}.get(spec.beta_schedule)
    if power is None:
        raise ConfigError(f"beta_schedule {spec.beta_schedule!r}: expected scaled_linear or linear")
    start, end = (max(beta, 0.0) ** (1 / power) for beta in (spec.beta_start, spec.beta_end))
    return np.linspace(start, end, spec.num_train_timesteps, dtype=np.float64) ** power

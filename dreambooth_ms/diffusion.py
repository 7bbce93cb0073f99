"""The formulas of diffusion models, without state. Float64 numpy.

The forward process of DDPM (Ho et al., 2020): how much signal and noise a timestep holds. Objectives: what the network
reads of clean latents x0 and noise n, and what it should answer. All that are linear in x0 and n are one thing, a few
numbers for each row. To add one is a function here and its name in the schema.

Shapes: B rows, C, H, W of the latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Columns:
    """The rows of a batch, each field (B,) float64: network input = in_x x0 + in_n n, target = out_x x0 + out_n n."""

    in_x: np.ndarray
    in_n: np.ndarray
    out_x: np.ndarray
    out_n: np.ndarray
    time: np.ndarray
    """The timestep that the network reads, which need not be whole."""
    weight: np.ndarray
    """Of the row's error: the mean squared difference of prediction and target."""

    def network_input(self, clean_BCHW: np.ndarray, noise_BCHW: np.ndarray) -> np.ndarray:
        """What the network reads (B, C, H, W) float32."""
        return _mixture(self.in_x, clean_BCHW, self.in_n, noise_BCHW)

    def target(self, clean_BCHW: np.ndarray, noise_BCHW: np.ndarray) -> np.ndarray:
        """What it should answer (B, C, H, W) float32."""
        return _mixture(self.out_x, clean_BCHW, self.out_n, noise_BCHW)


def _mixture(x_B: np.ndarray, clean_BCHW: np.ndarray, n_B: np.ndarray, noise_BCHW: np.ndarray) -> np.ndarray:
    x, n = (factor_B[:, None, None, None] for factor_B in (x_B, n_B))
    return (x * clean_BCHW + n * noise_BCHW).astype(np.float32)


def epsilon_at(schedule: NoiseSchedule, timesteps_B: np.ndarray) -> Columns:
    """x_t = signal x0 + noise n (Ho et al., 2020, eq. 4), and the noise n; all rows weigh 1."""
    signal, noise = schedule.signal(timesteps_B), schedule.noise(timesteps_B)
    zeros = np.zeros(len(signal))
    return Columns(signal, noise, zeros, zeros + 1, timesteps_B.astype(np.float64), zeros + 1)


def velocity_at(schedule: NoiseSchedule, timesteps_B: np.ndarray) -> Columns:
    """The same x_t, and the velocity signal n - noise x0 (Salimans and Ho, 2022, section 4)."""
    columns = epsilon_at(schedule, timesteps_B)
    return replace(columns, out_x=-columns.in_n, out_n=columns.in_x)


def min_snr(columns: Columns, gamma: float) -> Columns:
    """Weights that count errors of the clean latents by min(SNR, gamma) (Hang et al., 2023).

    The input is known, so an error of the clean latents is one of the target, times
    (in_n out_x - out_n in_x) / in_n. With SNR = (in_x / in_n)^2 this is min(SNR, gamma) / SNR where the noise is
    predicted, and min(SNR, gamma) / (SNR + 1) where the velocity is.
    """
    snr = (columns.in_x / columns.in_n) ** 2
    target_per_clean = (columns.in_n * columns.out_x - columns.out_n * columns.in_x) / columns.in_n
    return replace(columns, weight=columns.weight * np.minimum(snr, gamma) / target_per_clean**2)


OBJECTIVES: dict[str, Callable[[NoiseSchedule, np.ndarray], Columns]] = {
    "epsilon": epsilon_at,
    "v_prediction": velocity_at,
}
"""By the names of the schema (`config.choices.PredictionType`)."""


def draw_columns(
    name: str, schedule: NoiseSchedule, snr_gamma: float | None = None
) -> Callable[[Sequence[np.random.Generator]], Columns]:
    """The objective of this name for a model: a generator for each row -> columns, with min-SNR weights for a gamma.

    Timesteps of the model's noise are drawn evenly (Ho et al., 2020, algorithm 1).
    """

    def drawn(generators: Sequence[np.random.Generator]) -> Columns:
        timesteps_B = np.array([rng.integers(schedule.num_train_timesteps) for rng in generators])
        columns = OBJECTIVES[name](schedule, timesteps_B)
        return min_snr(columns, snr_gamma) if snr_gamma else columns

    return drawn

"""Objectives: what the network reads of clean latents x0 and noise n, and what it should answer. Float64 numpy.

All that are linear in x0 and n are one thing, a few numbers for each row. To add one is a function here and its name in
the schema. Shapes: B rows, C, H, W of the latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule


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

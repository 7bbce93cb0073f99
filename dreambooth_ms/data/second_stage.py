"""What a second stage, which enlarges pictures, reads beside its noisy ones in training. Shapes: B rows, C, H, W of
pictures."""

from collections.abc import Callable, Sequence

import numpy as np

from dreambooth_ms.diffusion import NoiseSchedule, low_resolution

ENLARGED = 4
"""How many times each side is, as IF's."""

Draws = Callable[[str], np.random.Generator]
"""The random numbers of a row, by what they are for."""

SecondStage = Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[Draws]], tuple[np.ndarray, np.ndarray]]
"""Noisy pictures (B, C, H, W), their timesteps (B,), the clean ones, draws -> what is read behind the noisy ones (B, C,
H, W), and class labels (B,)."""


def twice(
    noisy_BCHW: np.ndarray, timestep_B: np.ndarray, clean_BCHW: np.ndarray, draws: Sequence[Draws]
) -> tuple[np.ndarray, np.ndarray]:
    """The noisy picture again, as diffusers' scripts train it."""
    return noisy_BCHW, timestep_B


def small_ones(schedule: NoiseSchedule) -> SecondStage:
    """The picture made small, then noisy at a timestep of its own and enlarged, as IF was trained."""

    def beside(
        noisy_BCHW: np.ndarray, timestep_B: np.ndarray, clean_BCHW: np.ndarray, draws: Sequence[Draws]
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, channels, height, width = clean_BCHW.shape
        parts = clean_BCHW.reshape(rows, channels, height // ENLARGED, ENLARGED, width // ENLARGED, ENLARGED)
        levels = np.array([own("level of the small picture").integers(len(schedule.alphas_cumprod)) for own in draws])
        noise = [own("noise of the small picture").standard_normal(clean_BCHW.shape[1:], np.float32) for own in draws]
        small = parts.mean((3, 5), dtype=np.float64)
        return low_resolution(schedule, levels, small, np.stack(noise)), levels.astype(np.float32)

    return beside

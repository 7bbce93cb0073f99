"""What a second stage, which enlarges pictures, reads beside its noisy ones. Shapes: B rows, N pictures of a request, C
channels; H, W of the second stage's pictures, h, w of small ones."""

from collections.abc import Callable, Sequence

import numpy as np

from dreambooth_ms.diffusion import NoiseSchedule, low_resolution
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.randomness import standard_normal

PURPOSE = "noise of the small pictures"
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


def of_request(
    small_NChw: np.ndarray, size: tuple[int, int], level: int, noise: NoiseSchedule, seed: int, numbers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What is read in sampling: small pictures from -1 to 1, noisy at one level and enlarged to `size`, (N, C, H, W)
    float32, and class labels (N,) float32. The noise is a function of the seed and of a picture's own number among
    `numbers`. ConfigError if there is no such level."""
    check_level(level, noise)
    levels_N = np.full(len(small_NChw), level)
    drawn = [standard_normal((small_NChw.shape[1], *size), seed, PURPOSE, row=number) for number in numbers]
    return low_resolution(noise, levels_N, small_NChw, np.stack(drawn)), levels_N.astype(np.float32)


def check_level(level: int, noise: NoiseSchedule) -> None:
    """Raise ConfigError if there is no such level of noise."""
    count = len(noise.alphas_cumprod)
    if not 0 <= level < count:
        raise ConfigError(f"--noise_level {level}: expected 0 to {count - 1}; 250 is usual")

"""What a second stage reads of small pictures, such as the first one's.

Shapes: N pictures, C channels; h, w of the small ones, H, W of the second stage's.
"""

from collections.abc import Sequence

import numpy as np

from dreambooth_ms import diffusion
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.model_config import Config, read_scheduler_config
from dreambooth_ms.randomness import standard_normal

PURPOSE = "noise of the small pictures"


def noise_of_small(config: Config) -> diffusion.NoiseSchedule:
    """The noise of a configuration of `image_noising_scheduler`; WeightError if it is not mixed with pictures."""
    spec = read_scheduler_config(config)
    if not isinstance(spec, diffusion.NoiseScheduleSpec):
        raise WeightError("image_noising_scheduler: is of EDM's formulation; take the original model's")
    return diffusion.NoiseSchedule.from_spec(spec)


def low_resolution(
    small_NChw: np.ndarray, size: tuple[int, int], noise_level: int, config: Config, seed: int, numbers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures from -1 to 1, noisy and enlarged, and their class labels (`diffusion.low_resolution`).

    Args:
        small_NChw: float32.
        size: (H, W) of the result.
        noise_level: a timestep, of which all pictures' noise is.
        config: `scheduler_config.json` of the model's `image_noising_scheduler`.
        seed: of the noise, which depends on a picture's own number too, not on the others.
        numbers: of the pictures.

    Returns:
        Channels (N, C, H, W) float32 that the denoiser reads behind noisy pictures, and labels (N,) float32.

    Raises:
        ConfigError: there is no such level.
        WeightError: the configuration is of no noise that is mixed with a picture.
    """
    schedule = noise_of_small(config)
    if not 0 <= noise_level < (count := len(schedule.alphas_cumprod)):
        raise ConfigError(f"--noise_level {noise_level}: expected 0 to {count - 1}; 250 is usual")
    shape, levels_N = (small_NChw.shape[1], *size), np.full(len(small_NChw), noise_level)
    noise_NCHW = np.stack([standard_normal(shape, seed, PURPOSE, row=number) for number in numbers])
    return diffusion.low_resolution(schedule, levels_N, small_NChw, noise_NCHW), levels_N.astype(np.float32)

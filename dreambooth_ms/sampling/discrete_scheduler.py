"""What schedulers of ours have in common: the timesteps of a model's noise, and the noise that a step draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import Tensor

from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, PredictionType
from dreambooth_ms.formats.model_config import read_scheduler_config
from dreambooth_ms.randomness import standard_normal

PURPOSE = "noise of a sampling step"


class RowNoise:
    """The random numbers of one step: each row's are a function of the seed, the step and the row's number, so they do
    not depend on the batch that the row is in. Schedulers take it for numpy's generator."""

    def __init__(self, seed: int, step: int, rows: Sequence[int]) -> None:
        self._seed, self._step, self._rows = seed, step, rows

    def standard_normal(self, size: Sequence[int]) -> np.ndarray:
        """(B, ...) float32 draws from N(0, 1)."""
        shape = tuple(size)[1:]
        return np.stack([standard_normal(shape, self._seed, PURPOSE, self._step, row) for row in self._rows])


class DiscreteScheduler:
    """A scheduler on the timesteps of the noise that a model was trained with, by its `scheduler_config.json`.

    The interface is that of mindone's schedulers. Latents have deviation 1 at every timestep.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Mapping[str, Any]) -> None:
        spec = read_scheduler_config(config)
        self.alphas_cumprod = NoiseSchedule.from_spec(spec).alphas_cumprod
        self.num_train_timesteps = len(self.alphas_cumprod)
        self._kind = spec.prediction_type
        self._offset = int(config.get("steps_offset", 0))

    def scale_model_input(self, latents: Tensor, timestep: int) -> Tensor:
        """What the network sees: the latents as they are."""
        return latents

    def spaced(self, spacing: str, steps: int) -> np.ndarray:
        """So many timesteps, the largest first, as diffusers' schedulers space them "leading" or "trailing" (Lin et
        al., 2024, table 2)."""
        if spacing == "trailing":
            stride = self.num_train_timesteps / steps
            return np.round(np.arange(self.num_train_timesteps, 0, -stride)).astype(np.int64) - 1
        stride = self.num_train_timesteps // steps
        return (np.arange(steps) * stride)[::-1].astype(np.int64) + self._offset

    def clean_latents(self, prediction: Tensor, latents: Tensor, alpha_cumprod: float) -> Tensor:
        """x_0 of noisy latents by what was predicted of them: the noise, or the velocity (Salimans and Ho, 2022)."""
        signal, noise = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
        if self._kind is PredictionType.V_PREDICTION:
            return latents * float(signal) - prediction * float(noise)
        return (latents - prediction * float(noise)) * float(1 / signal)

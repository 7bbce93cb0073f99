"""The way of one batch from its noise, or from the latents of other pictures, to its own latents.

Shapes: B rows, C, h, w of the latents.
"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms.formats.model_config import Config
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.sampling.schedulers import SCHEDULERS

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


class Trajectory:
    """The timesteps of a batch and what becomes of its latents in them.

    Args:
        request: the scheduler, its steps, which of them are taken, and the seed of the noise that they draw.
        config: `scheduler_config.json` of the model.
        numbers: the pictures' own, on which that noise depends too.
        from_picture: whether the latents begin as those of other pictures, in place of noise.
    """

    def __init__(
        self, request: SampleRequest, config: Config, numbers: Sequence[int], from_picture: bool = False
    ) -> None:
        self._kind = SCHEDULERS[request.scheduler]
        self._scheduler = self._kind.create(config)
        self._scheduler.set_timesteps(request.num_inference_steps)
        self._seed, self._numbers = request.seed, numbers
        self._continues = request.denoising_start is not None
        levels = np.array([float(timestep) for timestep in self._scheduler.timesteps])
        trained = int(config.get("num_train_timesteps", 1000))
        self._first, end = taken_steps(levels, request, self._scheduler.order, trained, from_picture)
        self.timesteps: list[Any] = list(self._scheduler.timesteps[self._first : end])
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(self._first)

    def begin(self, noise_BChw: np.ndarray, start_BChw: np.ndarray | None) -> Tensor:
        """The latents before the first step: noise, other latents with noise added, or noisy ones as they are."""
        if start_BChw is None:
            return Tensor(noise_BChw, ms.float32) * float(self._scheduler.init_noise_sigma)
        if self._continues or not self.timesteps:
            return Tensor(start_BChw, ms.float32)
        if getattr(self._scheduler, "sigmas", None) is not None:
            sigma = float(self._scheduler.sigmas[self._first])
            signal = 1.0 if self._kind.keeps_signal else 1 / (1 + sigma**2) ** 0.5
            noise = signal * sigma
        else:
            alpha = float(self._scheduler.alphas_cumprod[int(self.timesteps[0])])
            signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        return Tensor(start_BChw * np.float32(signal) + noise_BChw * np.float32(noise), ms.float32)

    def inputs(self, latents_BChw: Tensor, timestep: Any) -> Tensor:
        """What the network sees of noisy latents."""
        return self._scheduler.scale_model_input(latents_BChw, timestep)

    def step(self, index: int, prediction_BChw: Tensor, latents_BChw: Tensor) -> Tensor:
        """The latents after `timesteps[index]`."""
        timestep, more = self.timesteps[index], {}
        if self._kind.draws_noise:
            more["generator"] = RowNoise(self._seed, self._first + index, self._numbers)
        return self._scheduler.step(prediction_BChw, timestep, latents_BChw, **more)[0]


def taken_steps(
    levels: np.ndarray, request: SampleRequest, order: int, num_train_timesteps: int, from_picture: bool
) -> tuple[int, int]:
    """First and end of the steps that are taken, as diffusers' pipelines choose them.

    Args:
        levels: all timesteps of the scheduler, from noise to picture.
        request: `strength`, `denoising_start` and `denoising_end` are read.
        order: evaluations of each step.
        num_train_timesteps: of the model, which the shares of the noise's range refer to.
        from_picture: whether `strength` counts.
    """
    first, end, steps = 0, len(levels), request.num_inference_steps
    if request.denoising_start is not None:
        left = int((levels < round(num_train_timesteps - request.denoising_start * num_train_timesteps)).sum())
        # A step of two evaluations is not begun in its middle.
        first = end - (left + 1 if order == 2 and left % 2 == 0 else left)
    elif from_picture:
        first = max(steps - min(int(steps * request.strength), steps), 0) * order
    if request.denoising_end is not None:
        end = int((levels >= round(num_train_timesteps - request.denoising_end * num_train_timesteps)).sum())
    return first, end

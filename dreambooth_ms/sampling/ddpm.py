"""Ancestral sampling of DDPM (Ho et al., 2020). mindone's port needs an operator that CPUs have not (`NonZeroExt`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Tensor, ops

from dreambooth_ms.sampling.discrete_scheduler import DiscreteScheduler, RowNoise


class DDPMScheduler(DiscreteScheduler):
    """x_{t-1} ~ N(mu(x_t, x_0), variance) with the posterior's mean and variance of the paper's eq. 7.

    `config` are the keys of diffusers' scheduler of this name.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._spacing = config.get("timestep_spacing", "leading")
        self._clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps, from noise to picture."""
        last = self.num_train_timesteps - 1
        if self._spacing == "linspace":
            self.timesteps = np.linspace(0, last, num_inference_steps).round()[::-1].astype(np.int64)
        else:
            self.timesteps = self.spaced(self._spacing, num_inference_steps)
        self._next = dict(zip(self.timesteps.tolist(), self.timesteps[1:].tolist(), strict=False))

    def step(self, prediction: Tensor, timestep: int, latents: Tensor, generator: RowNoise) -> tuple[Tensor]:
        """The latents at the next timestep; `generator` draws the step's noise, which the last one has not."""
        here = self.alphas_cumprod[timestep]
        following = self._next.get(int(timestep))
        there = 1.0 if following is None else self.alphas_cumprod[following]
        clean = self.clean_latents(prediction, latents, here)
        if self._clip is not None:
            clean = ops.clamp(clean, -self._clip, self._clip)
        beta = 1 - here / there
        mean = clean * float(there**0.5 * beta / (1 - here)) + latents * float(
            (here / there) ** 0.5 * (1 - there) / (1 - here)
        )
        if timestep <= 0:
            return (mean,)
        deviation = max((1 - there) / (1 - here) * beta, 1e-20) ** 0.5
        return (mean + Tensor(generator.standard_normal(latents.shape)) * float(deviation),)

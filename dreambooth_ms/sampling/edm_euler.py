"""Euler steps in EDM's formulation (Karras et al., 2022, algorithm 1 without its second half), for models that were
trained in it. mindone's port needs an operator that CPUs have not (`Arange`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Tensor


class EDMEulerScheduler:
    """The interface is that of mindone's schedulers; `config` are the keys of diffusers' scheduler of this name."""

    order = 1

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._data = float(config.get("sigma_data", 0.5))
        self._range = float(config.get("sigma_max", 80.0)), float(config.get("sigma_min", 0.002))
        self._rho = float(config.get("rho", 7.0))
        self._exponential = config.get("sigma_schedule", "karras") == "exponential"
        self._velocity = config.get("prediction_type", "epsilon") == "v_prediction"
        self.init_noise_sigma = (self._range[0] ** 2 + 1) ** 0.5
        self._index = 0

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Noise levels by eq. 5 of the paper; timesteps are what the network is told of them, log(sigma) / 4."""
        ramp = np.linspace(0, 1, num_inference_steps)
        first, last = self._range
        if self._exponential:
            sigmas = np.exp(np.log(first) + ramp * (np.log(last) - np.log(first)))
        else:
            root = 1 / self._rho
            sigmas = (first**root + ramp * (last**root - first**root)) ** self._rho
        self.timesteps = 0.25 * np.log(sigmas)
        self.sigmas = np.append(sigmas, 0.0)

    def set_begin_index(self, index: int) -> None:
        """Begin at this noise level, as image to image does."""
        self._index = index

    def scale_model_input(self, latents: Tensor, timestep: float) -> Tensor:
        """c_in of the paper's table 1."""
        return latents * float((self._sigma**2 + self._data**2) ** -0.5)

    def step(self, prediction: Tensor, timestep: float, latents: Tensor) -> tuple[Tensor]:
        """The latents at the next noise level, by c_skip and c_out of the paper's table 1."""
        sigma, data = self._sigma, self._data
        total = sigma**2 + data**2
        out = sigma * data / total**0.5
        clean = latents * float(data**2 / total) + prediction * float(-out if self._velocity else out)
        change = (float(self.sigmas[self._index + 1]) - sigma) / sigma
        self._index += 1
        return (latents + (latents - clean) * float(change),)

    @property
    def _sigma(self) -> float:
        return float(self.sigmas[self._index])

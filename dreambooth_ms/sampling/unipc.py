"""UniPC (Zhao et al., 2023): a multistep predictor and a corrector that costs no evaluation more.

Order 2 with B(h) = e^h - 1 on the predicted clean latents, as diffusers has it by default. mindone's port needs an
operator that CPUs have not (`StackExt`).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor

from dreambooth_ms.sampling.discrete_noise import DiscreteNoise

ORDER = 2


class _Past(NamedTuple):
    """A step that was taken."""

    position: int
    clean: Tensor
    """The clean latents that were predicted in it."""


class UniPCMultistepScheduler:
    """The interface is that of mindone's schedulers; `config` are the keys of diffusers' scheduler of this name."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._noise = DiscreteNoise(config)
        self._spacing = config.get("timestep_spacing", "linspace")
        self._index = 0

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps, from noise to picture."""
        table = self._noise.alphas_cumprod
        if self._spacing == "linspace":
            spaced = np.linspace(0, len(table) - 1, num_inference_steps + 1).round()[::-1][:-1].astype(np.int64)
        elif self._spacing == "leading":
            spaced = self._noise.spaced("leading", num_inference_steps + 1)[:-1]
        else:
            spaced = self._noise.spaced("trailing", num_inference_steps)
        self.timesteps = spaced
        self.sigmas = np.append(((1 - table[spaced]) / table[spaced]) ** 0.5, 0.0)
        self._past: list[_Past] = []
        self._corrects_from: Tensor | None = None
        self._last_order = 0

    def set_begin_index(self, index: int) -> None:
        """Begin at this timestep, as image to image does."""
        self._index = index

    def scale_model_input(self, latents: Tensor, timestep: int) -> Tensor:
        """Nothing to do: latents have deviation 1 at every timestep."""
        return latents

    def step(self, prediction: Tensor, timestep: int, latents: Tensor) -> tuple[Tensor]:
        """The latents at the next timestep."""
        here = self._index
        clean = self._noise.clean_latents(prediction, latents, self._noise.alphas_cumprod[int(timestep)])
        if self._corrects_from is not None:
            latents = self._corrected(self._corrects_from, clean)
        self._past = [_Past(here, clean), *self._past][:ORDER]
        # Fewer at the beginning, where there is no past, and at the end, where there is no noise.
        self._last_order = min(ORDER, len(self.timesteps) - here, len(self._past))
        self._corrects_from = latents
        self._index += 1
        return (self._predicted(latents),)

    def _predicted(self, latents: Tensor) -> Tensor:
        """UniP, eq. 9 of the paper for data prediction: from the newest step to the next timestep."""
        newest = self._past[0]
        step = self._between(newest.position, newest.position + 1)
        update = latents * step.keep - newest.clean * step.gain
        if self._last_order == 2:
            older = self._past[1]
            ratio = step.ratio(self._log_snr(older.position), self._log_snr(newest.position))
            update = update - (older.clean - newest.clean) * (step.gain * 0.5 / ratio)
        return update

    def _corrected(self, before: Tensor, clean: Tensor) -> Tensor:
        """UniC: the newest step once more, now that the prediction at its end is known."""
        newest = self._past[0]
        step = self._between(newest.position, newest.position + 1)
        update = before * step.keep - newest.clean * step.gain
        if self._last_order == 1:
            return update - (clean - newest.clean) * (step.gain * 0.5)
        older = self._past[1]
        ratio = step.ratio(self._log_snr(older.position), self._log_snr(newest.position))
        weight_older, weight_new = step.corrector_weights(ratio)
        update = update - (older.clean - newest.clean) * (step.gain * weight_older / ratio)
        return update - (clean - newest.clean) * (step.gain * weight_new)

    def _between(self, start: int, end: int) -> "_Interval":
        (signal, noise), (_, noise_before) = self._parts(end), self._parts(start)
        h = self._log_snr(end) - self._log_snr(start)
        return _Interval(noise / noise_before, signal * math.expm1(-h), h)

    def _parts(self, index: int) -> tuple[float, float]:
        """Factors of signal and noise."""
        sigma = float(self.sigmas[index])
        signal = 1 / math.sqrt(sigma**2 + 1)
        return signal, sigma * signal

    def _log_snr(self, index: int) -> float:
        """Lambda of the paper: log of signal over noise; infinite where there is no noise."""
        sigma = float(self.sigmas[index])
        return -math.log(sigma) if sigma else math.inf


class _Interval(NamedTuple):
    """What an exponential integrator needs of the way between two noise levels."""

    keep: float
    """Factor of the latents."""
    gain: float
    """Factor of the predicted clean latents, with the sign of e^-h - 1."""
    h: float
    """Difference of the log-SNR."""

    def ratio(self, older: float, newest: float) -> float:
        """r of the paper: how far back an older step is, in units of h; negative."""
        return (older - newest) / self.h

    def corrector_weights(self, ratio: float) -> tuple[float, float]:
        """The solution of the paper's 2 x 2 system (eq. 7) for nodes at `ratio` and 1."""
        hh = -self.h
        growth = math.expm1(hh)
        first = growth / hh - 1
        second = first / hh - 0.5
        matrix = np.array([[1.0, 1.0], [ratio, 1.0]])
        older, new = np.linalg.solve(matrix, np.array([first / growth, second * 2 / growth]))
        return float(older), float(new)

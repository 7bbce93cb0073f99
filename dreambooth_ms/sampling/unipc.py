"""UniPC (Zhao et al., 2023): a multistep predictor and a corrector that costs no evaluation more.

Order 2 with B(h) = e^h - 1 on the predicted clean latents, as diffusers has it by default. mindone's port needs an
operator that CPUs have not (`StackExt`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Tensor

from dreambooth_ms.sampling.discrete_scheduler import DiscreteScheduler

ORDER = 2


class UniPCMultistepScheduler(DiscreteScheduler):
    """`config` are the keys of diffusers' scheduler of this name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._spacing = config.get("timestep_spacing", "linspace")
        self._index = 0

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps, from noise to picture."""
        table = self.alphas_cumprod
        if self._spacing == "linspace":
            spaced = np.linspace(0, len(table) - 1, num_inference_steps + 1).round()[::-1][:-1].astype(np.int64)
        elif self._spacing == "leading":
            spaced = self.spaced("leading", num_inference_steps + 1)[:-1]
        else:
            spaced = self.spaced("trailing", num_inference_steps)
        self.timesteps = spaced
        self.sigmas = np.append(((1 - table[spaced]) / table[spaced]) ** 0.5, 0.0)
        self._clean: list[Tensor] = []
        """The clean latents that were predicted in the last steps, the newest first."""
        self._before: Tensor | None = None
        """The latents that the last step began with."""
        self._order = 0

    def set_begin_index(self, index: int) -> None:
        """Begin at this timestep, as image to image does."""
        self._index = index

    def step(self, prediction: Tensor, timestep: int, latents: Tensor) -> tuple[Tensor]:
        """The latents at the next timestep."""
        here = self._index
        clean = self.clean_latents(prediction, latents, self.alphas_cumprod[int(timestep)])
        if self._before is not None:
            # The last step once more, now that the prediction at its end is known.
            latents = self._advanced(self._before, here - 1, clean)
        self._clean = [clean, *self._clean][:ORDER]
        # Fewer at the beginning, where there is no past, and at the end, where there is no noise.
        self._order = min(ORDER, len(self.timesteps) - here, len(self._clean))
        self._before = latents
        self._index += 1
        return (self._advanced(latents, here),)

    def _advanced(self, latents: Tensor, start: int, following: Tensor | None = None) -> Tensor:
        """From one timestep to the next: UniP, eq. 9 of the paper for data prediction.

        Args:
            latents: at the beginning.
            start: index of the timestep.
            following: the clean latents that are predicted at the end, with which it is UniC.
        """
        (signal, noise), (_, noise_before) = self._parts(start + 1), self._parts(start)
        h = self._log_snr(start + 1) - self._log_snr(start)
        gain = signal * math.expm1(-h)
        newest, weight_older, weight_following = self._clean[0], 0.5, 0.5
        update = latents * (noise / noise_before) - newest * gain
        if self._order == 2:
            ratio = (self._log_snr(start - 1) - self._log_snr(start)) / h
            if following is not None:
                weight_older, weight_following = _corrector_weights(-h, ratio)
            update = update - (self._clean[1] - newest) * (gain * weight_older / ratio)
        if following is not None:
            update = update - (following - newest) * (gain * weight_following)
        return update

    def _parts(self, index: int) -> tuple[float, float]:
        """Factors of signal and noise."""
        sigma = float(self.sigmas[index])
        signal = 1 / math.sqrt(sigma**2 + 1)
        return signal, sigma * signal

    def _log_snr(self, index: int) -> float:
        """Lambda of the paper: log of signal over noise; infinite where there is no noise."""
        sigma = float(self.sigmas[index])
        return -math.log(sigma) if sigma else math.inf


def _corrector_weights(hh: float, ratio: float) -> tuple[float, float]:
    """The solution of the paper's 2 x 2 system (eq. 7) for nodes at `ratio`, r of the paper, and 1; `hh` is -h."""
    growth = math.expm1(hh)
    first = growth / hh - 1
    second = first / hh - 0.5
    matrix = np.array([[1.0, 1.0], [ratio, 1.0]])
    older, new = np.linalg.solve(matrix, np.array([first / growth, second * 2 / growth]))
    return float(older), float(new)

"""Schedulers of ours: mindone's ports of these need operators that CPUs have not (`NonZeroExt` for DDPM, `StackExt` for
UniPC, `Arange` for EDM's Euler).

The interface is mindone's; `config` are the keys of diffusers' scheduler of the same name.
"""

import math
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, ops

from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, PredictionType
from dreambooth_ms.formats.model_config import Config, read_scheduler_config
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


class OwnScheduler:
    """A scheduler that counts its steps. By default latents have deviation 1 at every timestep."""

    order, init_noise_sigma = 1, 1.0
    timesteps: np.ndarray
    _index = 0

    def set_begin_index(self, index: int) -> None:
        """Begin at this timestep, as image to image does."""
        self._index = index

    def scale_model_input(self, latents: Tensor, timestep: float) -> Tensor:
        """What the network sees: the latents as they are."""
        return latents


class DiscreteScheduler(OwnScheduler):
    """A scheduler on the timesteps of the noise that a model was trained with."""

    default_spacing: str

    def __init__(self, config: Config) -> None:
        spec = read_scheduler_config(config)
        self.alphas_cumprod = NoiseSchedule.from_spec(spec).alphas_cumprod
        self._predicts_velocity = spec.prediction_type is PredictionType.V_PREDICTION
        self._spacing = config.get("timestep_spacing", self.default_spacing)
        self._offset = int(config.get("steps_offset", 0))

    def spaced(self, steps: int) -> np.ndarray:
        """So many timesteps, the largest first, as diffusers' schedulers space them (Lin et al., 2024, table 2)."""
        total = len(self.alphas_cumprod)
        if self._spacing == "trailing":
            return np.round(np.arange(total, 0, -total / steps)).astype(np.int64) - 1
        if self._spacing == "linspace":
            return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
        return (np.arange(steps) * (total // steps))[::-1].astype(np.int64) + self._offset

    def clean_latents(self, prediction: Tensor, latents: Tensor, alpha_cumprod: float) -> Tensor:
        """x_0 of noisy latents by what was predicted of them: the noise, or the velocity (Salimans and Ho, 2022)."""
        signal, noise = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
        if self._predicts_velocity:
            return latents * float(signal) - prediction * float(noise)
        return (latents - prediction * float(noise)) * float(1 / signal)


class DDPMScheduler(DiscreteScheduler):
    """Ancestral sampling (Ho et al., 2020): x_{t-1} ~ N(mu(x_t, x_0), variance), the posterior of the paper's eq. 7."""

    default_spacing = "leading"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps, from noise to picture."""
        self.timesteps = self.spaced(num_inference_steps)
        self._alphas = np.append(self.alphas_cumprod[self.timesteps], 1.0)

    def step(self, prediction: Tensor, timestep: int, latents: Tensor, generator: RowNoise) -> tuple[Tensor]:
        """The latents at the next timestep; `generator` draws the step's noise, which the last one has not."""
        here, there = self._alphas[self._index : self._index + 2]
        self._index += 1
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


class UniPCMultistepScheduler(DiscreteScheduler):
    """A multistep predictor and a corrector that costs no evaluation more (Zhao et al., 2023): order 2 with
    B(h) = e^h - 1 on the predicted clean latents, as diffusers has it by default."""

    default_spacing = "linspace"

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps, from noise to picture; but for "trailing", the last of one more is left out."""
        trailing = self._spacing == "trailing"
        self.timesteps = self.spaced(num_inference_steps) if trailing else self.spaced(num_inference_steps + 1)[:-1]
        alphas = self.alphas_cumprod[self.timesteps]
        self.sigmas = np.append(((1 - alphas) / alphas) ** 0.5, 0.0)
        sigmas = self.sigmas.tolist()
        self._signal = [1 / math.sqrt(sigma**2 + 1) for sigma in sigmas]
        self._noise = [sigma * signal for sigma, signal in zip(sigmas, self._signal, strict=True)]
        self._log_snr = [-math.log(sigma) if sigma else math.inf for sigma in sigmas]
        """Lambda of the paper: log of signal over noise."""
        self._clean: list[Tensor] = []
        """The clean latents that were predicted in the last steps, the newest first."""
        self._before: Tensor | None = None
        """The latents that the last step began with."""
        self._order = 0

    def step(self, prediction: Tensor, timestep: int, latents: Tensor) -> tuple[Tensor]:
        """The latents at the next timestep."""
        here = self._index
        clean = self.clean_latents(prediction, latents, self.alphas_cumprod[int(timestep)])
        if self._before is not None:
            # The last step once more, now that the prediction at its end is known.
            latents = self._advanced(self._before, here - 1, clean)
        self._clean = [clean, *self._clean][:2]
        # Fewer at the beginning, where there is no past, and at the end, where there is no noise.
        self._order = min(len(self.timesteps) - here, len(self._clean))
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
        h = self._log_snr[start + 1] - self._log_snr[start]
        gain = self._signal[start + 1] * math.expm1(-h)
        newest, weight_older, weight_following = self._clean[0], 0.5, 0.5
        update = latents * (self._noise[start + 1] / self._noise[start]) - newest * gain
        if self._order == 2:
            ratio = (self._log_snr[start - 1] - self._log_snr[start]) / h
            if following is not None:
                weight_older, weight_following = _corrector_weights(-h, ratio)
            update = update - (self._clean[1] - newest) * (gain * weight_older / ratio)
        if following is not None:
            update = update - (following - newest) * (gain * weight_following)
        return update


def _corrector_weights(hh: float, ratio: float) -> tuple[float, float]:
    """The solution of the paper's 2 x 2 system (eq. 7) for nodes at `ratio`, r of the paper, and 1; `hh` is -h."""
    growth = math.expm1(hh)
    first = growth / hh - 1
    second = first / hh - 0.5
    matrix = np.array([[1.0, 1.0], [ratio, 1.0]])
    older, new = np.linalg.solve(matrix, np.array([first / growth, second * 2 / growth]))
    return float(older), float(new)


class EDMEulerScheduler(OwnScheduler):
    """Euler steps in EDM's formulation (Karras et al., 2022, algorithm 1 without its second half), for models that were
    trained in it."""

    def __init__(self, config: Config) -> None:
        self._data = float(config.get("sigma_data", 0.5))
        self._range = float(config.get("sigma_max", 80.0)), float(config.get("sigma_min", 0.002))
        self._rho = float(config.get("rho", 7.0))
        self._exponential = config.get("sigma_schedule", "karras") == "exponential"
        self._velocity = config.get("prediction_type", "epsilon") == "v_prediction"
        self.init_noise_sigma = (self._range[0] ** 2 + 1) ** 0.5

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

    def scale_model_input(self, latents: Tensor, timestep: float) -> Tensor:
        """c_in of the paper's table 1."""
        return latents * (float(self.sigmas[self._index]) ** 2 + self._data**2) ** -0.5

    def step(self, prediction: Tensor, timestep: float, latents: Tensor) -> tuple[Tensor]:
        """The latents at the next noise level, by c_skip and c_out of the paper's table 1."""
        sigma, following = self.sigmas[self._index : self._index + 2].tolist()
        self._index += 1
        total = sigma**2 + self._data**2
        out = sigma * self._data / total**0.5
        clean = latents * float(self._data**2 / total) + prediction * float(-out if self._velocity else out)
        return (latents + (latents - clean) * float((following - sigma) / sigma),)

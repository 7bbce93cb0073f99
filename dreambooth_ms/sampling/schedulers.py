"""The schedulers by the names people use; the way of a batch through the timesteps of one; and what predicts at each.

Shapes: B rows, C, h, w of the latents.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from dreambooth_ms.config.choices import SamplingScheduler
from dreambooth_ms.diffusion import NoiseSchedule, NoiseScheduleSpec
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.model_config import Config, is_edm, read_scheduler_config
from dreambooth_ms.models.specs import read_table
from dreambooth_ms.ops import equal_parts, mean
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.runtime.compiled_cell import CompiledCell
from dreambooth_ms.sampling.request import SampleRequest

PURPOSE = "noise of a sampling step"
LEAST_SIGNAL = 2.0**-24
"""What alpha-bar is at least where a scheduler divides by it, as in diffusers: float16's smallest number."""


@dataclass(frozen=True)
class SchedulerKind:
    """What is behind a name."""

    scheduler: str
    """A class of mindone, or the one of ours in its place."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the name says, whatever the model's own configuration does."""
    draws_noise: bool = False
    """Whether its steps take random numbers."""
    takes_eta: bool = False
    """Whether they take as many as the request says."""
    keeps_signal: bool = False
    """Whether noisy latents are the clean ones plus noise (Karras et al., 2022), in place of a mixture of deviation 1
    (Ho et al., 2020)."""
    least: float = LEAST_SIGNAL
    """The smallest alpha-bar that it can begin at."""
    edm: bool = False
    """Whether it is for models that were trained in EDM's formulation."""

    def create(self, config: Config) -> Any:
        """The scheduler for a model, by its configuration; its noise is the one that training follows. Dynamic
        thresholds (Saharia et al., 2022, section 2.3) and learned variances are mindone's: measured 8e-6 from
        diffusers' in any of 12 steps, each row by itself. Where diffusers' class has no thresholds, there are none."""
        from mindone.diffusers import schedulers

        from dreambooth_ms.sampling import own_schedulers

        kind = getattr(own_schedulers, self.scheduler, None) or getattr(schedulers, self.scheduler)
        # Its `from_config` does the same, and to warn of settings that no scheduler has it imports them all and scipy.
        # What a configuration left at its default does not hold for another scheduler.
        known = inspect.signature(kind.__init__).parameters.keys() - set(config.get("_use_default_values", ()))
        own = {name: value for name, value in config.items() if name in known}
        if not self.edm:
            spec = read_scheduler_config(config)
            assert isinstance(spec, NoiseScheduleSpec), "check_scheduler comes first"
            own |= vars(spec)
            if own.pop("rescale_betas_zero_snr"):
                own["trained_betas"] = NoiseSchedule.from_spec(spec).betas(self.least).tolist()
        scheduler = kind(**own | self.options)
        # Not every class has an argument for these, but all that make sigmas look for them.
        scheduler.register_to_config(**{name: config[name] for name in ("sigma_min", "sigma_max") if name in config})
        return scheduler


SCHEDULERS = {name: SchedulerKind(**row) for name, row in read_table(Path(__file__).with_suffix(".yaml")).items()}
"""By their names."""


def check_scheduler(name: SamplingScheduler, config: Config, steps: int, predicts_variance: bool = False) -> None:
    """Raise ConfigError if a scheduler cannot take so many steps with a model, which may predict the variance too.
    Models that were trained in EDM's formulation are sampled with by EDM's schedulers, and only these."""
    if SCHEDULERS[name].edm != is_edm(config):
        wrong = "is for models trained in EDM's formulation, and this one is not; use euler or dpm++_2m_karras"
        if is_edm(config):
            wrong = "this model was trained in EDM's formulation; use edm_dpm++_2m or edm_euler"
        raise ConfigError(f"--scheduler {name}: {wrong}")
    try:
        scheduler = SCHEDULERS[name].create(config)
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(
            f"--scheduler {name} with {steps} steps: does not follow this model's scheduler configuration "
            f"({' '.join(str(error).split())}); choose another --scheduler or --num_inference_steps"
        ) from error
    if _reads_variance(scheduler) and not predicts_variance:
        raise ConfigError(
            f"--scheduler {name}: variance_type learned_range, and this model predicts no variance; write fixed_small "
            "in its scheduler_config.json"
        )


def _reads_variance(scheduler: Any) -> bool:
    return bool(scheduler.config.get("variance_type") == "learned_range")


def fitting_scheduler(name: SamplingScheduler, config: Config) -> SamplingScheduler:
    """The scheduler of this name, or what does the same with a model that was trained in EDM's formulation."""
    of_edm: dict[SamplingScheduler, SamplingScheduler] = {"ddim": "edm_euler", "dpm++_2m": "edm_dpm++_2m"}
    return of_edm[name] if is_edm(config) else name


@dataclass(frozen=True)
class RowNoise:
    """The random numbers of one step: each row's are a function of the seed, the step and the row's number, whatever
    batch it is in. Schedulers take it for numpy's generator."""

    seed: int
    step: int
    rows: Sequence[int]

    def standard_normal(self, size: Sequence[int]) -> np.ndarray:
        """(B, ...) float32 draws from N(0, 1)."""
        return np.stack([standard_normal(tuple(size)[1:], self.seed, PURPOSE, self.step, row) for row in self.rows])


class Trajectory:
    """The timesteps of a batch and what becomes of its latents in them. `request` says the scheduler, its steps, which
    of them are taken, and the seed of the noise that they draw, which depends on `numbers`, the pictures' own, too;
    `config` is `scheduler_config.json` of the model; `from_picture`, whether the latents begin as those of other
    pictures, in place of noise."""

    def __init__(
        self, request: SampleRequest, config: Config, numbers: Sequence[int], from_picture: bool = False
    ) -> None:
        self._kind = SCHEDULERS[request.scheduler]
        self._scheduler = self._kind.create(config)
        self._scheduler.set_timesteps(request.num_inference_steps)
        self._seed, self._eta, self._numbers = request.seed, request.eta, numbers
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
        """The latents after `timesteps[index]`. A variance behind the prediction (B, 2 C, h, w) is read with
        learned_range (Nichol and Dhariwal, 2021, eq. 15), and otherwise dropped."""
        if prediction_BChw.shape[1] == 2 * latents_BChw.shape[1] and not _reads_variance(self._scheduler):
            prediction_BChw, _ = equal_parts(prediction_BChw, 2, 1)
        timestep = self.timesteps[index]
        # Where nothing of the picture is left, a whole 1 may be rounded to more than all noise, and give NaN.
        more: dict[str, Any] = {"eta": min(self._eta, 1 - 2.0**-22)} if self._kind.takes_eta else {}
        if self._kind.draws_noise or more:
            more["generator"] = RowNoise(self._seed, self._first + index, self._numbers)
        return self._scheduler.step(prediction_BChw, timestep, latents_BChw, **more)[0]


def taken_steps(
    levels: np.ndarray, request: SampleRequest, order: int, num_train_timesteps: int, from_picture: bool
) -> tuple[int, int]:
    """First and end of the steps that are taken, as diffusers' pipelines choose them, of all of a scheduler's `levels`,
    from noise to picture. A step has `order` evaluations; shares of the noise's range are of `num_train_timesteps`."""
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


class Denoiser(CompiledCell):
    """negative + guidance * (positive - negative) (Ho and Salimans, 2022, eq. 6, with w = guidance - 1).

    Latents (B, C, H, W), timesteps (B,), guidance (2,), conditioning -> (B, C, H, W). Latents of an inpainting model
    have mask and masked picture behind them (B, 2 C + 1, H, W). Where it is guided, the rows of the conditioning are
    2 B: the negative ones, then the positive ones. `guidance` is its scale and, where it is rescaled, how much: a share
    of the result is brought back to the deviation of the positive prediction (Lin et al., 2024, eq. 15 and 16). With
    `variance`, the second half of the channels (B, 2 C, H, W) is the variance, and the positive one's stays as it is.
    """

    title = "the denoising step"

    def __init__(self, unet: nn.Cell, guided: bool, rescaled: bool = False, variance: bool = False) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.guided, self.rescaled, self.variance = guided, rescaled, variance

    def construct(self, latents: Tensor, timesteps_B: Tensor, guidance: Tensor, *conditioning: Tensor) -> Tensor:
        if not self.guided:
            return self.unet(latents, timesteps_B, *conditioning)
        prediction = self.unet(ops.concat((latents, latents)), ops.concat((timesteps_B, timesteps_B)), *conditioning)
        negative, positive = equal_parts(prediction, 2, 0)
        if not self.variance:
            return self.mixed(negative, positive, guidance)
        positive, variance = equal_parts(positive, 2, 1)
        return ops.concat((self.mixed(equal_parts(negative, 2, 1)[0], positive, guidance), variance), 1)

    def mixed(self, negative: Tensor, positive: Tensor, guidance: Tensor) -> Tensor:
        """The two predictions (B, C, H, W) as one."""
        scale, share = equal_parts(guidance, 2, 0)
        guided = negative + (positive - negative) * ops.broadcast_to(scale, negative.shape)
        if not self.rescaled:
            return guided
        factor = ops.broadcast_to(_deviation(positive) / _deviation(guided), guided.shape)
        share = ops.broadcast_to(share, guided.shape)
        return guided * factor * share + guided * (1.0 - share)


def _deviation(x_BCHW: Tensor) -> Tensor:
    """Standard deviation of each row (B, 1, 1, 1), up to a factor that is the same for all of one shape."""
    centred = x_BCHW - ops.broadcast_to(mean(x_BCHW, (1, 2, 3), True), x_BCHW.shape)
    return ops.sqrt(mean(centred * centred, (1, 2, 3), True))

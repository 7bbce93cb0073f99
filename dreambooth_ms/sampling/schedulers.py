"""The schedulers by the names people use: mindone's ports of diffusers' schedulers, and ours where those run on Ascend
alone."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from dreambooth_ms.config.choices import SamplingScheduler
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.model_config import Config, is_edm, read_scheduler_config

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
    keeps_signal: bool = False
    """Whether noisy latents are the clean ones plus noise (Karras et al., 2022), in place of a mixture of deviation 1
    (Ho et al., 2020)."""
    least: float = LEAST_SIGNAL
    """The smallest alpha-bar that it can begin at."""
    edm: bool = False
    """Whether it is for models that were trained in EDM's formulation."""

    def create(self, config: Config) -> Any:
        """The scheduler for a model, by its configuration; its noise is the one that training follows."""
        from mindone.diffusers import schedulers

        from dreambooth_ms.sampling import own_schedulers

        kind = getattr(own_schedulers, self.scheduler, None) or getattr(schedulers, self.scheduler)
        # Its `from_config` does the same, and to warn of settings that no scheduler has it imports them all and scipy.
        # What a configuration left at its default does not hold for another scheduler.
        known = inspect.signature(kind.__init__).parameters.keys() - set(config.get("_use_default_values", ()))
        own = {name: value for name, value in config.items() if name in known}
        if not self.edm:
            spec = read_scheduler_config(config)
            own |= vars(spec)
            if own.pop("rescale_betas_zero_snr"):
                own["trained_betas"] = NoiseSchedule.from_spec(spec).betas(self.least).tolist()
        scheduler = kind(**own | self.options)
        # Not every class has an argument for these, but all that make sigmas look for them.
        scheduler.register_to_config(**{name: config[name] for name in ("sigma_min", "sigma_max") if name in config})
        return scheduler


_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_SECOND_ORDER = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}
# Without lower_order_final they say that they set it themselves.
_TO_THE_END = {"lower_order_final": True}

SCHEDULERS: dict[SamplingScheduler, SchedulerKind] = {
    "ddim": SchedulerKind("DDIMScheduler", least=0),
    "ddpm": SchedulerKind("DDPMScheduler", draws_noise=True, least=0),
    "pndm": SchedulerKind("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": SchedulerKind("LMSDiscreteScheduler", keeps_signal=True),
    "euler": SchedulerKind("EulerDiscreteScheduler", keeps_signal=True),
    "euler_a": SchedulerKind("EulerAncestralDiscreteScheduler", draws_noise=True, keeps_signal=True),
    "heun": SchedulerKind("HeunDiscreteScheduler", keeps_signal=True),
    "dpm++_2m": SchedulerKind(_MULTISTEP, _SECOND_ORDER),
    "dpm++_2m_karras": SchedulerKind(_MULTISTEP, _SECOND_ORDER | _KARRAS),
    "dpm++_2s": SchedulerKind(_SINGLESTEP, _SECOND_ORDER | _TO_THE_END),
    "dpm++_sde": SchedulerKind(_SINGLESTEP, {"algorithm_type": "sde-dpmsolver++"} | _TO_THE_END, draws_noise=True),
    "unipc": SchedulerKind("UniPCMultistepScheduler"),
    "deis": SchedulerKind("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "lcm": SchedulerKind("LCMScheduler", draws_noise=True, least=0),
    "edm_euler": SchedulerKind("EDMEulerScheduler", keeps_signal=True, edm=True),
    "edm_dpm++_2m": SchedulerKind(
        "EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, keeps_signal=True, edm=True
    ),
}


def check_scheduler(name: SamplingScheduler, config: Config, steps: int) -> None:
    """Stop if a scheduler cannot take so many steps with a model.

    Models that were trained in EDM's formulation are sampled with by EDM's schedulers, and only these.

    Raises:
        ConfigError: this scheduler is not for this model.
    """
    if SCHEDULERS[name].edm and not is_edm(config):
        raise ConfigError(
            f"--scheduler {name}: is for models trained in EDM's formulation, and this one is not; use euler or "
            "dpm++_2m_karras"
        )
    if is_edm(config) and not SCHEDULERS[name].edm:
        raise ConfigError(
            f"--scheduler {name}: this model was trained in EDM's formulation; use edm_dpm++_2m or edm_euler"
        )
    try:
        SCHEDULERS[name].create(config).set_timesteps(steps)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(
            f"--scheduler {name} with {steps} steps: does not follow this model's scheduler configuration "
            f"({' '.join(str(error).split())}); choose another --scheduler or --num_inference_steps"
        ) from error

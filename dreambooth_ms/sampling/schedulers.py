"""The schedulers by the names people use: mindone's ports of diffusers' schedulers, and ours where those run on Ascend
alone."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from dreambooth_ms.config.choices import SamplingScheduler
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.model_config import Config, is_edm
from dreambooth_ms.sampling.own_schedulers import DDPMScheduler, EDMEulerScheduler, UniPCMultistepScheduler


@dataclass(frozen=True)
class SchedulerKind:
    """What is behind a name."""

    scheduler: str | type
    """One of mindone, or ours."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the name adds to the model's own configuration, of one of mindone."""
    draws_noise: bool = False
    """Whether its steps take random numbers."""
    keeps_signal: bool = False
    """Whether noisy latents are the clean ones plus noise (Karras et al., 2022), in place of a mixture of deviation 1
    (Ho et al., 2020)."""
    edm: bool = False
    """Whether it is for models that were trained in EDM's formulation."""

    def create(self, config: Config) -> Any:
        """The scheduler for a model, by its configuration."""
        if not isinstance(self.scheduler, str):
            return self.scheduler(config)
        from mindone.diffusers import schedulers

        kind = getattr(schedulers, self.scheduler)
        # Its `from_config` does the same, and to warn of settings that no scheduler has it imports them all and scipy.
        # What a configuration left at its default does not hold for another scheduler.
        known = inspect.signature(kind.__init__).parameters.keys() - set(config.get("_use_default_values", ()))
        return kind(**{name: value for name, value in config.items() if name in known} | self.options)


_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}

SCHEDULERS: dict[SamplingScheduler, SchedulerKind] = {
    "ddim": SchedulerKind("DDIMScheduler"),
    "ddpm": SchedulerKind(DDPMScheduler, draws_noise=True),
    "pndm": SchedulerKind("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": SchedulerKind("LMSDiscreteScheduler", keeps_signal=True),
    "euler": SchedulerKind("EulerDiscreteScheduler", keeps_signal=True),
    "euler_a": SchedulerKind("EulerAncestralDiscreteScheduler", draws_noise=True, keeps_signal=True),
    "heun": SchedulerKind("HeunDiscreteScheduler", keeps_signal=True),
    "dpm++_2m": SchedulerKind(_MULTISTEP),
    "dpm++_2m_karras": SchedulerKind(_MULTISTEP, {"use_karras_sigmas": True}),
    # Without lower_order_final they say that they set it themselves.
    "dpm++_2s": SchedulerKind(_SINGLESTEP, {"lower_order_final": True}),
    "dpm++_sde": SchedulerKind(_SINGLESTEP, _SDE, draws_noise=True),
    "unipc": SchedulerKind(UniPCMultistepScheduler),
    "deis": SchedulerKind("DEISMultistepScheduler"),
    "lcm": SchedulerKind("LCMScheduler", draws_noise=True),
    "edm_euler": SchedulerKind(EDMEulerScheduler, keeps_signal=True, edm=True),
    "edm_dpm++_2m": SchedulerKind("EDMDPMSolverMultistepScheduler", keeps_signal=True, edm=True),
}


def check_formulation(name: SamplingScheduler, config: Config) -> None:
    """A model that was trained in EDM's formulation is sampled with by EDM's schedulers, and only such a model.

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

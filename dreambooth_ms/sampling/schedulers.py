"""The schedulers by the names people use: mindone's ports of diffusers' schedulers, and ours where those run on Ascend
alone."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dreambooth_ms.config.choices import SamplingScheduler
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.model_config import is_edm
from dreambooth_ms.sampling.ddpm import DDPMScheduler
from dreambooth_ms.sampling.edm_euler import EDMEulerScheduler
from dreambooth_ms.sampling.unipc import UniPCMultistepScheduler

Config = Mapping[str, Any]
"""The content of a `scheduler_config.json`."""


class SchedulerKind(NamedTuple):
    """What is behind a name."""

    create: Callable[[Config], Any]
    draws_noise: bool = False
    """Whether its steps take random numbers."""
    keeps_signal: bool = False
    """Whether noisy latents are the clean ones plus noise (Karras et al., 2022), in place of a mixture of deviation 1
    (Ho et al., 2020)."""
    edm: bool = False
    """Whether it is for models that were trained in EDM's formulation."""


LEFT_AT_DEFAULT = "_use_default_values"
"""Names the settings of a configuration that were not chosen, and so do not hold for another scheduler."""


def _ported(module: str, name: str, **options: Any) -> Callable[[Config], Any]:
    """A scheduler of mindone, with what its name here adds to the model's own configuration."""

    def create(config: Config) -> Any:
        kind = getattr(importlib.import_module(f"mindone.diffusers.schedulers.{module}"), name)
        # Its `from_config` does the same, and to warn of settings that no scheduler has it imports them all and scipy.
        known = inspect.signature(kind.__init__).parameters.keys() - set(config.get(LEFT_AT_DEFAULT, ()))
        return kind(**{setting: value for setting, value in config.items() if setting in known} | options)

    return create


_MULTISTEP = "scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"
_SINGLESTEP = "scheduling_dpmsolver_singlestep", "DPMSolverSinglestepScheduler"

SCHEDULERS: dict[SamplingScheduler, SchedulerKind] = {
    "ddim": SchedulerKind(_ported("scheduling_ddim", "DDIMScheduler")),
    "ddpm": SchedulerKind(DDPMScheduler, draws_noise=True),
    "pndm": SchedulerKind(_ported("scheduling_pndm", "PNDMScheduler", skip_prk_steps=True)),
    "lms": SchedulerKind(_ported("scheduling_lms_discrete", "LMSDiscreteScheduler"), keeps_signal=True),
    "euler": SchedulerKind(_ported("scheduling_euler_discrete", "EulerDiscreteScheduler"), keeps_signal=True),
    "euler_a": SchedulerKind(
        _ported("scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler"),
        draws_noise=True,
        keeps_signal=True,
    ),
    "heun": SchedulerKind(_ported("scheduling_heun_discrete", "HeunDiscreteScheduler"), keeps_signal=True),
    "dpm++_2m": SchedulerKind(_ported(*_MULTISTEP)),
    "dpm++_2m_karras": SchedulerKind(_ported(*_MULTISTEP, use_karras_sigmas=True)),
    # Without lower_order_final they say that they set it themselves.
    "dpm++_2s": SchedulerKind(_ported(*_SINGLESTEP, lower_order_final=True)),
    "dpm++_sde": SchedulerKind(
        _ported(*_SINGLESTEP, algorithm_type="sde-dpmsolver++", lower_order_final=True), draws_noise=True
    ),
    "unipc": SchedulerKind(UniPCMultistepScheduler),
    "deis": SchedulerKind(_ported("scheduling_deis_multistep", "DEISMultistepScheduler")),
    "lcm": SchedulerKind(_ported("scheduling_lcm", "LCMScheduler"), draws_noise=True),
    "edm_euler": SchedulerKind(EDMEulerScheduler, keeps_signal=True, edm=True),
    "edm_dpm++_2m": SchedulerKind(
        _ported("scheduling_edm_dpmsolver_multistep", "EDMDPMSolverMultistepScheduler"), keeps_signal=True, edm=True
    ),
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


def create_scheduler(name: SamplingScheduler, config: Config, num_inference_steps: int) -> Any:
    """A scheduler with its timesteps set, from the `scheduler_config.json` of a model.

    Raises:
        ConfigError: see `check_formulation`.
    """
    check_formulation(name, config)
    scheduler = SCHEDULERS[name].create(config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler

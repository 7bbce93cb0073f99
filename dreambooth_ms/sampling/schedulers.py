"""The schedulers by the names people use. They are mindone's ports of diffusers' schedulers."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dreambooth_ms.config.schema import SamplingScheduler


class SchedulerClass(NamedTuple):
    """Where a scheduler is, and what its name adds to the model's own configuration."""

    module: str
    name: str
    options: dict[str, Any]


SCHEDULERS: dict[SamplingScheduler, SchedulerClass] = {
    "ddim": SchedulerClass("scheduling_ddim", "DDIMScheduler", {}),
    "euler": SchedulerClass("scheduling_euler_discrete", "EulerDiscreteScheduler", {}),
    "dpm++_2m": SchedulerClass("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": SchedulerClass(
        "scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}
    ),
    "pndm": SchedulerClass("scheduling_pndm", "PNDMScheduler", {"skip_prk_steps": True}),
}


def create_scheduler(name: SamplingScheduler, config: Mapping[str, Any], num_inference_steps: int) -> Any:
    """A scheduler with its timesteps set, from the `scheduler_config.json` of a model."""
    chosen = SCHEDULERS[name]
    module = importlib.import_module(f"mindone.diffusers.schedulers.{chosen.module}")
    scheduler = getattr(module, chosen.name).from_config(dict(config), **chosen.options)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler

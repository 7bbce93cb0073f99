"""Two models one after the other: SDXL's base, and its refiner (Podell et al., 2023, section 2.5)."""

from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter

import numpy as np

from dreambooth_ms.errors import ConfigError
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.request import OnStep, Refinement, Sample, SampleRequest, Stopped
from dreambooth_ms.sampling.schedulers import check_scheduler

_MEANING = attrgetter("latent_channels", "downsampling", "scaling_factor", "latents_mean", "latents_std")
"""Of an autoencoder: what decides what latents mean."""


def sample_refined(
    base: SamplingModel,
    refiner: SamplingModel,
    request: SampleRequest,
    refinement: Refinement,
    on_step: OnStep | None = None,
    stopped: Stopped | None = None,
    release: bool = True,
) -> Iterator[Sample]:
    """The pictures of a request, sampled by the base and refined.

    Args:
        base: samples from noise, or from the picture of the request.
        refiner: goes on from its latents, with the same prompts.
        request: what to sample.
        refinement: where the one stops and the other starts.
        on_step: called after every step, of either model.
        stopped: asked before every step; see `Stopped`.
        release: give back the memory of the base's networks before the refiner's are loaded.

    Raises:
        ConfigError: the two have different latents, or one has another noise than the scheduler's.
    """
    if _MEANING(base.bundle.codec.spec) != _MEANING(refiner.bundle.codec.spec):
        raise ConfigError(
            f"--refiner {refiner.bundle.path}: its latents are not those of {base.bundle.path}; give the refiner of "
            "the same family"
        )
    check_scheduler(request.scheduler, refiner.bundle.schedule.config, request.num_inference_steps)
    end = refinement.denoising_end
    begun = base.latents(replace(request, denoising_end=end), base.rows(request), "base", on_step, stopped)
    start = [latents for _, latents in begun]
    if release:
        base.release()
    if len(start) < len(request.pictures):
        return
    height, width = base.size(request)
    own = replace(
        request,
        image=None,
        strength=refinement.strength,
        denoising_start=end,
        height=height,
        width=width,
        lora_scales=None,
        # Other noise than the one that the base has just taken away.
        purpose=f"{request.purpose}, refined",
    )
    rows = replace(refiner.rows(own), start=np.stack(start))
    refiner.load()
    more = {"refiner": str(refiner.bundle.path), "denoising_end": end}
    more |= {"refiner_strength": refinement.strength} if end is None else {}
    for number, latents in refiner.latents(own, rows, "refiner", on_step, stopped):
        picture = refiner.picture(latents, number, request.whole_up_to)
        yield Sample(number, picture, base.picture_settings(request, number) | more)

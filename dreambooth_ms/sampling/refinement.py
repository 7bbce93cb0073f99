"""Two models one after the other: SDXL's base, and its refiner (Podell et al., 2023, section 2.5)."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from dreambooth_ms.errors import ConfigError
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.sampling.model import SamplingModel, repeated
from dreambooth_ms.sampling.schedulers import check_formulation
from dreambooth_ms.sampling.settings import Drawn, DrawRequest, OnStep, Refinement, Stopped


def draw_refined(
    base: SamplingModel,
    refiner: SamplingModel,
    request: DrawRequest,
    refinement: Refinement,
    on_step: OnStep | None = None,
    stopped: Stopped | None = None,
    release: bool = True,
) -> Iterator[Drawn]:
    """The pictures of a request, drawn by the base and refined.

    Args:
        base: draws from noise, or from the picture of the request.
        refiner: goes on from its latents, with the same prompts.
        request: what to draw.
        refinement: where the one stops and the other starts.
        on_step: called after every step, of either model.
        stopped: asked before every step; see `Stopped`.
        release: give back the memory of the base's networks before the refiner's are loaded.

    Raises:
        ConfigError: the two have different latents, or one has another noise than the scheduler's.
    """
    _check_latents(base, refiner)
    check_formulation(request.scheduler, refiner.folder.scheduler_config)
    rows = base.rows(request)
    end = refinement.denoising_end
    drawn = [latents for _, latents in base.latents(request, rows, "base", None, end, on_step, stopped)]
    settings = [base.picture_settings(request, prompt, n) for n, prompt in enumerate(repeated(request))]
    height, width = base.size(request)
    if release:
        base.release()
    if len(drawn) < len(settings):
        return
    own = replace(
        request,
        image=None,
        strength=refinement.strength,
        height=height,
        width=width,
        lora_scales=None,
        # Other noise than the one that the base has just taken away.
        purpose=f"{request.purpose}, refined",
        sizes=replace(
            request.sizes,
            aesthetic_score=refinement.aesthetic_score,
            negative_aesthetic_score=refinement.negative_aesthetic_score,
        ),
    )
    refined = refiner.latents(
        own, replace(refiner.rows(own), start=np.stack(drawn)), "refiner", end, None, on_step, stopped
    )
    more = {"refiner": str(refiner.folder.path), "denoising_end": end}
    if end is None:
        more["refiner_strength"] = refinement.strength
    for number, latents in refined:
        yield refiner.drawn(own, number, latents)._replace(settings={**settings[number], **more})


def _check_latents(base: SamplingModel, refiner: SamplingModel) -> None:
    """Both must mean the same by the same latents."""
    ours, theirs = base.folder.vae_spec, refiner.folder.vae_spec
    if _meaning(ours) != _meaning(theirs):
        raise ConfigError(
            f"--refiner {refiner.folder.path}: its latents are not those of {base.folder.path}; give the refiner of "
            "the same family"
        )


def _meaning(vae: VaeSpec) -> tuple[object, ...]:
    return vae.latent_channels, vae.downsampling, vae.scaling_factor, vae.latents_mean, vae.latents_std

"""What to draw and how: plain values, which the command line, the page and other programs fill in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreambooth_ms.config.choices import SamplingScheduler
from dreambooth_ms.data.conditioning import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn."""

    scheduler: SamplingScheduler
    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    guidance_rescale: float = 0.0
    """How much of the guided prediction is brought back to the deviation of the unguided one (Lin et al., 2024)."""
    strength: float | None = None
    """Share of the steps that a picture goes through which starts from another one; None: all."""
    denoising_start: float | None = None
    """Share of the noise's range, from all noise, that another model has gone through before."""
    denoising_end: float | None = None
    """Share of it after which another model goes on; None: to the end."""


@dataclass(frozen=True, kw_only=True)
class PictureSizes:
    """What SDXL is told of the pictures; sizes are (width, height), None for that of the picture drawn."""

    original_size: tuple[int, int] | None = None
    crop_top: int = 0
    crop_left: int = 0
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = AESTHETIC_SCORE
    """Of 10; only SDXL's refiner takes it."""
    negative_aesthetic_score: float = NEGATIVE_AESTHETIC_SCORE


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """Pictures to draw with a `SamplingModel`. Only their size, the batch size and whether they are guided or rescaled
    decide what is compiled; everything else can change from request to request at no cost."""

    prompts: tuple[str, ...]
    """One or more; each is drawn `num_images_per_prompt` times."""
    negative_prompt: str = ""
    num_images_per_prompt: int = 1
    height: int | None = None
    """In pixels; None: that of the picture it starts from, or the model's own."""
    width: int | None = None
    seed: int = 0
    purpose: str = "sample"
    """Pictures of different purposes start from different noise."""
    batch_size: int = 4
    scheduler: SamplingScheduler = "ddim"
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    image: Image.Image | None = None
    """Picture to start from (image to image); None: from noise."""
    strength: float = 0.75
    """How far from `image` to go: 0 keeps it, 1 keeps nothing of it."""
    lora_scales: tuple[float, ...] | None = None
    """Strength of each adapter of the model, in their order; None: all 1."""
    clip_skip: int = 0
    """Layers left out at the end of the text encoders."""
    support_long_prompts: bool = False
    """Read prompts beyond 77 tokens in pieces, in place of cutting them."""
    sizes: PictureSizes = field(default_factory=PictureSizes)
    whole_up_to: int | None = None
    """Side in pixels of the largest square that is decoded at once; None: see `autoencoder.WHOLE_UP_TO`."""


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How a second model, SDXL's refiner, goes on from the first one's pictures."""

    denoising_end: float | None = 0.8
    """Share of the noise's range that the base goes through, before the refiner goes through the rest. None: the base
    finishes its pictures, and the refiner starts from them by `strength`."""
    strength: float = 0.3
    aesthetic_score: float = AESTHETIC_SCORE
    negative_aesthetic_score: float = NEGATIVE_AESTHETIC_SCORE


class StepReport(NamedTuple):
    """A step that was taken."""

    step: int
    """Its number, from 1."""
    steps: int
    """Steps of each batch; with some schedulers more than were asked for."""
    rows: range
    """The pictures that are being drawn, by their numbers from 0."""
    total: int
    """Pictures of the request."""
    stage: str
    """"base", or "refiner"."""
    latents: np.ndarray
    """(B, C, h, w) after the step."""


class Drawn(NamedTuple):
    """A picture."""

    number: int
    """Among those of the request, from 0."""
    prompt: str
    picture: np.ndarray
    """(H, W, 3) uint8."""
    settings: Mapping[str, Any]
    """What makes it again, for its file's metadata: plain values."""


OnStep = Callable[[StepReport], object]
"""Called after every step."""

Stopped = Callable[[], bool]
"""Asked before every step; once it says True nothing more is drawn, and what is finished has been given."""

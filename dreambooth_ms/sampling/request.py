"""Which pictures to sample and how: plain values, which the command line, the page and other programs fill in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreambooth_ms.config.sample import SizesConfig
from dreambooth_ms.config.shared import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class SampleRequest(GenerationConfig):
    """Pictures to sample with a `SamplingModel`. Only their size, the batch size and whether they are guided or
    rescaled decide what is compiled; everything else can change from request to request at no cost."""

    prompts: tuple[str, ...]
    """One or more; there are `num_images_per_prompt` pictures of each."""
    negative_prompt: str = ""
    num_images_per_prompt: int = 1
    numbers: tuple[int, ...] | None = None
    """The pictures' numbers, on which their noise depends; None: from 0."""
    height: int | None = None
    """In pixels; None: that of the picture it starts from, or the model's own."""
    width: int | None = None
    fills_batch: bool = False
    """Whether fewer pictures than `batch_size` are computed with as many rows, since these decide how it is rounded."""
    purpose: str = "sample"
    """Pictures of different purposes start from different noise."""
    guidance_rescale: float = 0.0
    """How much of the guided prediction is brought back to the deviation of the unguided one (Lin et al., 2024)."""
    image: Image.Image | None = None
    """Picture to start from (image to image); None: from noise."""
    mask: Image.Image | None = None
    """Of `image` and as large, for a base that inpaints: what is white is drawn anew. None: all is."""
    strength: float = 0.75
    """How far from `image` to go, as a share of the steps: 0 keeps it, 1 keeps nothing of it."""
    small: np.ndarray | None = None
    """Pictures (N, 3, h, w) from -1 to 1, in the order of `pictures`, that a second stage enlarges; None: `image`."""
    noise_level: int = 250
    """Timestep of the noise that a second stage sees on them."""
    denoising_start: float | None = None
    """Share of the noise's range, from all noise, that another model has gone through before."""
    denoising_end: float | None = None
    """Share of it after which another model goes on; None: to the end."""
    lora_scales: tuple[float, ...] | None = None
    """Strength of each adapter of the model, in their order; None: all 1."""
    clip_skip: int = 0
    """Layers left out at the end of the text encoders."""
    support_long_prompts: bool = False
    """Read prompts beyond 77 tokens in pieces, in place of cutting them."""
    sizes: SizesConfig = field(default_factory=SizesConfig)
    whole_up_to: int | None = None
    """Side in pixels of the largest square that is decoded at once; None: see `autoencoder.WHOLE_UP_TO`."""

    @classmethod
    def of(cls, config: object, **more: Any) -> "SampleRequest":
        """A request with what a configuration has under the names of a request's fields, and with `more`."""
        shared = {one.name: getattr(config, one.name) for one in fields(cls) if hasattr(config, one.name)}
        return cls(**shared | more)

    @property
    def pictures(self) -> dict[int, str]:
        """The prompt of each picture, by its number."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.num_images_per_prompt)]
        return dict(zip(self.numbers or range(len(prompts)), prompts, strict=True))


class StepReport(NamedTuple):
    """A step that was taken."""

    step: int
    """Its number, from 1."""
    steps: int
    """Steps of each batch; with some schedulers more than were asked for."""
    rows: range
    """The pictures in work, by their place in the request, from 0."""
    total: int
    """Pictures of the request."""
    stage: str
    """"base", "refiner", or "second stage"."""
    latents: np.ndarray
    """(B, C, h, w) after the step."""


class Sample(NamedTuple):
    """A picture."""

    number: int
    """Its own among those of the request."""
    picture: np.ndarray
    """(H, W, 3) uint8."""
    settings: Mapping[str, Any]
    """What makes it again, for its file's metadata: plain values."""


STEP_SETTINGS = ("scheduler", "num_inference_steps", "guidance_scale", "guidance_rescale", "eta", "batch_size", "seed")
"""Fields of a request that say how its latents are denoised."""


def settings_of_training(sample: Sample) -> dict[str, Any]:
    """What says how a training sampled a picture: always from noise and all the way."""
    of_way = ("clip_skip", "strength", "denoising_start", "denoising_end", "purpose", "height", "width")
    names = (*STEP_SETTINGS, *of_way, "prompt", "negative_prompt", "number")
    return {name: sample.settings.get(name) for name in names}


OnStep = Callable[[StepReport], object]
"""Called after every step."""

Stopped = Callable[[], bool]
"""Asked before every step; once it says True nothing more is sampled, and what is finished has been given."""

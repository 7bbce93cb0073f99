"""What the page's process and the sampling process say to each other."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from dreambooth_ms.config.choices import SamplingScheduler

Side: TypeAlias = Literal["adapted", "base"]
"""With the adapters, or the same without."""


@dataclass(frozen=True)
class ModelChoice:
    """The networks of a request: what a process loads once."""

    base: str
    loras: tuple[str, ...] = ()
    refiner: str | None = None
    """What goes on from the base's pictures: SDXL's refiner, or a second stage, which enlarges them."""
    changed: frozenset[tuple[str, int]] = frozenset()
    """Each of them with the time of its last change: a LoRA that was trained on is another one."""
    embeddings: tuple[str, ...] = ()
    """Of new words."""

    def serves(self, wanted: "ModelChoice") -> bool:
        """Whether a process that loaded this can sample that: adapters that are not wanted get a scale of 0."""
        same = self.base == wanted.base and self.refiner == wanted.refiner
        same &= set(self.embeddings) == set(wanted.embeddings)
        return same and set(self.loras) >= set(wanted.loras) and self.changed >= wanted.changed


@dataclass(frozen=True)
class PictureRequest:
    """Pictures to sample. All but `model` are inputs of networks that are loaded and compiled."""

    model: ModelChoice
    prompt: str
    negative_prompt: str = ""
    lora_scales: tuple[float, ...] = ()
    """One for each adapter."""
    scheduler: SamplingScheduler = "ddim"
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0
    width: int = 512
    height: int = 512
    count: int = 1
    compare: bool = False
    """Sample each picture without the adapters too."""
    image: np.ndarray | None = None
    """(height, width, 3) uint8 to start from; None: from noise."""
    mask: np.ndarray | None = None
    """(height, width, 3) uint8, white where a model that inpaints draws `image` anew."""
    strength: float = 0.6
    """How much of the way from the picture to noise and back is gone; not used without `image`."""
    refiner_start: float = 0.8
    """The share of the way after which the refiner takes over; not used without a refiner."""

    @property
    def sides(self) -> tuple[Side, ...]:
        """What is sampled of each picture, in this order."""
        return ("adapted", "base") if self.compare and self.model.loras else ("adapted",)


@dataclass(frozen=True)
class Start:
    """To the sampling process: sample this."""

    job: int
    request: PictureRequest


@dataclass(frozen=True)
class Cancel:
    """To the sampling process: end this one after the step it is in."""

    job: int


@dataclass(frozen=True)
class Phase:
    """What is being done, in words for the page."""

    job: int
    text: str


@dataclass(frozen=True)
class Step:
    """One denoising step was taken."""

    job: int
    number: int
    """Of the picture."""
    side: Side
    stage: str
    """"base", "refiner", or "second stage"."""
    step: int
    """Steps done of this picture in this stage, this one included."""
    steps: int
    share: float
    """0 to 1, of the whole request."""
    preview: np.ndarray | None = field(default=None, repr=False)
    """The picture as it is forming, (H, W, 3) uint8; not in every step."""


@dataclass(frozen=True)
class Picture:
    """A picture is finished."""

    job: int
    number: int
    side: Side
    pixels: np.ndarray = field(repr=False)
    """(H, W, 3) uint8."""
    settings: dict[str, Any]
    """What makes it again, under the names of `dreambooth-ms sample`."""


@dataclass(frozen=True)
class Finished:
    """The request is over."""

    job: int
    outcome: Literal["done", "cancelled", "failed"]
    sentence: str = ""
    """Why it failed."""

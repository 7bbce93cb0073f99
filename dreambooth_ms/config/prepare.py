"""The settings of `prepare`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dreambooth_ms.config.ranges import NOT_EMPTY, PATH, SIDE, at_least
from dreambooth_ms.config.rules import only_with
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import Background


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """From pictures to those that a training reads, cropped in the middle."""

    source: Annotated[str, NOT_EMPTY, PATH]
    """Folder with pictures; captions and metadata beside them are kept."""
    target: Annotated[str, NOT_EMPTY, PATH]
    """Folder to make. Nothing is overwritten."""
    resolution: Annotated[int, SIDE] = 512
    """Side of the squares, in pixels."""
    use_aspect_ratio_bucket: bool = False
    """Sizes of several aspect ratios with about the area of resolution x resolution, each picture at the one that cuts
    off least of it."""
    max_buckets: Annotated[int | None, at_least(1), only_with("use_aspect_ratio_bucket")] = None
    """At most so many sizes. None: all that some picture needs."""
    transparent_background: Background = "white"
    """What pictures are put on where they are transparent: white, black, grey or #rrggbb."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Schema):
    """Crop pictures to the sizes of a training."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "target")

    preparation: PreparationConfig

"""The settings of `prepare`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dreambooth_ms.config.ranges import NOT_EMPTY, PATH, SIDE, at_least
from dreambooth_ms.config.rules import only_with
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import Background


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """What is made of a folder of pictures. All is as `train` reads it, cropped in the middle."""

    source: Annotated[str, NOT_EMPTY, PATH]
    """Folder with pictures, and captions or metadata beside them."""
    target: Annotated[str, NOT_EMPTY, PATH]
    """Folder to make. Nothing is overwritten."""
    resolution: Annotated[int, SIDE] = 512
    """Side of the squares, in pixels."""
    use_aspect_ratio_bucket: bool = False
    """Write sizes of several aspect ratios with about the area of resolution x resolution, each picture in the one that
    cuts off least of it."""
    max_buckets: Annotated[int | None, at_least(1), only_with("use_aspect_ratio_bucket")] = None
    """At most so many sizes: those at which all pictures together lose least. None: all that some picture needs."""
    transparent_background: Background = "white"
    """What pictures are put on where they are transparent: white, black, grey or #rrggbb."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Schema):
    """Make pictures of the sizes of a training, each once."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "target")

    preparation: PreparationConfig

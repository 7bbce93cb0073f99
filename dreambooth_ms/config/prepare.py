"""The settings of `prepare`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dreambooth_ms.config.ranges import NOT_EMPTY, PATH
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import SizesConfig


@dataclass(frozen=True, kw_only=True)
class PreparationConfig(SizesConfig):
    """From pictures to those that a training reads, cropped in the middle."""

    source: Annotated[str, NOT_EMPTY, PATH]
    """Folder with pictures; captions and metadata beside them are kept."""
    target: Annotated[str, NOT_EMPTY, PATH]
    """Folder to make. Nothing is overwritten."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Schema):
    """Crop pictures to the sizes of a training."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "target")

    preparation: PreparationConfig

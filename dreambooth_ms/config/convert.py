"""What `convert` can be told."""

from dataclasses import dataclass
from typing import ClassVar

from dreambooth_ms.config.choices import WeightFormat
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import SourceConfig, TargetConfig


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(TargetConfig, SourceConfig):
    """From any format to any other; which ones is told from the files and the target's name."""

    format: WeightFormat | None = None
    """Format to write, where the target's name leaves it open. None: told by the name."""
    use_ema: bool = False
    """Take the moving averages that a single file may hold, in place of the weights."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Schema):
    """Write a model or a LoRA in another format."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "target")

    conversion: ConversionConfig

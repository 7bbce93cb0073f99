"""The settings of `convert`."""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import SourceConfig, TargetConfig

_Format: TypeAlias = Literal[
    "diffusers", "stability", "mindone", "kohya", "kohya_diffusers", "peft", "diffusers_peft", "diffusers_processors"
]


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(TargetConfig, SourceConfig):
    """From any format to any other; the files and the target's name say which."""

    format: _Format | None = None
    """Format to write, where the target's name leaves it open. None: the name decides."""
    use_ema: bool = False
    """Take the moving averages that a single file may hold, in place of the weights."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Schema):
    """Write a model or a LoRA in another format."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "target")

    conversion: ConversionConfig

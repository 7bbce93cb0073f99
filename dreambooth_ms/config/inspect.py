"""The settings of `inspect`."""

from dataclasses import dataclass
from typing import ClassVar

from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import SourceConfig


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Schema):
    """Say what a file or folder is."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source",)

    inspection: SourceConfig

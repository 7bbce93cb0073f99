"""What `inspect` can be told."""

from dataclasses import dataclass
from typing import ClassVar

from dreambooth_ms.config.ranges import Findings, out_of_range


@dataclass(frozen=True, kw_only=True)
class InspectionConfig:
    """What is in a file or folder."""

    source: str
    """Model or LoRA: a file or a folder, in any format that is read."""
    base: str | None = None
    """For a LoRA: the model it is for, where that has other sizes than the published ones."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Tell what a file or folder is."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source",)
    """Fields that may be given without their flags, in this order."""

    inspection: InspectionConfig

    def check(self) -> Findings:
        """Ranges. Reads no file."""
        return Findings(out_of_range(self), [])

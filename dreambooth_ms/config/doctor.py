"""The settings of `doctor`."""

from dataclasses import dataclass, field
from typing import Annotated

from dreambooth_ms.config.ranges import NOT_EMPTY, PATH
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import DeviceConfig


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is written."""

    report: Annotated[str | None, NOT_EMPTY, PATH] = None
    """File to write everything into that helps others to help: the lines, versions of all packages, and what MindSpore,
    CANN and launchers read of the environment. A new file. None: nothing is written."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Schema):
    """Check that the installation works on this machine."""

    device: DeviceConfig = field(default_factory=DeviceConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def problems(self) -> list[str]:
        """Refuses half precision."""
        allowed = self.device.mixed_precision in (None, "no")
        return [] if allowed else ["--mixed_precision: the doctor compares figures in float32; leave it out"]

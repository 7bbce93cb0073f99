"""The settings of `doctor`."""

from dataclasses import dataclass, field

from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import DeviceConfig


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Schema):
    """Check that the installation works on this machine."""

    device: DeviceConfig = field(default_factory=DeviceConfig)

    def problems(self) -> list[str]:
        """Refuses half precision."""
        allowed = self.device.mixed_precision in (None, "no")
        return [] if allowed else ["--mixed_precision: the doctor compares figures in float32; leave it out"]

"""What `doctor` can be told."""

from dataclasses import dataclass, field

from dreambooth_ms.config.ranges import Findings, out_of_range
from dreambooth_ms.config.shared import DeviceConfig


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check that the installation works on this machine."""

    device: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> Findings:
        """Ranges and exclusions. Reads no file."""
        problems = out_of_range(self)
        if self.device.mixed_precision not in (None, "no"):
            problems.append("--mixed_precision: the doctor compares figures in float32; leave it out")
        return Findings(problems, [])

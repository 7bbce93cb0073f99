"""The settings of `check`: those of `train`, and how to report."""

from dataclasses import dataclass, field

from dreambooth_ms.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report."""

    json: bool = False
    """Print it as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(TrainConfig):
    """Look at the pictures and the command of a training before it starts."""

    report: ReportConfig = field(default_factory=ReportConfig)

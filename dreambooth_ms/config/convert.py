"""What `convert` can be told."""

from dataclasses import dataclass
from typing import ClassVar

from dreambooth_ms.config.choices import PredictionType, WeightFormat, WeightType
from dreambooth_ms.config.ranges import Findings, out_of_range


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """From any format to any other; which they are is told from the files and the target's name."""

    source: str
    """Model or LoRA: a file or a folder, in any format that is read."""
    target: str
    """What to write. A name that ends in .safetensors is a single file, in .ckpt a MindSpore checkpoint, without an
    extension a folder."""
    format: WeightFormat | None = None
    """Format to write, where the target's name leaves it open. None: told by the name."""
    dtype: WeightType | None = None
    """Type of the numbers to write. None: as they are."""
    base: str | None = None
    """For a LoRA: the model it is for, where that has other sizes than the published ones."""
    alpha: float | None = None
    """For a LoRA whose file does not hold its alpha, as those of mindone. None: its rank, a scale of 1."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""
    prediction_type: PredictionType | None = None
    """What the model predicts, for a source that does not tell. None: SD 2.x velocity, others noise."""
    use_ema: bool = False
    """Take the moving averages that a single file may hold, in place of the weights."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write a model or a LoRA in another format."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "target")
    """Fields that may be given without their flags, in this order."""

    conversion: ConversionConfig

    def check(self) -> Findings:
        """Ranges. Reads no file."""
        return Findings(out_of_range(self), [])

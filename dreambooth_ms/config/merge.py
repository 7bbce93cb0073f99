"""What `merge` can be told."""

from dataclasses import dataclass

from dreambooth_ms.config.choices import ModelFormat, PredictionType, WeightType
from dreambooth_ms.config.ranges import Findings, out_of_range


@dataclass(frozen=True, kw_only=True)
class MergingConfig:
    """One or several LoRAs become part of a model's weights."""

    base: str
    """The model: a file or a folder, in any format that is read."""
    lora: list[str]
    """LoRA files or folders of any format and rank; several are added up."""
    target: str
    """What to write. A name that ends in .safetensors is a single file, in .ckpt a MindSpore checkpoint, without an
    extension a folder."""
    scale: float = 1.0
    """Strength of the LoRAs: 1 is as trained; -1 takes out again what was merged at 1."""
    alpha: float | None = None
    """For LoRAs whose file does not hold their alpha, as those of mindone. None: their rank, a scale of 1."""
    format: ModelFormat | None = None
    """Format to write. None: told by the target's name."""
    dtype: WeightType | None = None
    """Type of the numbers to write. None: as they are in the model."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""
    prediction_type: PredictionType | None = None
    """What the model predicts, for one that does not tell. None: SD 2.x velocity, others noise."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge LoRAs into a model."""

    merging: MergingConfig

    def check(self) -> Findings:
        """Ranges. Reads no file."""
        problems = out_of_range(self)
        if not self.merging.lora:
            problems.append("--lora: missing; name the LoRA to merge")
        return Findings(problems, [])

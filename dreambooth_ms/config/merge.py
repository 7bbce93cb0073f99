"""The settings of `merge`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dreambooth_ms.config.ranges import FINITE, NOT_EMPTY, PATH
from dreambooth_ms.config.rules import Rule
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import TargetConfig


@dataclass(frozen=True, kw_only=True)
class MergingConfig(TargetConfig):
    """One or several LoRAs become part of a model's weights."""

    base: Annotated[str, NOT_EMPTY, PATH]
    """The model: a file or a folder, in any format that is read, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None: its main branch."""
    lora: Annotated[list[str], PATH, Rule(lambda values: not values["lora"], "--lora: missing; name the LoRA to merge")]
    """LoRA files or folders of any format and rank, or owner/name or owner/name/file on the Hugging Face hub; several
    are added up."""
    scale: Annotated[float, FINITE] = 1.0
    """Strength of the LoRAs: 1 is as trained; -1 takes out again what was merged at 1."""
    format: Literal["diffusers", "stability", "mindone"] | None = None
    """Format to write. None: the target's name decides."""
    variant: str | None = None
    """Variant of the weight files in a model folder, such as fp16. None: the plain files, or the only variant."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Schema):
    """Merge LoRAs into a model."""

    merging: MergingConfig

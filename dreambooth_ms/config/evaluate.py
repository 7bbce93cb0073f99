"""The settings of `evaluate`."""

from dataclasses import dataclass, field
from typing import Annotated

from dreambooth_ms.config.ranges import NOT_EMPTY, PATH, at_least
from dreambooth_ms.config.schema import Schema
from dreambooth_ms.config.shared import Background, DeviceConfig, GenerationConfig, WeightsConfig


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(GenerationConfig):
    """What base and adapted model are compared on."""

    instance_data_dir: Annotated[str, NOT_EMPTY, PATH]
    """Folder with photographs of the subject."""
    transparent_background: Background = "white"
    """What they are put on where they are transparent: white, black, grey or #rrggbb."""
    prompt: Annotated[str, NOT_EMPTY]
    """What the pictures of the subject show: a prompt, or the path of a text file with one prompt per line."""
    class_prompt: Annotated[str, NOT_EMPTY]
    """Prompt of the class, to see what the training did to it."""
    clip: Annotated[str | None, NOT_EMPTY, PATH] = None
    """CLIP model that measures: a folder in transformers' layout, or a name on the Hugging Face hub, such as
    openai/clip-vit-base-patch32. None: the base model's own clip folder."""
    num_images_per_prompt: Annotated[int, at_least(1)] = 1
    """Pictures per prompt; the class prompt gets as many as all others."""
    output_dir: Annotated[str, NOT_EMPTY, PATH] = "evaluation"
    """Folder for before_after.png and metrics.json."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Schema):
    """Compare a base model with its adapted self: same prompts, same noise."""

    weights: WeightsConfig
    comparison: ComparisonConfig
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def problems(self) -> list[str]:
        """Refuses a comparison of the base with itself."""
        return [] if self.weights.lora else ["--lora: missing; name the adapter to compare the base with"]

"""What `evaluate` can be told."""

from dataclasses import dataclass, field

from dreambooth_ms.config.choices import SamplingScheduler
from dreambooth_ms.config.ranges import Findings, out_of_range
from dreambooth_ms.config.shared import DeviceConfig, WeightsConfig, _scales_that_fit


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What base and adapted model are compared on."""

    instance_data_dir: str
    """Folder with photographs of the subject."""
    prompt: str
    """What to draw of the subject: a prompt, or the path of a text file with one prompt per line."""
    class_prompt: str
    """Prompt of the class, to see what the training did to it."""
    clip: str | None = None
    """Folder of the CLIP model that measures, in transformers' layout. None: the base model's own clip folder."""
    num_images_per_prompt: int = 1
    """Pictures per prompt; as many are drawn of the class prompt."""
    batch_size: int = 4
    """Pictures drawn at a time."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance: how closely to follow the prompt; 1 turns it off."""
    scheduler: SamplingScheduler = "ddim"
    """Sampling method."""
    seed: int = 0
    """The same seed draws the same pictures."""
    output_dir: str = "evaluation"
    """Folder for before_after.png and metrics.json."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare a base model with its adapted self: same prompts, same noise."""

    weights: WeightsConfig
    comparison: ComparisonConfig
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> Findings:
        """Ranges. Reads no file."""
        problems = out_of_range(self)
        if not self.weights.lora:
            problems.append("--lora: missing; name the adapter to compare the base with")
        broken, message = _scales_that_fit(self.weights)
        if broken:
            problems.append(message)
        return Findings(problems, [])

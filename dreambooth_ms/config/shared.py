"""Sections that several commands have."""

from dataclasses import dataclass, field

from dreambooth_ms.config.choices import DeviceTarget, MixedPrecision


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where it runs."""

    device_target: DeviceTarget = "auto"
    """Device. auto: an Ascend if there is one, otherwise the CPU."""
    mixed_precision: MixedPrecision | None = None
    """What networks compute in: fp16, bf16 (on Ascend), or no for float32. What is trained, norms, softmax, loss and
    optimiser are float32 in any case, and so is the autoencoder. None: no."""
    ms_mode: int = 0
    """MindSpore mode: 0 compiles graphs, 1 is PyNative, slower and easier to debug."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The base model and the adapters on it."""

    pretrained_model_name_or_path: str
    """Base model: a local folder or file, or a name on the Hugging Face hub."""
    pretrained_vae_model_name_or_path: str | None = None
    """Autoencoder to use in place of the base's own: a folder, or a name on the hub."""
    lora: list[str] = field(default_factory=list)
    """Adapter files or folders; several are added up."""
    lora_scale: list[float] = field(default_factory=lambda: [1.0])
    """Strength of the adapters, one for all or one for each: 0 is the base model, 1 is as trained."""


def _scales_that_fit(weights: WeightsConfig) -> tuple[bool, str]:
    """Whether there are neither one scale nor as many as adapters, and what to say of it."""
    given, adapters = len(weights.lora_scale), len(weights.lora)
    return (
        bool(adapters) and given not in (1, adapters),
        f"--lora_scale: expected one number, or one for each of {adapters} in --lora, got {given}",
    )

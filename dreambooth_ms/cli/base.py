"""The base model of a command, opened on the device that it asks for."""

from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.shared import BaseModelConfig, DeviceConfig
from dreambooth_ms.runtime.device import compute_dtype, set_up_device
from dreambooth_ms.weights.bundle import ModelBundle, open_bundle
from dreambooth_ms.weights.hub import find_model, find_vae


def open_base(device: DeviceConfig, base: BaseModelConfig) -> ModelBundle:
    """Set up the device and open the base model."""
    set_up_device(device.device_target, device.ms_mode)
    compute_dtype(device.mixed_precision)  # What the device cannot compute in ends here.
    vae = find_vae(base.pretrained_vae_model_name_or_path) if base.pretrained_vae_model_name_or_path else None
    path = find_model(base.pretrained_model_name_or_path, base.revision, base.variant)
    bundle = open_bundle(path, base.variant, vae)
    for note in bundle.notes:
        tell(f"{bundle.path}: {note}")
    return bundle

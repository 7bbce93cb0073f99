"""The base model of a command."""

from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.shared import BaseModelConfig
from dreambooth_ms.weights.bundle import ModelBundle, open_bundle
from dreambooth_ms.weights.hub import find_model, find_vae


def open_base(base: BaseModelConfig) -> ModelBundle:
    """Open the base model, on the device that was set up before."""
    vae = find_vae(base.pretrained_vae_model_name_or_path) if base.pretrained_vae_model_name_or_path else None
    path = find_model(base.pretrained_model_name_or_path, base.revision, base.variant)
    bundle = open_bundle(path, base.variant, vae)
    for note in bundle.notes:
        tell(f"{bundle.path}: {note}")
    return bundle

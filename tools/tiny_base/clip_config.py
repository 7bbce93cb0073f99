"""The config.json of a whole CLIP, which only those who train one write."""

from typing import Any

from dreambooth_ms.formats.model_config import write_text_config
from dreambooth_ms.models.specs import ClipSpec


def write_clip_config(spec: ClipSpec) -> dict[str, Any]:
    """The inverse of `formats.model_config.read_clip_config`."""
    vision = {
        "model_type": "clip_vision_model",
        **vars(spec.vision.transformer),
        "image_size": spec.vision.image_size,
        "patch_size": spec.vision.patch_size,
        "projection_dim": spec.projection_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": spec.projection_dim,
        "text_config": write_text_config(spec.text, spec.projection_dim),
        "vision_config": vision,
    }

"""Pictures as PNG files that appear whole, with the settings they were made with in their metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_ms.weights.atomic import atomic_path

SETTINGS_KEY = "dreambooth_ms"


def write_picture(path: Path, picture: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Write (H, W, 3) uint8 as PNG; `settings` go into its text chunk as JSON."""
    information = PngInfo()
    information.add_text(SETTINGS_KEY, json.dumps(settings, sort_keys=True, ensure_ascii=False))
    with atomic_path(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG", pnginfo=information)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a picture was made with; empty if it holds none."""
    with Image.open(path) as image:
        return json.loads(getattr(image, "text", {}).get(SETTINGS_KEY, "{}"))

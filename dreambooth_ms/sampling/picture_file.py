"""Pictures as PNG files that appear whole, with the settings they were made with in their metadata."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_ms.atomic import atomic_path

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


def first_free_number(folder: Path) -> int:
    """One more than the highest number of a picture in the folder, so that nothing is written over."""
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()]
    return max(numbers, default=-1) + 1


def grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures (H, W, 3) of one size side by side, row by row; what is left of the last row is white."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    cells = np.full((rows, columns, height, width, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        cells[divmod(number, columns)] = picture
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)

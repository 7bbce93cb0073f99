"""What a session has sampled: pictures as PNG files with their settings in them."""

import base64
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.engine import Job
from demo.messages import PictureRequest, Side
from dreambooth_ms.sampling.picture_file import write_picture

MOST = 60
"""Pictures that a session keeps; the oldest go first."""


@dataclass(frozen=True)
class Entry:
    """A picture, and what it is without the adapters if that was asked for."""

    name: str
    request: PictureRequest
    settings: dict[str, Any]
    """What made it."""
    files: dict[Side, bytes]
    """PNG."""

    @property
    def settings_file(self) -> bytes:
        """The settings as a JSON file."""
        return json.dumps(self.settings, indent=2, ensure_ascii=False).encode()

    def thumbnail(self) -> Image.Image:
        """The picture, or the pair beside each other."""
        pictures = [Image.open(io.BytesIO(file)) for file in self.files.values()]
        both = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
        for number, picture in enumerate(pictures):
            both.paste(picture, (number * picture.width, 0))
        return both


def entries_of(job: Job) -> list[Entry]:
    """The pictures of a request, also of one that was cancelled."""
    sampled = {(picture.number, picture.side): picture for picture in job.pictures}
    entries = []
    for number in range(job.request.count):
        own = [sampled[number, side] for side in job.request.sides if (number, side) in sampled]
        if own:
            files = {picture.side: png_file(picture.pixels, picture.settings) for picture in own}
            entries.append(Entry(f"{job.number:03d}-{number}", job.request, own[0].settings, files))
    return entries


def added(gallery: list[Entry], new: list[Entry]) -> list[Entry]:
    """The gallery with new pictures before the others."""
    return [*reversed(new), *gallery][:MOST]


def address_of(pixels: np.ndarray) -> str:
    """A picture as an address that holds it: it is there however late the browser asks, and the next one has come."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def png_file(pixels: np.ndarray, settings: dict[str, Any]) -> bytes:
    """A picture file as `dreambooth-ms sample` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        write_picture(path, pixels, settings)
        return path.read_bytes()

"""What a session has drawn: pictures as PNG files with their settings in them."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.engine import Job
from demo.messages import Drawing, Side
from dreambooth_ms.sampling.picture_file import write_picture

MOST = 60
"""Pictures that a session keeps; the oldest go first."""


@dataclass(frozen=True)
class Entry:
    """A picture, and what it is without the adapters if that was asked for."""

    name: str
    drawing: Drawing
    number: int
    """Of the pictures of its drawing."""
    files: dict[Side, bytes]
    """PNG."""

    @property
    def settings(self) -> dict[str, Any]:
        """What made it."""
        return self.drawing.settings(self.number, "adapted")

    @property
    def settings_file(self) -> bytes:
        """The same as a JSON file."""
        return json.dumps(self.settings, indent=2, ensure_ascii=False).encode()


def entries_of(job: Job) -> list[Entry]:
    """The pictures of a drawing that are whole, also if it was cancelled: pairs only as pairs."""
    sides = job.drawing.sides
    held = {(picture.number, picture.side): picture.pixels for picture in job.pictures}
    numbers = sorted({number for number, _ in held if all((number, side) in held for side in sides)})
    return [
        Entry(
            name=f"{job.number:03d}-{number}",
            drawing=job.drawing,
            number=number,
            files={side: png_file(held[number, side], job.drawing.settings(number, side)) for side in sides},
        )
        for number in numbers
    ]


def added(gallery: list[Entry], new: list[Entry]) -> list[Entry]:
    """The gallery with new pictures before the others."""
    return [*reversed(new), *gallery][:MOST]


def png_file(pixels: np.ndarray, settings: dict[str, Any]) -> bytes:
    """A picture file as `dreambooth-ms sample` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        write_picture(path, pixels, settings)
        return path.read_bytes()

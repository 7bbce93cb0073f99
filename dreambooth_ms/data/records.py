"""From folders to records: one per picture, with everything a row needs to know about it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dreambooth_ms.data.pictures import digest, find_pictures, open_picture, skipped_line

INSTANCE, CLASS = "instance", "class"


@dataclass(frozen=True)
class Record:
    """A picture and its prompt."""

    path: Path
    digest: str
    """SHA-256 of the file: what caches are keyed by."""
    size: tuple[int, int]
    """(width, height), upright, in pixels."""
    prompt: str
    group: str
    """INSTANCE or CLASS."""


def read_records(
    folder: Path, prompt: str, group: str, tell: Callable[[str], object], at_most: int | None = None
) -> tuple[Record, ...]:
    """The pictures of a folder under one prompt, in natural order. Every one is opened once, so that a damaged file
    is found before the training starts; what is no picture is told once.

    Raises:
        DataError: no usable folder, or a damaged picture.
    """
    found = find_pictures(folder)
    if found.skipped:
        tell(skipped_line(found.skipped))
    return tuple(
        Record(path, digest(path), open_picture(path).size, prompt, group) for path in found.pictures[:at_most]
    )

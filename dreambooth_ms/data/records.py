"""From folders to records: one per picture, with everything a row needs to know about it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dreambooth_ms.data.pictures import MIN_SIDE, digest, find_pictures, open_picture, skipped_line
from dreambooth_ms.errors import DataError

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
        DataError: no usable folder, or damaged pictures, one line each.
    """
    found = find_pictures(folder)
    if found.skipped:
        tell(skipped_line(found.skipped))
    records, problems = [], []
    for path in found.pictures[:at_most]:
        try:
            records.append(Record(path, digest(path), _size(path), prompt, group))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return tuple(records)


def _size(path: Path) -> tuple[int, int]:
    width, height = open_picture(path).size
    if min(width, height) < MIN_SIDE:
        raise DataError(f"{path}: {width}x{height} pixels are too few to learn from; use a larger picture or remove it")
    return width, height

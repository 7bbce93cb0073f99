"""The class pictures of prior preservation: those that are missing are sampled with the base model."""

from pathlib import Path

from dreambooth_ms.data.pictures import looks_like_a_picture
from dreambooth_ms.errors import DataError

PURPOSE = "class picture"
"""Of the requests for them, on which their noise depends."""


def missing_numbers(folder: Path, wanted: int) -> list[int]:
    """Numbers of the pictures still to sample, so that the folder will hold `wanted` of them.

    Only picture files count, the user's own as well as sampled ones. A sampled picture's number is in its name, so a
    run that was stopped goes on with the numbers it had not come to.

    Raises:
        DataError: the path is taken by a file.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--class_data_dir {folder}: expected a folder, got a file")
    held = {p.name for p in folder.glob("*") if looks_like_a_picture(p)}
    free = (number for number in range(wanted + len(held)) if picture_name(number) not in held)
    return [next(free) for _ in range(max(wanted - len(held), 0))]


def picture_name(number: int) -> str:
    """File name of a sampled class picture."""
    return f"class-{number:05d}.png"

"""The class pictures of prior preservation: those that are missing are drawn with the base model."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import looks_like_a_picture
from dreambooth_ms.errors import DataError
from dreambooth_ms.sampling.picture_file import write_picture
from dreambooth_ms.sampling.pipeline import Sampler, starting_noise

PURPOSE = "class picture"


def missing_numbers(folder: Path, wanted: int) -> list[int]:
    """Numbers of the pictures still to draw, so that the folder will hold `wanted` of them.

    Only picture files count, the user's own as well as drawn ones. A drawn picture's number is in its name, so a run
    that was stopped goes on with the numbers it had not come to.

    Raises:
        DataError: the path is taken by a file.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--class_data_dir {folder}: expected a folder, got a file")
    held = {p.name for p in folder.glob("*") if looks_like_a_picture(p)}
    free = (number for number in range(wanted + len(held)) if picture_name(number) not in held)
    return [next(free) for _ in range(max(wanted - len(held), 0))]


def picture_name(number: int) -> str:
    """File name of a drawn class picture."""
    return f"class-{number:05d}.png"


def draw_class_images(
    sampler: Sampler,
    folder: Path,
    numbers: list[int],
    prompt: str,
    text: PromptText,
    negative: PromptText,
    latent_shape: tuple[int, int, int],
    seed: int,
    progress: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]],
) -> None:
    """Draw the pictures of these numbers into the folder; each is a function of the seed and its number.

    Args:
        sampler: draws with the base model.
        folder: where the files go; made if needed.
        numbers: which ones, from `missing_numbers`.
        prompt: the class prompt, for the files' metadata.
        text: the same, encoded.
        negative: the empty prompt, encoded.
        latent_shape: (C, h, w).
        seed: the run's seed.
        progress: wraps the iterator of pictures.
    """
    noise = np.concatenate([starting_noise(1, latent_shape, seed, PURPOSE, number) for number in numbers])
    texts = [text] * len(numbers)
    settings: dict[str, Any] = {"prompt": prompt, "seed": seed, **vars(sampler.settings)}
    for number, picture in zip(numbers, progress(sampler.pictures(noise, texts, negative)), strict=True):
        write_picture(folder / picture_name(number), picture, {**settings, "number": number})

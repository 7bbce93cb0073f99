"""Pictures as PNG files that appear whole: sampled ones, with the settings they were made with in their metadata and
their numbers in their names; and sheets of several."""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dreambooth_ms.atomic import atomic_path, write_bytes
from dreambooth_ms.data.pictures import looks_like_a_picture
from dreambooth_ms.errors import DataError
from dreambooth_ms.sampling.picture_text import PARAMETERS_KEY, SETTINGS_KEY, parameters_of

MARGIN, GAP, LABEL_WIDTH, LINE, CELL = 24, 10, 200, 18, 160
STRIP, MOST_COLUMNS = "over_time.png", 12
"""The file that shows each prompt through the run, and how many validations it shows."""
INK, PALE = (40, 40, 40), (120, 120, 120)


def write_picture(path: Path, picture: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Write a PNG file, see `png_of`."""
    write_bytes(path, png_of(picture, settings))


def png_of(picture: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    """(H, W, 3) uint8 as PNG; `settings` are in its text chunk as JSON, and in another one as A1111 has it."""
    information, content = PngInfo(), BytesIO()
    information.add_text(SETTINGS_KEY, json.dumps(settings, sort_keys=True, ensure_ascii=False))
    if "prompt" in settings:
        information.add_text(PARAMETERS_KEY, parameters_of(settings))
    Image.fromarray(picture).save(content, format="PNG", pnginfo=information)
    return content.getvalue()


def first_free_number(folder: Path) -> int:
    """One more than the highest number of a picture in the folder, so that nothing is written over."""
    return max((int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()), default=-1) + 1


def missing_numbers(folder: Path, wanted: int) -> list[int]:
    """Numbers of the class pictures still to sample, so that the folder will hold `wanted`, the user's own included.
    Raises DataError if the path is taken by a file."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--class_data_dir {folder}: expected a folder, got a file")
    held = {p.name for p in folder.glob("*") if looks_like_a_picture(p)}
    free = (number for number in range(wanted + len(held)) if class_picture_name(number) not in held)
    return [next(free) for _ in range(max(wanted - len(held), 0))]


def class_picture_name(number: int) -> str:
    """File name of a sampled class picture."""
    return f"class-{number:05d}.png"


def validation_name(step: int, number: int) -> str:
    """File name of a picture that a training samples after a step."""
    return f"step-{step:06d}-{number}.png"


def validation_pictures(folder: Path) -> dict[int, list[Path]]:
    """The files of these names in a folder by their steps, both in the order of their numbers."""
    numbered = [(re.fullmatch(r"step-(\d+)-(\d+)\.png", path.name), path) for path in folder.glob("step-*.png")]
    found: dict[int, list[Path]] = {}
    for step, _, path in sorted((int(name[1]), int(name[2]), path) for name, path in numbered if name):
        found.setdefault(step, []).append(path)
    return found


def read_pictures(paths: Iterable[Path], number: int | None = None) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Sampled pictures (H, W, 3) uint8 with their settings, of one number or all; what is no such file is left out."""
    found = []
    for path in paths:
        with suppress(OSError, ValueError, SyntaxError), Image.open(path) as image:
            settings = json.loads(image.info.get(SETTINGS_KEY, "{}"))
            if "prompt" in settings and number in (None, settings.get("number")):
                found.append((np.asarray(image.convert("RGB")), settings))
    return found


def grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures (H, W, 3) of one size side by side, row by row; what is left of the last row is white."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[: len(pictures)] = pictures
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


@dataclass(frozen=True)
class Row:
    """A row of a sheet."""

    label: str
    pictures: Sequence[np.ndarray | None]
    """None leaves its place empty."""
    captions: Sequence[str] = ()
    """One under each picture; none if empty."""


def write_sheet(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A sheet that shows people what a training did: rows of pictures (H, W, 3) uint8, `CELL` pixels on their longer
    side, with labels at the left and captions below."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    columns = max(len(row.pictures) for row in rows)
    wrapped = [[textwrap.wrap(caption, CELL // 7) for caption in row.captions] for row in rows]
    heights = [CELL + GAP + LINE * max((len(lines) for lines in captions), default=0) for captions in wrapped]
    width = 2 * MARGIN + LABEL_WIDTH + columns * (CELL + GAP)
    sheet = Image.new("RGB", (width, 2 * MARGIN + 36 + sum(heights)), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((MARGIN, MARGIN), title, fill=INK, font=font)
    y = MARGIN + 36
    for row, captions, height in zip(rows, wrapped, heights, strict=True):
        room = textwrap.TextWrapper(LABEL_WIDTH // 9, max_lines=CELL // 20, placeholder=" …")
        label = "\n".join(line for part in row.label.split("\n") for line in room.wrap(part))
        canvas.multiline_text((MARGIN, y + CELL // 2), label, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(row.pictures):
            if picture is None:
                continue
            x = MARGIN + LABEL_WIDTH + column * (CELL + GAP)
            filter_ = Image.Resampling.NEAREST if picture.shape[0] < CELL else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.contain(Image.fromarray(picture), (CELL, CELL), filter_), (x, y))
            if captions:
                canvas.multiline_text((x, y + CELL + 4), "\n".join(captions[column]), fill=PALE, font=small)
        y += height
    with atomic_path(path) as partial:
        sheet.save(partial, format="PNG")


def write_strip(folder: Path, prompts: Sequence[str], step: int) -> None:
    """Draw the first picture of each prompt in a row, a column for each validation up to a step, of many so many evenly
    taken. It is made of the files in the folder, so that a run that was stopped shows all of them."""
    files = validation_pictures(folder)
    steps = [one for one in files if one <= step]
    shown = [steps[at] for at in np.unique(np.linspace(0, len(steps) - 1, MOST_COLUMNS).round().astype(int))]
    columns = [{own["prompt"]: one for one, own in read_pictures(files[step], number=0)} for step in shown]
    captions = [f"step {one}" for one in shown]
    rows = [Row(prompt, [column.get(prompt) for column in columns], captions) for prompt in prompts]
    write_sheet(folder / STRIP, "From step to step, always from the same noise", rows)

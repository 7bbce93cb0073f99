"""A sheet that shows people what a training did: photographs, then base above adapted, picture by picture."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dreambooth_ms.atomic import atomic_path

MARGIN, GAP, LABEL_WIDTH, LINE = 24, 10, 200, 18
INK, PALE = (40, 40, 40), (120, 120, 120)


@dataclass(frozen=True)
class Row:
    """A row of the sheet."""

    label: str
    pictures: Sequence[np.ndarray | None]
    """None leaves its place empty."""
    captions: Sequence[str] = ()
    """One under each picture; none if empty."""


def write_sheet(path: Path, title: str, rows: Sequence[Row], cell: int = 160) -> None:
    """Write rows of pictures (H, W, 3) uint8, `cell` pixels on their longer side, with labels at the left, captions
    below, as PNG."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    columns = max(len(row.pictures) for row in rows)
    wrapped = [[textwrap.wrap(caption, cell // 7) for caption in row.captions] for row in rows]
    heights = [cell + GAP + LINE * max((len(lines) for lines in captions), default=0) for captions in wrapped]
    width = 2 * MARGIN + LABEL_WIDTH + columns * (cell + GAP)
    sheet = Image.new("RGB", (width, 2 * MARGIN + 36 + sum(heights)), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((MARGIN, MARGIN), title, fill=INK, font=font)
    y = MARGIN + 36
    for row, captions, height in zip(rows, wrapped, heights, strict=True):
        room = textwrap.TextWrapper(LABEL_WIDTH // 9, max_lines=cell // 20, placeholder=" …")
        label = "\n".join(line for part in row.label.split("\n") for line in room.wrap(part))
        canvas.multiline_text((MARGIN, y + cell // 2), label, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(row.pictures):
            if picture is None:
                continue
            x = MARGIN + LABEL_WIDTH + column * (cell + GAP)
            filter_ = Image.Resampling.NEAREST if picture.shape[0] < cell else Image.Resampling.LANCZOS
            scale = cell / max(picture.shape[:2])
            size = round(scale * picture.shape[1]), round(scale * picture.shape[0])
            sheet.paste(Image.fromarray(picture).resize(size, filter_), (x, y))
            if captions:
                canvas.multiline_text((x, y + cell + 4), "\n".join(captions[column]), fill=PALE, font=small)
        y += height
    with atomic_path(path) as partial:
        sheet.save(partial, format="PNG")

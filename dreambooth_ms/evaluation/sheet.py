"""A sheet that shows people what a training did: photographs, then base above adapted, picture by picture."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP, LABEL_WIDTH, LINE = 24, 10, 120, 18
INK, PALE = (40, 40, 40), (120, 120, 120)


@dataclass(frozen=True)
class Row:
    """A row of the sheet."""

    label: str
    pictures: Sequence[np.ndarray]
    captions: Sequence[str] = ()
    """One under each picture; none if empty."""


def draw_sheet(title: str, rows: Sequence[Row], cell: int = 160) -> Image.Image:
    """Rows of pictures (H, W, 3) uint8, `cell` pixels on their longer side, with labels at the left, captions below."""
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
        canvas.multiline_text((MARGIN, y + cell // 2), row.label, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(row.pictures):
            x = MARGIN + LABEL_WIDTH + column * (cell + GAP)
            filter_ = Image.Resampling.NEAREST if picture.shape[0] < cell else Image.Resampling.LANCZOS
            scale = cell / max(picture.shape[:2])
            size = round(scale * picture.shape[1]), round(scale * picture.shape[0])
            sheet.paste(Image.fromarray(picture).resize(size, filter_), (x, y))
            if captions:
                canvas.multiline_text((x, y + cell + 4), "\n".join(captions[column]), fill=PALE, font=small)
        y += height
    return sheet

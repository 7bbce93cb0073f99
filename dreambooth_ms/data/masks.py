"""Where in a picture the error counts: a mask, as it lies on the latents of a row's crop."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dreambooth_ms.data.pictures import SUFFIXES, Frame, Size, digest, read_upright, resize_and_crop
from dreambooth_ms.errors import DataError


class Mask(NamedTuple):
    """A picture whose brightness says how much the error counts there; white: wholly, black: not at all."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    is_alpha: bool = False
    """Whether the picture's own opacity is meant."""


def find_mask(picture: Path, folder: Path | None, size: Size) -> Mask:
    """The mask of a picture of this size in a folder, by its name without the suffix; without a folder its opacity.
    Raises DataError if there is none, it has another size, or it is black."""
    beside = [folder / f"{picture.stem}{suffix}" for suffix in SUFFIXES] if folder else [picture]
    path = next((one for one in beside if one.is_file()), None)
    if path is None:
        raise DataError(f"{picture}: no mask in {folder}, expected {picture.stem}.png; make one, or remove the picture")
    mask = Mask(path, digest(path), is_alpha=folder is None)
    image = read_mask(mask)
    if image.size != size:
        (width, height), (across, down) = image.size, size
        raise DataError(f"{path}: {width}x{height} pixels, its picture {across}x{down}; make both the same size")
    if image.getextrema() == (0, 0):
        raise DataError(f"{path}: {'transparent' if mask.is_alpha else 'black'} everywhere, so nothing would count")
    return mask


def read_mask(mask: Mask) -> Image.Image:
    """Its brightness, as "L"; raises DataError if its opacity is meant and it has none."""
    image = read_upright(mask.path)
    if not mask.is_alpha:
        return image.convert("L")
    if not image.has_transparency_data:
        raise DataError(f"{mask.path}: --alpha_mask, but it has no alpha channel; save it as PNG with one")
    return image.convert("RGBA").getchannel("A")


@lru_cache(maxsize=64)
def mask_of_latents(mask: Mask | None, frame: Frame, flip: bool, size: Size, rest: float) -> np.ndarray:
    """How much each latent of a crop counts, (h, w) float32 of mean 1: the share of its area that the mask has, or all
    of it without one, and 0 around what is pasted. `size` is (w, h) of the latents, of which the crop is a multiple;
    `rest`, from 0 to 1, how much counts what the mask has not."""
    width, height = size
    counts = np.ones((height, width), np.float32)
    if mask:
        crop = resize_and_crop(read_mask(mask), frame, "bilinear", flip)
        shares = np.asarray(crop, np.float32) / np.float32(255)
        of_latents = shares.reshape(height, shares.shape[0] // height, width, shares.shape[1] // width).mean((1, 3))
        counts = rest + (1 - rest) * of_latents
    if frame.place:
        counts *= _pasted(frame, flip, size)
    # A crop beside the mask teaches nothing.
    return (counts / counts.mean()).astype(np.float32) if counts.any() else np.zeros_like(counts)


def _pasted(frame: Frame, flip: bool, size: Size) -> np.ndarray:
    """1 for the latents (h, w) of a square that is pasted, 0 around it. Those at its rim, which grey has part in, are
    left out as in diffusers' script, but for squares of less than 4 latents."""
    side, cells = min(frame.resized), np.zeros(size[::-1], np.float32)
    (top, left), pixels = frame.place or (0, 0), frame.size[0] // size[0]
    left = frame.size[0] - side - left if flip else left
    rim = int(side >= 4 * pixels)
    rows, columns = (slice(one // pixels + rim, (one + side) // pixels - rim) for one in (top, left))
    cells[rows, columns] = 1
    return cells

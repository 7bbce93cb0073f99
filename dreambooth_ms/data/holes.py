"""What an inpainting model reads beside noisy latents: where a picture is drawn anew, and latents of the rest of it.
Its network takes 2 C + 1 channels: noisy latents, mask, latents of the masked picture. Holes are drawn as diffusers'
research project `dreambooth_inpaint` draws its masks. Shapes: H, W of a picture, C, h, w of its latents."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dreambooth_ms.data.pictures import Size


class Hole(NamedTuple):
    """A part of a crop that is drawn anew."""

    is_ellipse: bool
    """Otherwise it is a rectangle."""
    box: tuple[int, ...]
    """Its first and last pixels: left, top, right, bottom. The last may lie one beyond the crop."""

    def mask(self, size: Size) -> np.ndarray:
        """Where it is in a crop of this size, (H, W) bool."""
        image = Image.new("1", size)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if self.is_ellipse else pen.rectangle)(self.box, fill=1)
        return np.asarray(image)


def draw_hole(size: Size, rng: np.random.Generator) -> Hole:
    """A rectangle or an ellipse of any width and height up to those of a crop, anywhere in it."""
    half = rng.integers(np.add(size, 1)) // 2
    centre = rng.integers(half, np.subtract(size, half) + 1)
    return Hole(bool(rng.integers(2)), tuple(np.concatenate((centre - half, centre + half)).tolist()))


def middle_hole(size: Size) -> Hole:
    """The rectangle in the middle that has half of each side."""
    width, height = size
    return Hole(False, (width // 4, height // 4, width - width // 4 - 1, height - height // 4 - 1))


def masked(picture_3HW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """A picture in [-1, 1] that is mid-grey, 0, where the mask is."""
    return np.where(mask_HW, np.float32(0), picture_3HW)


def beside_noise(mask_HW: np.ndarray, latents_Chw: np.ndarray) -> np.ndarray:
    """The channels (1 + C, h, w) float32 behind noisy latents: the mask, of which each latent has its first pixel, as
    torch's nearest neighbour takes it, and latents of the masked picture."""
    step = mask_HW.shape[0] // latents_Chw.shape[1]
    return np.concatenate((mask_HW[None, ::step, ::step], latents_Chw)).astype(np.float32)

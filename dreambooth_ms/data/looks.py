"""What two measures say of a picture's looks: which others it resembles, and how sharp it is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

NEAR = 6
"""Bits of 64 in which near-duplicates may differ: two photographs by a pair of cameras side by side differ in 6, those
of different things in 20 and more (measured)."""
BLURRED = 20.0
"""Sharpness below which a photograph is very blurred. Eight everyday photographs had 400 to 1,900; a Gaussian of 1
pixel left 24 to 93 of it, one of 2 pixels 3 to 12 (measured)."""
SHARPNESS_SIDE = 512
"""The shorter side, at most, at which sharpness is measured: about what a training reads."""
_COSINES = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))
"""The 8 lowest frequencies of the discrete cosine transform (DCT-II) of 32 numbers."""


class Looks(NamedTuple):
    """What is measured of a picture."""

    signs: bytes
    """Its perceptual hash, as 64 int8: 1 for each low frequency of its brightness above their median, -1 for others."""
    sharpness: float
    """Variance of the Laplacian of its brightness."""


NOT_MEASURED = Looks(bytes(64), math.inf)


def looks_of(picture: Image.Image) -> Looks:
    """Measure a picture: pHash (Zauner, 2010), and what Pech-Pacheco et al. find focus by ("Diatom autofocusing in
    brightfield microscopy", 2000)."""
    share = min(SHARPNESS_SIDE / min(picture.size), 1)
    grey = picture.convert("L").resize([max(round(side * share), 3) for side in picture.size], reducing_gap=3)
    low = _COSINES @ np.asarray(grey.resize((32, 32), Image.Resampling.BOX), np.float64) @ _COSINES.T
    levels = np.asarray(grey, np.float32)
    sides = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:]
    signs = np.where(low > np.median(low), 1, -1).astype(np.int8)
    return Looks(signs.tobytes(), float((sides - 4 * levels[1:-1, 1:-1]).var()))


def near_duplicates(looks: Sequence[Looks]) -> dict[int, int]:
    """Positions of pictures that resemble an earlier one -> that of the first such, which itself resembles none."""
    signs = np.frombuffer(b"".join(one.signs for one in looks), np.int8).reshape(-1, 64).astype(np.float32)
    found = {}
    for at, own in enumerate(signs):
        # Of two rows of signs the product is 64 less twice the bits that differ.
        near = np.flatnonzero(signs[:at] @ own >= 64 - 2 * NEAR)
        if near.size:
            found[at] = int(near[0])
            signs[at] = 0
    return found

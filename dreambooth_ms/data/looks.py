"""What two measures say of a picture's looks: which others it resembles, and how sharp it is."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE, KEPT = 32, 8
"""Of the grey picture that is transformed, and of the low frequencies that are kept of it."""
NEAR = 6
"""Bits of 64 in which near-duplicates may differ: two photographs by a pair of cameras side by side differ in 6, those
of different things in 20 and more (measured)."""
SHARPNESS_SIDE = 512
"""The shorter side at which sharpness is measured: about what a training reads."""
BLURRED = 20.0
"""Sharpness below which a photograph is very blurred. Eight everyday photographs had 400 to 1,900; a Gaussian of 1
pixel left 24 to 93 of it, one of 2 pixels 3 to 12 (measured)."""


class Looks(NamedTuple):
    """What is measured of a picture."""

    bits: bytes
    """Its perceptual hash, 8 bytes: which of the lowest frequencies of its brightness are above their median."""
    sharpness: float
    """Variance of the Laplacian of its brightness."""


NOT_MEASURED = Looks(bytes(8), math.inf)


def looks_of(picture: Image.Image) -> Looks:
    """Measure a picture.

    The hash is pHash's (Zauner, 2010): a discrete cosine transform of 32x32 greys, of which 8x8 are kept. The variance
    of the Laplacian is from Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000).
    """
    share = min(SHARPNESS_SIDE / min(picture.size), 1)
    grey = picture.convert("L").resize([max(round(side * share), 3) for side in picture.size], reducing_gap=3)
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    low = (_cosines() @ small @ _cosines().T).ravel()
    levels = np.asarray(grey, np.float32)
    inner = levels[1:-1, 1:-1]
    laplacian = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:] - 4 * inner
    return Looks(np.packbits(low > np.median(low[1:])).tobytes(), float(laplacian.var()))


@cache
def _cosines() -> np.ndarray:
    """The lowest frequencies (8, 32) of the discrete cosine transform (DCT-II)."""
    return np.cos(np.pi / SIDE * np.outer(np.arange(KEPT), np.arange(SIDE) + 0.5))


def near_duplicates(looks: Sequence[Looks]) -> dict[int, int]:
    """Positions of pictures that resemble an earlier one -> that of the first such, which itself resembles none."""
    bits = np.frombuffer(b"".join(one.bits for one in looks), np.uint8).reshape(-1, KEPT)
    signs = np.unpackbits(bits, axis=1).astype(np.float32) * 2 - 1
    firsts, found, kept = np.empty_like(signs), dict[int, int](), list[int]()
    for at, own in enumerate(signs):
        # Of two rows of signs the product is 64 less twice the bits that differ.
        near = np.flatnonzero(firsts[: len(kept)] @ own >= KEPT**2 - 2 * NEAR)
        if near.size:
            found[at] = kept[near[0]]
        else:
            firsts[len(kept)] = own
            kept.append(at)
    return found

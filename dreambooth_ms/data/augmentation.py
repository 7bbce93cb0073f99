"""Custom Diffusion's augmentation (Kumari et al., 2023): a subject that is smaller or nearer, and words that say so, by
the numbers of the authors' code and of diffusers' script."""

from dataclasses import replace

import numpy as np

from dreambooth_ms.data.pictures import Frame, Size, frame_of

SMALLER = 0.66
"""Share of rows whose picture is at most as large as the crop."""
FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")


def augmented(picture: Size, size: Size, rng: np.random.Generator, center_crop: bool) -> tuple[Frame, str]:
    """A frame of a square size that shows a square of the picture, in its middle or anywhere, smaller, on grey, or
    enlarged; and what stands before the prompt then, which may be empty."""
    whole = size[0]
    is_smaller = rng.random() < SMALLER
    side = int(rng.integers(whole // 3, whole + 1) if is_smaller else rng.integers(int(1.2 * whole), int(1.4 * whole)))
    top, left = map(int, rng.integers(abs(whole - side) + 1, size=2))
    words = FAR if side < 0.6 * whole else ("",) if is_smaller else NEAR
    said = words[rng.integers(len(words))]
    square = frame_of(picture, (side, side), None if center_crop else rng)
    if is_smaller:
        return replace(square, size=size, place=(top, left)), said
    return replace(square, size=size, top=square.top + top, left=square.left + left), said

"""A checker of drawn scenes that reads pixels and has nothing learned in it.

It says which shape of which colour a picture of the world shows on which background, or that it is unsure. It is
meant for plain scenes; of a patterned one it names the colour that covers most of the inside of the shape. Of a subject
that is split in two it reads the marks: the outline, the halves, and the eyes.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from tools.tiny_base.world import COLOURS, SHAPES, shape_distance

BORDER = 2
"""Width of the frame that shows the background, pixels."""

BORDER_SPREAD = 25.0
"""Border pixels within this distance of their median colour, in Lab, are background."""

BORDER_SHARE = 0.7
"""Share of the border that has to be background."""

CONTRAST = (12.0, 40.0)
"""Least and greatest distance from the background, in Lab, that makes a pixel foreground."""

AREA = (0.02, 0.6)
"""Share of the picture that a shape covers."""

WHOLENESS = 0.85
"""Share of the foreground that is one connected piece."""

SQUATNESS = 1.7
"""Greatest ratio between the sides of a shape's bounding box."""

PALETTE_REACH = 35.0
"""A colour is nameless beyond this distance from the palette, in Lab."""

LIKENESS = 0.8
"""Least intersection over union with the best template."""

OUTLINE_DEPTHS = (2, 3)
"""Where an outline is sought, pixels from the border of the shape; the first is mixed with the background."""

OUTLINE_SHARE = 0.7
"""Share of those pixels that has the outline's colour."""

INSIDE_DEPTH = 3
CORE_DEPTHS = range(6, 64)
"""Where halves and eyes are sought, but for the outline's pixels, and where there is no outline any more."""

HALF_SHARE = 0.15
"""Least share of the body, without the eyes, that a half covers; where the halves meet, pixels have other colours."""

PARTED_SHARE = 0.85
"""Share of the halves that is on its side of a straight line."""

EYE_COLOURS = ("black", "white")

EYE_AREA = (4, 80)
"""Pixels of an eye in a picture of 64 x 64."""

EYE_RATIO = 2.5
"""Greatest ratio of the areas of the two eyes, and of the sides of an eye's bounding box."""

TEMPLATE_SIDE = 32
TEMPLATE_ANGLES = range(-25, 26, 5)


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where the checker is unsure."""

    shape: str | None
    colour: str | None
    background: str | None


@dataclass(frozen=True)
class Marks:
    """What tells a subject from others of its shape, by its colours; None where it is not there."""

    outline: str | None
    halves: frozenset[str] | None
    eyes: str | None


def check(image: np.ndarray) -> Reading:
    """Read shape, colour and background of a picture.

    Args:
        image: uint8 (H, W, 3), RGB, about 64 x 64.
    """
    lab = to_lab(image.astype(np.float64))
    field = _fit_background(lab)
    if field is None:
        return Reading(None, None, None)
    background = _nearest_colour(np.median(field, axis=(0, 1)))
    mask = _foreground(lab, field)
    if mask is None:
        return Reading(None, None, background)
    return Reading(_best_shape(mask), _main_colour(lab, mask), background)


def shows(image: np.ndarray, shape: str, colour: str) -> bool:
    """Whether the picture, uint8 (H, W, 3), RGB, shows this shape in this colour, on whatever background."""
    reading = check(image)
    return (reading.shape, reading.colour) == (shape, colour)


def check_marks(image: np.ndarray) -> Marks:
    """Read the marks of what a picture shows.

    Args:
        image: uint8 (H, W, 3), RGB, about 64 x 64.
    """
    lab = to_lab(image.astype(np.float64))
    field = _fit_background(lab)
    mask = None if field is None else _foreground(lab, field)
    if mask is None:
        return Marks(None, None, None)
    # A half that is like the background is a hole in what differs from it.
    names, depth = _colours(lab), _depth(~_piece_around(~mask, 0))
    outline = _outline(names, depth)
    inside = (depth >= INSIDE_DEPTH) & ((names != outline) if outline else True)
    eyes, eye_pixels = _eyes(names, inside)
    return Marks(outline, _halves(names, inside & ~_grown(eye_pixels)), eyes)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB colours: (..., 3) in 0 .. 255 to (..., 3), L in 0 .. 100."""
    level = rgb / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.moveaxis(linear @ np.transpose(to_xyz) / [0.9505, 1.0, 1.089], -1, 0)
    x, y, z = (np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116) for t in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _smooth(image: np.ndarray) -> np.ndarray:
    """Blur by (1, 2, 1) / 4 along both axes, against noise."""
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, here, after = (np.take(padded, np.arange(image.shape[axis]) + k, axis) for k in range(3))
        image = (before + 2 * here + after) / 4
    return image


def _fit_background(lab: np.ndarray) -> np.ndarray | None:
    """The background's colour at every pixel, (H, W, 3): a plane through the border; None if the border is mixed."""
    height, width = lab.shape[:2]
    y, x = np.mgrid[:height, :width]
    plane = np.stack([np.ones_like(x), x / width, y / height], axis=-1)
    edge = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y)) < BORDER
    border = lab[edge]
    usual = np.linalg.norm(border - np.median(border, axis=0), axis=-1) < BORDER_SPREAD
    if usual.mean() < BORDER_SHARE:
        return None
    coefficients = np.linalg.lstsq(plane[edge][usual], border[usual], rcond=None)[0]
    return plane @ coefficients


def _foreground(lab: np.ndarray, field: np.ndarray) -> np.ndarray | None:
    """Mask, bool (H, W), of the one thing that differs from the background; None if there is no such thing."""
    least, greatest = CONTRAST
    # Smoothing keeps noise out of the estimate of the contrast; the mask itself needs the unblurred corners.
    contrast = np.linalg.norm(_smooth(lab - field), axis=-1)
    rough = contrast > least
    if rough.mean() < AREA[0]:
        return None
    mask = np.linalg.norm(lab - field, axis=-1) > np.clip(np.median(contrast[rough]) / 2, least, greatest)
    piece = _piece_around(mask, int(_depth(mask).argmax()))
    whole = piece.sum() >= WHOLENESS * mask.sum()
    return piece if whole and AREA[0] <= piece.mean() <= AREA[1] else None


def _neighbours(mask: np.ndarray) -> list[np.ndarray]:
    """The mask moved by one pixel up, down, left and right; False comes in from outside."""
    padded = np.pad(mask, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _erode(mask: np.ndarray) -> np.ndarray:
    return np.logical_and.reduce([mask, *_neighbours(mask)])


def _depth(mask: np.ndarray) -> np.ndarray:
    """How many erosions each pixel survives, plus one; 0 outside."""
    depth = np.zeros(mask.shape, int)
    while mask.any():
        depth += mask
        mask = _erode(mask)
    return depth


def _piece_around(mask: np.ndarray, pixel: int) -> np.ndarray:
    """The connected piece of the mask that holds this pixel, named by its index in the flattened mask."""
    piece = np.zeros_like(mask)
    piece.flat[pixel] = mask.flat[pixel]
    while True:
        grown = mask & _grown(piece)
        if (grown == piece).all():
            return piece
        piece = grown


def _grown(mask: np.ndarray) -> np.ndarray:
    return np.logical_or.reduce([mask, *_neighbours(mask)])


def _colours(lab: np.ndarray) -> np.ndarray:
    """The palette colour nearest to every pixel, by its name."""
    distances = np.linalg.norm(lab[..., None, :] - _palette(), axis=-1)
    return np.array(list(COLOURS))[distances.argmin(axis=-1)]


def _commonest(names: np.ndarray) -> tuple[str | None, float]:
    """The name that occurs most often, and its share."""
    found, counts = np.unique(names, return_counts=True)
    return (str(found[counts.argmax()]), counts.max() / counts.sum()) if len(found) else (None, 0.0)


def _outline(names: np.ndarray, depth: np.ndarray) -> str | None:
    """The colour all around a body of others."""
    (ring, share), (core, _) = (_commonest(names[np.isin(depth, depths)]) for depths in (OUTLINE_DEPTHS, CORE_DEPTHS))
    return ring if share >= OUTLINE_SHARE and ring != core else None


def _eyes(names: np.ndarray, inside: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The colour of two round spots side by side in the body, and the pixels of both; None without such a pair."""
    for colour in EYE_COLOURS:
        left, spots = inside & (names == colour), []
        while left.any():
            spot = _piece_around(left, int(left.argmax()))
            left = left & ~spot
            if spot.sum() >= EYE_AREA[0]:
                spots.append(spot)
        if len(spots) == 2 and _are_a_pair(*(np.nonzero(spot) for spot in spots)):
            return colour, spots[0] | spots[1]
    return None, np.zeros_like(inside)


def _are_a_pair(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> bool:
    """Whether two spots, by the rows and columns of their pixels, are alike, round, and side by side."""
    areas = sorted(len(rows) for rows, _ in (one, other))
    sides = [sorted(np.ptp(along) + 1 for along in spot) for spot in (one, other)]
    down, across = (abs(one[axis].mean() - other[axis].mean()) for axis in (0, 1))
    is_even = all(most <= EYE_RATIO * least for least, most in (areas, *sides))
    return bool(is_even and areas[1] <= EYE_AREA[1] and across > 2 * down)


def _halves(names: np.ndarray, body: np.ndarray) -> frozenset[str] | None:
    """The two colours of a body that a straight line parts; None if it is not so."""
    found, counts = np.unique(names[body], return_counts=True)
    if len(found) < 2:
        return None
    first, second = found[counts.argsort()[:-3:-1]]
    places = [np.argwhere(body & (names == colour)) for colour in (first, second)]
    if min(map(len, places)) < HALF_SHARE * body.sum():
        return None
    centres = [place.mean(axis=0) for place in places]
    across, middle = centres[1] - centres[0], (centres[0] + centres[1]) / 2
    parted = ((places[0] - middle) @ across < 0).sum() + ((places[1] - middle) @ across > 0).sum()
    is_split = parted >= PARTED_SHARE * sum(map(len, places))
    return frozenset((str(first), str(second))) if is_split else None


def _main_colour(lab: np.ndarray, mask: np.ndarray) -> str | None:
    """The palette colour of most pixels of the mask's inside, where edges do not mix colours."""
    depth = _depth(mask)
    names = [_nearest_colour(pixel) for pixel in lab[depth >= 0.5 * depth.max()]]
    return max(sorted(set(names), key=str), key=names.count)


def _nearest_colour(lab: np.ndarray) -> str | None:
    distances = np.linalg.norm(_palette() - lab, axis=-1)
    return list(COLOURS)[distances.argmin()] if distances.min() < PALETTE_REACH else None


@cache
def _palette() -> np.ndarray:
    return to_lab(np.array(list(COLOURS.values()), dtype=np.float64))


def _best_shape(mask: np.ndarray) -> str | None:
    """The shape whose template overlaps the mask best, if it does so well enough."""
    rows, columns = (np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (1, 0))
    if max(rows, columns) > SQUATNESS * min(rows, columns):
        return None
    templates = _templates()
    cut = _cut_out(mask)
    common = (templates & cut).sum(axis=(-2, -1))
    likeness = (common / (templates | cut).sum(axis=(-2, -1))).max(axis=-1)
    return SHAPES[likeness.argmax()] if likeness.max() >= LIKENESS else None


@cache
def _templates() -> np.ndarray:
    """Every shape at every angle, bool (shapes, angles, TEMPLATE_SIDE, TEMPLATE_SIDE), filling the frame."""
    steps = np.linspace(-1.3, 1.3, 4 * TEMPLATE_SIDE)
    x, y = np.meshgrid(steps, -steps)
    turns = [(np.cos(angle), np.sin(angle)) for angle in np.radians(TEMPLATE_ANGLES)]
    return np.array(
        [[_cut_out(shape_distance(shape, c * x - s * y, s * x + c * y) < 0) for c, s in turns] for shape in SHAPES]
    )


def _cut_out(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, stretched to TEMPLATE_SIDE x TEMPLATE_SIDE: free of position, scale and aspect."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32))
    return np.asarray(box.resize((TEMPLATE_SIDE, TEMPLATE_SIDE), Image.Resampling.BILINEAR)) > 0.5

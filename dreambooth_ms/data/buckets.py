"""Sizes of several aspect ratios and about equal area, of which each picture takes the one that loses least of it.

A picture is resized until it covers a size, and the rest is cut: of ratios a and b the share lost is 1 - min(a/b, b/a).
"""

from collections.abc import Sequence

import numpy as np

from dreambooth_ms.data.pictures import Size

_OF_512 = (
    (256, 1024), (320, 1024), (384, 1024), (384, 960), (384, 896), (448, 832), (512, 768), (512, 704), (512, 512),
    (576, 640),
)  # fmt: skip
_OF_1024 = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024),
)  # fmt: skip
_NO_MIRROR = (704, 1344)


def sizes_of(resolution: int, multiple: int = 8) -> list[Size]:
    """The sizes of a resolution, from the narrowest on: NovelAI's 19 at 512 (Anlatan, 2022), the 40 that SDXL was
    trained at (Podell et al., 2023, appendix I) at 1024, else the largest that have no more than its area, whose sides
    are multiples of 64, or of less at low resolutions, and of `multiple`."""
    if resolution in (512, 1024):
        narrow = _OF_512 if resolution == 512 else _OF_1024
        sizes = {*narrow, *((height, width) for width, height in narrow if (width, height) != _NO_MIRROR)}
    else:
        step = min(64, max(8, resolution // 64 * 8))
        step = -(-step // multiple) * multiple
        lowest, highest = resolution // 2 // step * step, 2 * resolution
        widths = range(max(lowest, step), highest + 1, step)
        fitting = {(width, min(highest, resolution**2 // width // step * step)) for width in widths}
        kept = {size for size in fitting if size[1] >= max(lowest, step)}
        sizes = kept | {(height, width) for width, height in kept} | {(resolution, resolution)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size[0]))


def nearest(sizes: Sequence[Size], pictures: Sequence[Size]) -> np.ndarray:
    """The position (P,) of the size that loses least of each picture; of equals the first."""
    return _lost(sizes, pictures).argmin(1)


def lost_area(sizes: Sequence[Size], pictures: Sequence[Size]) -> np.ndarray:
    """The share (P,) of each picture that is cut off at the size that loses least of it."""
    return _lost(sizes, pictures).min(1)


def least_losing(sizes: Sequence[Size], pictures: Sequence[Size], at_most: int) -> list[Size]:
    """So many of the sizes, or fewer, that lose least of all pictures together.

    Pictures are nearest to one of two neighbours among the chosen, so that the best choice up to a size extends one up
    to a narrower one.
    """
    ordered = sorted(sizes, key=lambda size: size[0] / size[1])
    lost, ratios = _lost(ordered, pictures), np.array([width / height for width, height in ordered])
    of_pictures = np.array([width / height for width, height in pictures])
    # Of pictures between two neighbours; those beyond the first and the last chosen have one neighbour.
    between = [
        [lost[(of_pictures > low) & (of_pictures <= high)][:, [i, j]].min(1).sum() for j, high in enumerate(ratios)]
        for i, low in enumerate(ratios)
    ]
    best = [(lost[of_pictures <= ratio, j].sum(), [j]) for j, ratio in enumerate(ratios)]
    ends = [lost[of_pictures > ratio, j].sum() for j, ratio in enumerate(ratios)]
    found = min((cost + ends[j], chosen) for j, (cost, chosen) in enumerate(best))
    for _ in range(1, min(at_most, len(ordered))):
        best = [
            min(((best[i][0] + between[i][j], [*best[i][1], j]) for i in range(j)), default=(np.inf, [j]))
            for j in range(len(ordered))
        ]
        # More sizes are only worth their compilation where they lose less.
        closer = min((cost + ends[j], chosen) for j, (cost, chosen) in enumerate(best))
        found = closer if closer[0] < found[0] - 1e-9 else found
    return [ordered[j] for j in found[1]]


def _lost(sizes: Sequence[Size], pictures: Sequence[Size]) -> np.ndarray:
    """The share (P, S) of each picture that is lost at each size."""
    own, of_sizes = (np.log([width / height for width, height in of]) for of in (pictures, sizes))
    return 1 - np.exp(-np.abs(own[:, None] - of_sizes[None]))

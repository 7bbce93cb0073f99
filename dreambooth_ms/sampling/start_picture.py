"""The picture that image to image starts from, brought to a size that a model can sample. Sizes are (height, width)."""

import math

import numpy as np
from PIL import Image, ImageOps

from dreambooth_ms.data.pictures import to_array


def fitted_size(
    image: Image.Image, height: int | None, width: int | None, model_side: int, multiple: int
) -> tuple[int, int]:
    """The size to sample at: what is asked for; what is not follows from the picture's shape.

    Without either, the area is the one that the model was trained at, whatever the size of the picture.

    Args:
        image: the picture.
        height: in pixels, if it is asked for.
        width: likewise.
        model_side: side of the squares that the model was trained at.
        multiple: what sides must be multiples of.
    """
    ratio = image.width / image.height
    if height is None:
        height = _nearest(width / ratio if width else model_side / math.sqrt(ratio), multiple)
        width = width or _nearest(model_side * math.sqrt(ratio), multiple)
    return height, width or _nearest(height * ratio, multiple)


def _nearest(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The middle of a picture at this size: (3, H, W) float32 in [-1, 1]."""
    cropped = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(to_array(cropped).transpose(2, 0, 1))

"""From a folder of photographs to float32 crops: find, open as people see them, resize, crop, flip.

Sizes are (width, height), as Pillow gives them; crops are (top, left) in pixels of the resized picture.
"""

import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dreambooth_ms.atomic import file_digest
from dreambooth_ms.config.choices import Interpolation
from dreambooth_ms.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
Size = tuple[int, int]
"""(width, height) in pixels."""

MIN_SIDE = 8
"""A smaller picture is an icon or a tracking pixel: there is nothing to learn from it."""
MAX_ASPECT_RATIO = 20
"""A narrower strip would be enlarged to a picture of hundreds of megabytes before it is cropped."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What may be decoded, whatever the suffix says: Pillow would hand a PostScript file to an interpreter."""
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files."""


@dataclass(frozen=True)
class PictureFolder:
    """What a folder holds: pictures in natural order (2 before 10), and everything else."""

    pictures: tuple[Path, ...]
    skipped: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """How a picture becomes a crop: resized until it covers the crop's size, then cut. All in pixels."""

    size: Size
    """Of the crop."""
    resized: Size
    """Of the whole picture when it is cut; one side is the crop's."""
    top: int
    left: int

    @property
    def highest(self) -> tuple[int, int]:
        """The largest (top, left) that a crop of this size can have; one of the two is 0."""
        return self.resized[1] - self.size[1], self.resized[0] - self.size[0]


def find_pictures(folder: str | Path) -> PictureFolder:
    """The picture files at the top of a folder, recognised by their suffixes. Hidden files are skipped.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    wanted = f"expected a folder with pictures ({', '.join(suffix[1:] for suffix in SUFFIXES)})"
    # Of os.path, because those of pathlib raise on names that are too long or may not be looked at.
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: {'not a folder' if os.path.exists(folder) else 'no such folder'}; {wanted}")
    try:
        entries = sorted(folder.iterdir(), key=_natural_order)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); {wanted}") from error
    pictures = tuple(path for path in entries if looks_like_a_picture(path))
    skipped = tuple(path for path in entries if not looks_like_a_picture(path))
    if not pictures:
        raise DataError(f"{folder}: no picture in it, {_listed(skipped) if skipped else 'it is empty'}; {wanted}")
    return PictureFolder(pictures, skipped)


def _natural_order(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.findall(r"([0-9]+)|([^0-9]+)", path.stem.casefold())
    return [(0, int(digits), "") if digits else (1, 0, text) for digits, text in parts], path.name


def looks_like_a_picture(path: Path) -> bool:
    """Whether this is a file with a picture's suffix that is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def skipped_line(skipped: Sequence[Path]) -> str:
    """One line to print about the entries of a folder that are not pictures; empty if there are none."""
    return f"{skipped[0].parent}: skipped what is not a picture, {_listed(skipped)}" if skipped else ""


def _listed(paths: Sequence[Path], limit: int = 5) -> str:
    names = [repr(path.name)[1:-1] for path in paths[:limit]]
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return f"{len(paths)} found: {', '.join(names)}{more}"


def open_picture(path: str | Path) -> Image.Image:
    """A picture as a viewer shows it: upright by its EXIF tag, in RGB, on white where it is transparent.

    16-bit pictures are scaled to 8 bits. Of an animation, the first frame is read.

    Raises:
        DataError: the file is missing, damaged, not a picture, or too large or too narrow to be one.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that phones have by now; what is really too large, it refuses.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                picture = _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: too large to be a photograph ({error}); scale it down") from error
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not a picture of a known format; save it as PNG or JPEG, or remove it") from None
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error}); save it again as PNG or JPEG, or remove it") from error
    if max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
        width, height = picture.size
        raise DataError(f"{path}: {width}x{height} is too narrow for a square picture; crop it")
    return picture


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image.convert("RGB")


def covering_size(picture: Size, size: Size) -> Size:
    """What a picture is resized to so that it just covers `size`; its longer side is rounded down."""
    (width, height), (across, down) = picture, size
    return (down * width // height, down) if width * down >= height * across else (across, across * height // width)


def frame_of(picture: Size, size: Size, rng: np.random.Generator | None = None) -> Frame:
    """A crop of `size`, drawn uniformly from all that fit into a picture of the size `picture`.

    Without a generator it is the one in the middle; a half pixel goes to the even neighbour, as in torchvision's
    CenterCrop.
    """
    resized = covering_size(picture, size)
    top, left = (
        round(highest / 2) if rng is None else int(rng.integers(highest + 1))
        for highest in Frame(size, resized, 0, 0).highest
    )
    return Frame(size, resized, top, left)


def resize_and_crop(image: Image.Image, frame: Frame, interpolation: Interpolation, flip: bool = False) -> Image.Image:
    """A picture within its frame, mirrored if asked.

    Raises:
        ValueError: the frame is not one of this picture.
    """
    (top, left), (width, height) = frame.highest, frame.size
    is_inside = 0 <= frame.top <= top and 0 <= frame.left <= left
    if frame.resized != covering_size(image.size, frame.size) or not is_inside:
        raise ValueError(f"{frame} is outside a picture of {image.size}")
    resized = image.resize(frame.resized, Image.Resampling[interpolation.upper()])
    crop = resized.crop((frame.left, frame.top, frame.left + width, frame.top + height))
    return ImageOps.mirror(crop) if flip else crop


def to_array(image: Image.Image) -> np.ndarray:
    """RGB picture -> float32 (H, W, 3) in [-1, 1]; 0 becomes -1 and 255 becomes 1 exactly."""
    return np.asarray(image, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)


def digest(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    try:
        return file_digest(Path(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error

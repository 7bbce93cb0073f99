"""From a folder of photographs to float32 crops: find, open as people see them, resize, crop, flip. Sizes are (width,
height), as Pillow gives them; crops are (top, left) in pixels of the resized picture."""

import hashlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps

from dreambooth_ms.atomic import file_digest
from dreambooth_ms.config.choices import Interpolation
from dreambooth_ms.errors import DataError, near, show_names

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif",
    ".heic", ".heif", ".hif",
)  # fmt: skip
CAPTION_SUFFIXES, CAPTION_FILES = (".txt", ".caption"), ("metadata.jsonl", "metadata.csv")
"""Where other programs look for the captions of the pictures beside: under a picture's name, and for all of them."""
SKIPPED = "skipped what is not a picture"
CAPTIONS = "captions are not read, all pictures have one prompt"
GREY = 128
"""What is around a picture that is smaller than its crop: the middle of the 256 levels."""
Size = tuple[int, int]
"""(width, height) in pixels."""

MIN_SIDE = 8
"""A smaller picture is an icon or a tracking pixel: there is nothing to learn from it."""
MAX_ASPECT_RATIO = 20
"""A narrower strip would be enlarged to a picture of hundreds of megabytes before it is cropped."""

HAS_HEIF = util.find_spec("pillow_heif") is not None
if HAS_HEIF:
    import_module("pillow_heif").register_heif_opener()
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", *(["HEIF"] if HAS_HEIF else []))
"""What may be decoded, whatever the suffix says: Pillow would hand a PostScript file to an interpreter."""
_BY_SPACE = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pixels that a colour profile describes, by its colour space."""
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files."""


class Opened(NamedTuple):
    """A picture as a viewer shows it, and what else there is to say of it."""

    picture: Image.Image
    reading: tuple[str, ...]
    """What decides its pixels beside the bytes of its file: a colour profile, a background other than white."""
    notes: tuple[str, ...]
    """What the user should know, the same words for the same thing."""


@dataclass(frozen=True, slots=True)
class Frame:
    """How a picture becomes a crop: resized until it covers the crop's size or more, then cut; or cut to a smaller
    square, which is pasted on grey. All in pixels."""

    size: Size
    """Of the crop."""
    resized: Size
    """Of the whole picture when it is cut; where it is neither enlarged nor pasted, one side is the crop's."""
    top: int
    left: int
    place: tuple[int, int] | None = None
    """(top, left) of the square within the crop; None: what is cut fills the crop."""

    @property
    def cut(self) -> Size:
        """Of what is cut."""
        return (min(self.resized),) * 2 if self.place else self.size

    @property
    def highest(self) -> tuple[int, int]:
        """The largest (top, left) that what is cut can have."""
        return self.resized[1] - self.cut[1], self.resized[0] - self.cut[0]


def find_pictures(folder: str | Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The picture files at the top of a folder, by their suffixes, in natural order (2 before 10); hidden ones are
    skipped. And what the user should know of some of the rest, for `told`. Raises DataError if there is no such folder,
    or no picture in it."""
    folder = Path(folder)
    wanted = f"expected a folder with pictures ({', '.join(suffix[1:] for suffix in SUFFIXES)})"
    # Of os.path, because those of pathlib raise on names that are too long or may not be looked at.
    if not os.path.isdir(folder):
        wrong = "not a folder" if os.path.exists(folder) else f"no such folder{near(folder)}"
        raise DataError(f"{folder}: {wrong}; {wanted}")
    try:
        entries = sorted(folder.iterdir(), key=_natural_order)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); {wanted}") from error
    pictures = [path for path in entries if looks_like_a_picture(path)]
    if not pictures:
        held = f"{len(entries)} found: {_names(entries)}" if entries else "it is empty"
        raise DataError(f"{folder}: no picture in it, {held}; {wanted}")
    names = {name for path in pictures for name in (path.stem, path.name)}
    notes = {SKIPPED: list[Path](), CAPTIONS: list[Path]()}
    for path in sorted(set(entries).difference(pictures), key=_natural_order):
        is_caption = path.suffix.lower() in CAPTION_SUFFIXES and path.stem in names
        notes[CAPTIONS if is_caption or path.name in CAPTION_FILES else SKIPPED].append(path)
    return pictures, notes


def _natural_order(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.findall(r"([0-9]+)|([^0-9]+)", path.stem.casefold())
    return [(0, int(digits), "") if digits else (1, 0, text) for digits, text in parts], path.name


def looks_like_a_picture(path: Path) -> bool:
    """Whether this is a file with a picture's suffix that is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def told(notes: Mapping[str, Sequence[Path]]) -> list[str]:
    """A line to print for each note on entries of a folder that holds of any."""
    return [f"{of[0].parent}: {note}, {len(of)} found: {_names(of)}" for note, of in notes.items() if of]


def _names(paths: Sequence[Path]) -> str:
    return show_names([repr(path.name)[1:-1] for path in paths], at_most=5)


def open_picture(path: str | Path, background: str = "white") -> Image.Image:
    """`read_picture`, of which the picture is all that is wanted."""
    return read_picture(path, background).picture


def read_picture(path: str | Path, background: str = "white") -> Opened:
    """A picture as a viewer shows it: upright by its EXIF tag, in sRGB by its colour profile, on a background where it
    is transparent; 16 bits are scaled to 8, and of an animation the first frame is read. Raises DataError if the file
    is missing, damaged, not a picture, or too large or too narrow to be one."""
    with _errors_of(path):
        opened = _as_shown(read_upright(path), background)
    width, height = opened.picture.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(f"{path}: {width}x{height} is too narrow for a square picture; crop it")
    return opened


def read_upright(path: str | Path) -> Image.Image:
    """A picture with its own pixels, upright. Raises DataError if the file is missing, damaged, not a picture, or too
    large to be one."""
    with _errors_of(path), warnings.catch_warnings():
        # Pillow warns of sizes that phones have by now; what is really too large, it refuses.
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image)


@contextmanager
def _errors_of(path: str | Path) -> Iterator[None]:
    """Inside, what Pillow raises is raised as what is wrong with the file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{near(path)}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: too large to be a photograph ({error}); scale it down") from error
    except Image.UnidentifiedImageError:
        wrong = "not a picture of a known format; save it as PNG or JPEG, or remove it"
        if not HAS_HEIF and _is_heif(path):
            wrong = "a HEIC photograph, for which pip install pillow-heif is needed; or save it as JPEG"
        raise DataError(f"{path}: {wrong}") from None
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error}); save it again as PNG or JPEG, or remove it") from error


def _is_heif(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(11)[4:] in (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf")


def _as_shown(image: Image.Image, background: str) -> Opened:
    profile, has_profile = image.info.get("icc_profile"), "icc_profile" in image.info
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    managed, picture = _to_srgb(image, profile) if profile else None, image.convert("RGB")
    notes = ["colour profile damaged or of other pixels, taken as sRGB"] if has_profile and managed is None else []
    reading: list[str] = []
    if managed is not None and managed.tobytes() != picture.tobytes():
        picture, reading = managed, ["profile"]
    if alpha is not None and alpha.getextrema() != (255, 255):
        layered, colour = Image.merge("RGBA", (*picture.split(), alpha)), ImageColor.getrgb(background)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, colour), layered).convert("RGB")
        # White is left out, so that what was cached before there was a choice holds.
        reading += [str(colour)] if colour != (255, 255, 255) else []
        notes.append(f"transparent, put on {background} (--transparent_background names another colour)")
    return Opened(picture, tuple(reading), tuple(notes))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """RGB pixels in sRGB by a colour profile; None if it is damaged, or is one of other pixels."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _BY_SPACE.get(own.profile.xcolor_space, "")
        if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and image.mode not in ("1", "L", "LA")):
            return None
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(own))
        return ImageCms.profileToProfile(image.convert(mode), own, ImageCms.createProfile("sRGB"), intent, "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None


def covering_size(picture: Size, size: Size) -> Size:
    """What a picture is resized to so that it just covers `size`; its longer side is rounded down."""
    (width, height), (across, down) = picture, size
    return (down * width // height, down) if width * down >= height * across else (across, across * height // width)


def frame_of(picture: Size, size: Size, rng: np.random.Generator | None = None) -> Frame:
    """A crop of `size`, drawn uniformly from all that fit into a picture of the size `picture`; without a generator the
    middle one, where a half pixel goes to the even neighbour, as in torchvision's CenterCrop."""
    resized = covering_size(picture, size)
    top, left = (
        round(highest / 2) if rng is None else int(rng.integers(highest + 1))
        for highest in Frame(size, resized, 0, 0).highest
    )
    return Frame(size, resized, top, left)


def resize_and_crop(image: Image.Image, frame: Frame, interpolation: Interpolation, flip: bool = False) -> Image.Image:
    """A picture within its frame, mirrored if asked. Raises ValueError if the frame is not one of this picture."""
    (top, left), (width, height) = frame.highest, frame.cut
    is_inside = 0 <= frame.top <= top and 0 <= frame.left <= left
    covered = [covering_size(image.size, size) for size in (frame.cut, (min(frame.resized),) * 2)]
    if frame.resized not in covered or not is_inside:
        raise ValueError(f"{frame} is outside a picture of {image.size}")
    resized = image.resize(frame.resized, Image.Resampling[interpolation.upper()])
    crop = resized.crop((frame.left, frame.top, frame.left + width, frame.top + height))
    if frame.place:
        square, crop = crop, Image.new("L", frame.size, GREY).convert(image.mode)
        crop.paste(square, frame.place[::-1])
    return ImageOps.mirror(crop) if flip else crop


def to_array(image: Image.Image) -> np.ndarray:
    """RGB picture -> float32 (H, W, 3) in [-1, 1]; 0 becomes -1 and 255 becomes 1 exactly."""
    return np.asarray(image, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)


def digest(path: str | Path, reading: Sequence[str] = ()) -> str:
    """SHA-256 of the file's bytes and of what else decides its pixels (`Opened.reading`), in hexadecimal."""
    try:
        own = file_digest(Path(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return hashlib.sha256(" ".join((own, *reading)).encode()).hexdigest() if reading else own

"""Files from a browser: looked at before they are used, stored under names of our own, and never run."""

import hashlib
import re
from pathlib import Path

from PIL import Image

from dreambooth_ms.adapters.file import holds_adapter
from dreambooth_ms.data.pictures import SUFFIXES, open_picture
from dreambooth_ms.errors import DataError, WeightError
from dreambooth_ms.formats.files.open import open_tensor_file

PICTURE_TYPES = tuple(suffix[1:] for suffix in SUFFIXES)
LORA_TYPES = ("safetensors", "ckpt", "pt", "pth", "bin")
MEGABYTE = 1024 * 1024
MAX_PICTURE_BYTES, MAX_LORA_BYTES = 40 * MEGABYTE, 1024 * MEGABYTE
MAX_PIXELS = 64_000_000
"""More than any phone takes; a picture of a few kilobytes may claim a thousand times as many."""


def store_picture(folder: Path, name: str, content: bytes) -> Path:
    """Write an uploaded picture into a folder, if it is one; the same picture twice is one file.

    Raises:
        DataError: another type, too large, too many pixels, or damaged; nothing is left of it.
    """
    _check_type(name, PICTURE_TYPES, "a picture")
    _check_size(name, content, MAX_PICTURE_BYTES)
    path = _stored(folder, name, content)
    try:
        _check_pixels(path)
        open_picture(path)
    except DataError as error:
        path.unlink(missing_ok=True)
        raise DataError(str(error).replace(str(path), name)) from None
    return path


def read_picture(folder: Path, name: str, content: bytes, background: str = "white") -> Image.Image:
    """An uploaded picture, RGB, upright and on a background, which is in the folder only while it is looked at.

    Raises:
        DataError: as `store_picture`.
    """
    path = store_picture(folder, name, content)
    try:
        return open_picture(path, background)
    finally:
        path.unlink()


def store_lora(folder: Path, name: str, content: bytes) -> Path:
    """Write an uploaded LoRA into a folder, if it is one of a format that is read.

    Pickled files are read by the toolkit's own reader, which builds arrays and runs nothing.

    Raises:
        DataError: another type, too large, damaged, or no LoRA; nothing is left of it.
    """
    _check_type(name, LORA_TYPES, "a LoRA")
    _check_size(name, content, MAX_LORA_BYTES)
    path = _stored(folder, name, content)
    try:
        open_tensor_file(path)
        if not holds_adapter(path):
            raise WeightError(f"{name}: holds no LoRA that is known; see what it is with dreambooth-ms inspect")
    except WeightError as error:
        path.unlink(missing_ok=True)
        raise DataError(str(error).splitlines()[0].replace(str(path), name)) from None
    return path


def _check_type(name: str, types: tuple[str, ...], wanted: str) -> None:
    suffix = Path(name).suffix.lower().lstrip(".")
    if suffix not in types:
        raise DataError(f"{name}: expected {wanted} ({', '.join(types)}), got a file of type {suffix or 'unknown'}")


def _check_size(name: str, content: bytes, most: int) -> None:
    if not content:
        raise DataError(f"{name}: the file is empty; upload it again")
    if len(content) > most:
        raise DataError(f"{name}: {len(content) // MEGABYTE} MB are too many; at most {most // MEGABYTE} are taken")


def _check_pixels(path: Path) -> None:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise DataError(f"{path}: too many pixels to be a photograph; scale it down") from None
    except Exception:  # noqa: BLE001 - damaged files raise anything; `open_picture` says what is wrong.
        return
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: {width}x{height} are too many pixels; at most {MAX_PIXELS // 1_000_000} million are taken"
        )


def _stored(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / safe_name(name, content)
    path.write_bytes(content)
    return path


def safe_name(name: str, content: bytes) -> str:
    """A file name without anything that a shell, a browser or a file system could take for something else."""
    base_name = Path(name.replace("\\", "/")).name
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", Path(base_name).stem).strip("-")[:40] or "file"
    suffix = re.sub(r"[^a-z0-9.]", "", Path(base_name).suffix.lower())
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"

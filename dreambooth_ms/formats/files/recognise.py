"""What kind of container a file is, by its content and never by its name; and what it seems to be if it is none."""

import os
import re
from pathlib import Path

from dreambooth_ms.formats.files.byte_ranges import reading
from dreambooth_ms.formats.files.format_error import FormatError
from dreambooth_ms.formats.files.mindspore_ckpt import begins_like_a_checkpoint
from dreambooth_ms.formats.files.stored import Container
from dreambooth_ms.formats.files.strict_json import read_json_object
from dreambooth_ms.formats.files.torch_file import LEGACY_MAGIC

WEIGHT_MAP = "weight_map"

_HEAD_BYTES = 4096

# Protocol, the length of the pickle from protocol 4 on, the number's length, the number.
_LEGACY_HEAD = re.compile(
    rb"\x80[\x02-\x05](?:\x95.{8})?\x8a\x0a" + re.escape(LEGACY_MAGIC.to_bytes(10, "little")), re.DOTALL
)
_LONGEST_HEADER = 1 << 40
"""Of safetensors; text read as a number is larger."""

_SIGNATURES = (
    (rb"\Z", "it is empty"),
    (rb"version https://git-lfs", "it is a git-lfs pointer, not the file it stands for; run git lfs pull"),
    (rb"\x89PNG", "it is a PNG picture"),
    (rb"\xff\xd8\xff", "it is a JPEG picture"),
    (rb"GGUF", "it is a GGUF file; convert it to safetensors"),
    (rb"\x89HDF", "it is an HDF5 file; convert it to safetensors"),
    (rb"\x93NUMPY", "it is a numpy array; save it as safetensors"),
    (rb"\x1f\x8b", "it is a gzip archive; unpack it first"),
    (rb"7z\xbc\xaf", "it is a 7z archive; unpack it first"),
    (rb"\xfd7zXZ", "it is an xz archive; unpack it first"),
    (rb"Rar!", "it is a RAR archive; unpack it first"),
    (rb"PK\x03\x04", "it is a zip archive"),
    (rb"PK\x05\x06", "it is an empty zip archive"),
    (rb".{257}ustar", "it is a tar archive; unpack it first"),
    (rb"[\xef\xbb\xbf\s]*(?i:<!doctype html|<html)", "it is an HTML page: the download failed"),
    (rb"[\xef\xbb\xbf\s]*(?i:<\?xml)", "it is an XML document: the download failed"),
    (rb"\0+\Z", "it begins with zeros: the download was not finished"),
    (rb"\s*[\[{][ -~\t\r\n]*\Z", "it is JSON"),
    (rb"[ -~\t\r\n]+\Z", "it is text"),
)
"""How a file's first bytes look, and what it seems to be then; the first that fits counts."""


def recognise(path: Path) -> Container:
    """The kind of a file or folder.

    Raises:
        WeightError: no such file, or its content is of no kind that holds tensors; says what it seems to be.
    """
    # Of os.path, because that of pathlib raises on names that are too long.
    if os.path.isdir(path):
        return Container.FOLDER
    with reading(path, "weight file") as source:
        head = source.read(0, min(source.size, _HEAD_BYTES))
        if head.startswith(b"PK\x03\x04"):
            return Container.TORCH_ZIP
        if _LEGACY_HEAD.match(head):
            return Container.TORCH_LEGACY
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_HEADER:
            return Container.SAFETENSORS
        if begins_like_a_checkpoint(head):
            return Container.MINDSPORE
        if head.lstrip()[:1] == b"{":
            if WEIGHT_MAP in read_json_object(source):
                return Container.SHARDED
            raise FormatError(f"it is JSON, and not the index of a sharded model, which has a {WEIGHT_MAP}")
        raise FormatError(seems_to_be(head) or "it is none of the kinds that are known")


def seems_to_be(head: bytes) -> str | None:
    """In words, from a file's first bytes; None if nothing is known about them."""
    return next((meaning for look, meaning in _SIGNATURES if re.match(look, head, re.DOTALL)), None)

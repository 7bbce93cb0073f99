"""What kind of container a file is, by its content and never by its name; and what it seems to be if it is none."""

import os
import re
from pathlib import Path

from dreambooth_ms.formats.files.byte_ranges import SourceFile
from dreambooth_ms.formats.files.format_error import FormatError, reading
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
    (b"version https://git-lfs", "a git-lfs pointer, not the file it stands for; run git lfs pull"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GGUF", "a GGUF file; convert it to safetensors"),
    (b"\x89HDF", "an HDF5 file; convert it to safetensors"),
    (b"\x93NUMPY", "a numpy array; save it as safetensors"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
)

_TEXT = bytes(range(32, 127)) + b"\t\r\n"


def recognise(path: Path) -> Container:
    """The kind of a file or folder.

    Raises:
        WeightError: no such file, or its content is of no kind that holds tensors; says what it seems to be.
    """
    # Of os.path, because that of pathlib raises on names that are too long.
    if os.path.isdir(path):
        return Container.FOLDER
    with reading(path, "weight file"):
        source = SourceFile.at(path)
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
    if not head:
        return "it is empty"
    for signature, meaning in _SIGNATURES:
        if head.startswith(signature):
            return f"it is {meaning}"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page: the download failed"
    if start.startswith(b"<?xml"):
        return "it is an XML document: the download failed"
    if not head.strip(b"\0"):
        return "it begins with zeros: the download was not finished"
    if not head.strip(_TEXT):
        return "it is JSON" if start.startswith((b"{", b"[")) else "it is text"
    return None

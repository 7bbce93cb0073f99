"""What is wrong with a file's content, from where it is found to the line that the user reads."""

import re

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
    (rb"[\xef\xbb\xbf \t\r\n]*(?i:<!doctype html|<html)", "it is an HTML page: the download failed"),
    (rb"[\xef\xbb\xbf \t\r\n]*(?i:<\?xml)", "it is an XML document: the download failed"),
    (rb"\0+\Z", "it begins with zeros: the download was not finished"),
    (rb"[ \t\r\n]*[\[{][ -~\t\r\n]*\Z", "it is JSON"),
    (rb"[ -~\t\r\n]+\Z", "it is text"),
)
"""How a file's first bytes look, and what it seems to be then; the first that fits counts."""


class FormatError(Exception):
    """What is wrong with a file's content; becomes a WeightError where its name is known (`stored.reading`)."""

    def __init__(self, reason: str, remedy: str = "copy or download it again") -> None:
        super().__init__(reason)
        self.remedy = remedy


def unread_type(tensor: str, dtype: object) -> FormatError:
    """The error for a tensor of a type that is not read; fp8 is called so, whatever the file calls it."""
    if isinstance(dtype, str) and re.match(r"(?:hi)?f(?:loat)?8", dtype, re.IGNORECASE):
        return FormatError(f"{tensor} is fp8, {quoted(dtype)}, which is not read", "use the same model in fp16 or bf16")
    return FormatError(f"{tensor} has the type {quoted(dtype)}, which cannot be read")


def seems_to_be(head: bytes) -> str | None:
    """In words, from a file's first bytes; None if nothing is known about them."""
    return next((meaning for look, meaning in _SIGNATURES if re.match(look, head, re.DOTALL)), None)


def quoted(value: object, within: bool = False) -> str:
    """Something out of a file, for a message: on one line, short, and never walked through as a whole."""
    if isinstance(value, str):
        return repr(value[:100])
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    if isinstance(value, (list, tuple)) and not within:
        shown = [quoted(item, within=True) for item in value[:8]]
        return f"({', '.join(shown)}{', …' if len(value) > 8 else ''})"
    return f"a {type(value).__name__}"

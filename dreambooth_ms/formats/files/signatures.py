"""What a file that is no weights seems to be, so that a message can say what went wrong."""

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

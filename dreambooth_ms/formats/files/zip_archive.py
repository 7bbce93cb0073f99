"""Zip archives that nobody vouches for: where the bytes of an entry are."""

import struct
import zipfile
from io import BufferedReader

from dreambooth_ms.formats.files.byte_ranges import ByteRange, DeflatedRange, FileRange, SourceFile, read_bytes
from dreambooth_ms.formats.files.format_error import FormatError, quoted

_MAX_DIRECTORY_BYTES = 16_000_000
"""One entry in memory takes 13 times its size in the directory."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1

# What was compressed may take so much more room than the archive, and so many bytes more.
_MAX_INFLATION, _MAX_INFLATED = 16, 1 << 26

_DAMAGES = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error)
"""What the standard library raises on invalid archives."""


def read_directory(source: SourceFile) -> dict[str, zipfile.ZipInfo]:
    """The entries of an archive by their names; nothing is unpacked.

    Raises:
        FormatError: damaged, or a name stands in it twice.
    """
    with source.opened() as file:
        try:
            listed = zipfile.ZipFile(_BoundedReads(file.raw)).infolist()
        except _DAMAGES as error:
            raise FormatError(f"cut short, or damaged: {error}") from error
    entries = {entry.filename: entry for entry in listed}
    if len(entries) < len(listed):
        raise FormatError("damaged: a name stands twice in the archive")
    inflated = sum(entry.file_size for entry in listed if entry.compress_type != zipfile.ZIP_STORED)
    if inflated > _MAX_INFLATION * source.size + _MAX_INFLATED:
        raise FormatError("more is compressed in it than weights can be; unpack it to look what it is")
    return entries


def range_of(entry: zipfile.ZipInfo, source: SourceFile) -> ByteRange:
    """Where the content of an archive's entry is.

    Raises:
        FormatError: it is encrypted, or compressed in another way than by deflation.
    """
    name, header = quoted(entry.filename), source.read(entry.header_offset, _LOCAL_HEADER.size)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04" or entry.flag_bits & _ENCRYPTED:
        raise FormatError(f"{name} is damaged or encrypted")
    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    content = FileRange(source, start, entry.compress_size)
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        return DeflatedRange(content, entry, 0, entry.file_size)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise FormatError(f"{name} is damaged, or compressed in a way that cannot be read")
    return content


def read_entry(entry: zipfile.ZipInfo, source: SourceFile, at_most: int) -> bytes:
    """The content of a small entry.

    Raises:
        FormatError: it is too large, or as in `range_of`.
    """
    if entry.file_size > at_most:
        raise FormatError(f"{quoted(entry.filename)} has {entry.file_size} bytes; at most {at_most} are read")
    return read_bytes(range_of(entry, source))


class _BoundedReads(BufferedReader):
    """A file that gives no more than a directory's size at a time, whatever an archive says about itself."""

    def read(self, count: int | None = -1) -> bytes:
        bounded = _MAX_DIRECTORY_BYTES if count is None or count < 0 else count
        if bounded > _MAX_DIRECTORY_BYTES:
            raise FormatError("damaged: its directory would be larger than that of any weights")
        return super().read(bounded)

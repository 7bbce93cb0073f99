"""Zip archives that nobody vouches for: where the bytes of an entry are."""

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

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


@dataclass(frozen=True)
class ZipArchive:
    """The entries of an archive by name; nothing is unpacked."""

    source: SourceFile
    entries: Mapping[str, zipfile.ZipInfo]

    @classmethod
    def open(cls, source: SourceFile) -> "ZipArchive":
        """Read an archive's directory.

        Raises:
            FormatError: damaged, or a name stands in it twice.
        """
        with source.opened() as file:
            try:
                listed = zipfile.ZipFile(_BoundedReads(file)).infolist()  # type: ignore[arg-type]
            except _DAMAGES as error:
                raise FormatError(f"cut short, or damaged: {error}") from error
        entries = {entry.filename: entry for entry in listed}
        if len(entries) < len(listed):
            raise FormatError("damaged: a name stands twice in the archive")
        inflated = sum(entry.file_size for entry in listed if entry.compress_type != zipfile.ZIP_STORED)
        if inflated > _MAX_INFLATION * source.size + _MAX_INFLATED:
            raise FormatError("more is compressed in it than weights can be; unpack it to look what it is")
        return cls(source, entries)

    def range_of(self, name: str) -> ByteRange:
        """Where the content of an entry is.

        Raises:
            FormatError: there is no such entry, or it is encrypted or compressed in another way than by deflation.
        """
        if name not in self.entries:
            raise FormatError(f"cut short, or damaged: {quoted(name)} is missing in the archive")
        entry = self.entries[name]
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(
            self.source.read(entry.header_offset, _LOCAL_HEADER.size)
        )
        if signature != b"PK\x03\x04" or entry.flag_bits & _ENCRYPTED:
            raise FormatError(f"{quoted(name)} is damaged or encrypted")
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        content = FileRange(self.source, start, entry.compress_size)
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            return DeflatedRange(content, entry, 0, entry.file_size)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise FormatError(f"{quoted(name)} is damaged, or compressed in a way that cannot be read")
        return content

    def read(self, name: str, at_most: int) -> bytes:
        """The content of a small entry.

        Raises:
            FormatError: no such entry, or it is too large.
        """
        content = self.range_of(name)
        if content.size > at_most:
            raise FormatError(f"{quoted(name)} has {content.size} bytes; at most {at_most} are read")
        return read_bytes(content)


class _BoundedReads:
    """A file that gives no more than a directory's size at a time, whatever an archive says about itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, count: int = -1) -> bytes:
        if count > _MAX_DIRECTORY_BYTES:
            raise FormatError("damaged: its directory would be larger than that of any weights")
        return self._file.read(_MAX_DIRECTORY_BYTES if count < 0 else count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

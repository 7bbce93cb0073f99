"""The wire format of protocol buffers, as far as checkpoints use it: numbers and delimited contents.

https://protobuf.dev/programming-guides/encoding
"""

from collections.abc import Iterator
from typing import BinaryIO

from dreambooth_ms.formats.files.format_error import FormatError

# How a field is stored: in bits 0 to 2 of its key; the field's number stands above.
_VARINT, _DELIMITED = 0, 2


def read_fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int | range]]:
    """The fields of a message that stands from `start` to `end`: number, and value or where the content stands."""
    position = start
    while position < end:
        file.seek(position)
        key = _read_varint(file)
        if key & 7 == _VARINT:
            value: int | range = _read_varint(file)
            position = file.tell()
        elif key & 7 == _DELIMITED:
            length = _read_varint(file)
            value = range(file.tell(), file.tell() + length)
            position = value.stop
        else:
            raise FormatError("it has another structure than checkpoints have")
        if position > end:
            raise FormatError("cut short, or damaged: something in it would lie beyond its end")
        yield key >> 3, value


def _read_varint(file: BinaryIO) -> int:
    """A number in groups of 7 bits, the lowest first; bit 7 says that another group follows."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise FormatError("cut short")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value & (1 << 64) - 1
    raise FormatError("damaged: a number without an end")


def content_field(field: int, content: bytes) -> bytes:
    """A field with a text or with another message."""
    return head_of_field(field, len(content)) + content


def head_of_field(field: int, length: int) -> bytes:
    """What stands before a content of so many bytes."""
    return _encoded(field << 3 | _DELIMITED) + _encoded(length)


def number_field(field: int, value: int) -> bytes:
    """A field with a number that is not negative."""
    return _encoded(field << 3 | _VARINT) + _encoded(value)


def _encoded(value: int) -> bytes:
    """The inverse of `_read_varint`."""
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])

"""MindSpore checkpoints: a protocol buffer, read and written as a stream.

    Checkpoint      { repeated Value value = 1 }
    Value           { string tag = 1; TensorProto tensor = 2 or MapTensorProto maptensor = 3 }
    TensorProto     { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

as in mindspore/train/checkpoint_pb2.py of MindSpore 2.10, stored as https://protobuf.dev/programming-guides/encoding
says. A large parameter stands in several consecutive values with the same tag; each repeats the whole shape and carries
the next part of the bytes. Checkpoints that were saved with `crc_check` end in `crc_num` and ten more bytes.
"""

import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from dreambooth_ms.atomic import atomic_path
from dreambooth_ms.formats.files import stored
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError, quoted, unread_type
from dreambooth_ms.formats.files.stored import Container, FileRange, Progress, StoredTensor, TensorFile

SLICE_BYTES = 512 * 1024 * 1024
"""MindSpore cuts larger parameters into such parts; protocol buffers cannot hold 2 GiB in one."""

_TYPES = {dtype.mindspore: dtype for dtype in DType}
_TEXT = "str"

_TRAILER, _TRAILER_BYTES = b"crc_num", 17
_LONGEST_NAME, _LONGEST_TEXT = 10_000, 10_000

# The keys of the fields: bits 0 to 2 say how a field is stored, as a number or behind its length; its number is above.
_VARINT, _DELIMITED = 0, 2
_VALUE = 1 << 3 | _DELIMITED
_TAG, _TENSOR, _MAP_TENSOR = 1 << 3 | _DELIMITED, 2 << 3 | _DELIMITED, 3 << 3 | _DELIMITED
_DIMS, _TYPE, _CONTENT = 1 << 3 | _VARINT, 2 << 3 | _DELIMITED, 3 << 3 | _DELIMITED


@dataclass(frozen=True)
class _Part:
    """One value of a checkpoint."""

    tag: str
    dims: tuple[int, ...]
    type: str
    content: FileRange


def read_mindspore_ckpt(source: FileRange) -> TensorFile:
    """A checkpoint, whose texts become metadata."""
    with source.opened() as file:
        groups = [(tag, list(parts)) for tag, parts in groupby(_parts(source, file), attrgetter("tag"))]
    names = [tag for tag, _ in groups]
    stored.check_names(names)
    if not names:
        raise FormatError("it holds nothing")
    if len(set(names)) < len(names):
        raise FormatError("a name stands in it twice")
    metadata = {tag: _text(group) for tag, group in groups if group[0].type == _TEXT}
    tensors = {tag: _stored(tag, group) for tag, group in groups if tag not in metadata}
    return TensorFile(source.path, Container.MINDSPORE, tensors, metadata)


def _stored(name: str, parts: list[_Part]) -> StoredTensor:
    first = parts[0]
    if any((part.dims, part.type) != (first.dims, first.type) for part in parts):
        raise FormatError(f"damaged: the parts of {quoted(name)} differ in shape or type")
    if first.type not in _TYPES:
        raise unread_type(quoted(name), first.type)
    dtype, size = _TYPES[first.type], sum(part.content.size for part in parts)
    # Older versions wrote a shape for numbers without an axis.
    shape = () if first.dims == (0,) and size == dtype.itemsize else first.dims
    if stored.checked_byte_count(shape, dtype) != size:
        raise FormatError(f"cut short, or damaged: {quoted(name)} has a size that does not fit its shape")
    return StoredTensor.in_files(shape, dtype, *(part.content for part in parts))


def _text(parts: list[_Part]) -> str:
    """A text, which MindSpore stores as numpy's array of characters of 4 bytes."""
    if sum(part.content.size for part in parts) > _LONGEST_TEXT:
        raise FormatError(f"{quoted(parts[0].tag)} is longer than a text can be")
    content = b"".join(part.content.read() for part in parts)
    try:
        return content.decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise FormatError(f"{quoted(parts[0].tag)} is damaged") from error


def begins_like_a_checkpoint(head: bytes) -> bool:
    """Whether a file's first bytes are those of a checkpoint: a value with a readable tag, then a tensor."""
    file = io.BytesIO(head)
    try:
        key, _, value = next(_read_fields(file, range(sys.maxsize)))
        fields = _read_fields(file, range(value.start, sys.maxsize))
        tag_key, _, tag = next(fields)
        readable = 0 < len(tag) < len(head) and _name(file, tag).isprintable()
        return (key, tag_key) == (_VALUE, _TAG) and readable and next(fields)[0] in (_TENSOR, _MAP_TENSOR)
    except FormatError:
        return False


def _parts(source: FileRange, file: BinaryIO) -> Iterator[_Part]:
    """The values of a checkpoint, in order; their contents are passed over."""
    end = source.size
    if end >= _TRAILER_BYTES and source.part(end - _TRAILER_BYTES, len(_TRAILER)).read() == _TRAILER:
        end -= _TRAILER_BYTES
    for count, (key, _, span) in enumerate(_read_fields(file, range(end))):
        if key != _VALUE or count == stored.MAX_TENSORS:
            raise FormatError("it has another structure than checkpoints have, or too many parts")
        yield _part(source, file, span)


def _part(source: FileRange, file: BinaryIO, span: range) -> _Part:
    keys, _, places = _listed(file, span, 2)
    tag = _name(file, places[0]) if keys[:1] == (_TAG,) else ""
    if keys != (_TAG, _TENSOR):
        raise FormatError(f"{quoted(tag)} {'has no values' if keys == (_TAG,) else 'is no tensor of numbers'}")
    keys, numbers, places = _listed(file, places[1], stored.MAX_DIMENSIONS + 3)
    if keys != (*(_DIMS,) * (len(keys) - 2), _TYPE, _CONTENT):
        raise FormatError(f"{quoted(tag)} has another structure than tensors have")
    dims = tuple(number if number < 1 << 63 else number - (1 << 64) for number in numbers[:-2])
    return _Part(tag, dims, _name(file, places[-2]), source.part(places[-1].start, len(places[-1])))


def _listed(file: BinaryIO, message: range, at_most: int) -> tuple[tuple[Any, ...], ...]:
    """Keys, numbers and places of a message's fields, of one more than `at_most` if there are more."""
    return tuple(zip(*islice(_read_fields(file, message), at_most + 1), strict=True)) or ((), (), ())


def _name(file: BinaryIO, span: range) -> str:
    if len(span) > _LONGEST_NAME:
        raise FormatError("damaged: a name without an end")
    file.seek(span.start)
    try:
        return file.read(len(span)).decode()
    except UnicodeDecodeError as error:
        raise FormatError("damaged: a name that is no text") from error


def write_mindspore_ckpt(path: Path, tensors: Mapping[str, StoredTensor], progress: Progress | None = None) -> None:
    """Write a checkpoint as `write_safetensors` does, atomically and tensor by tensor, in MindSpore's own bytes."""
    size = sum(len(head) + len(part) for name in tensors for head, part in _slices(name, tensors[name]))
    with atomic_path(path, size) as partial_path, partial_path.open("wb") as file:
        for name, tensor in tensors.items():
            slices = list(_slices(name, tensor))
            content = stored.raw_bytes(tensor.read()) if len(slices) > 1 else None
            for head, part in slices:
                file.write(head)
                if content is None:
                    tensor.write_to(file)
                else:
                    file.write(content[part.start : part.stop])
                if progress is not None:
                    progress(len(part))


def _slices(name: str, tensor: StoredTensor) -> Iterator[tuple[bytes, range]]:
    """What stands before each part of a tensor's bytes, and which part it is."""
    for start in range(0, max(tensor.byte_count, 1), SLICE_BYTES):
        part = range(start, min(start + SLICE_BYTES, tensor.byte_count))
        described = b"".join(_head(_DIMS, length) for length in tensor.shape)
        described += _text_field(_TYPE, tensor.dtype.mindspore) + _head(_CONTENT, len(part))
        head = _text_field(_TAG, name) + _head(_TENSOR, len(described) + len(part)) + described
        yield _head(_VALUE, len(head) + len(part)) + head, part


def _read_fields(file: BinaryIO, message: range) -> Iterator[tuple[int, int, range]]:
    """The fields of a message that stands at some place: key, value or length, and where the content stands."""
    position = message.start
    while position < message.stop:
        file.seek(position)
        key, number = _read_varint(file), _read_varint(file)
        if key & 7 not in (_VARINT, _DELIMITED):
            raise FormatError("it has another structure than checkpoints have")
        place = range(file.tell(), file.tell() + (number if key & 7 == _DELIMITED else 0))
        position = place.stop
        if position > message.stop:
            raise FormatError("cut short, or damaged: something in it would lie beyond its end")
        yield key, number, place


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


def _text_field(key: int, text: str) -> bytes:
    return _head(key, len(text.encode())) + text.encode()


def _head(key: int, number: int) -> bytes:
    """A field with a number that is not negative, or what stands before a content of so many bytes."""
    return _encoded(key) + _encoded(number)


def _encoded(value: int) -> bytes:
    """The inverse of `_read_varint`."""
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])

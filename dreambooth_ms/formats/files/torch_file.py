"""PyTorch checkpoints, read without PyTorch and without running anything: .ckpt, .bin, .pt, .pth.

Since version 1.6 they are zip archives: `<name>/data.pkl` describes the tensors, `<name>/data/<key>` are the storages
they are views into. Before that, they were some pickles one after the other, then the storages, each after its length.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError, quoted
from dreambooth_ms.formats.files.stored import Container, FileRange, StoredTensor, TensorFile, check_names, read_values
from dreambooth_ms.formats.files.torch_pickle import Storage, TorchUnpickler, View, find_notes, find_tensors
from dreambooth_ms.formats.files.torch_writing import LONGEST_NOTE, NOTES

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""What the first pickle of an old file holds."""

MAX_PICKLE_BYTES = 32_000_000
"""Of what describes the tensors; that of SD 1.5 has 0.3 MB."""

_LENGTH_BYTES = 8

_SMALL = 1 << 20
"""A tensor that repeats its elements may have so many bytes, however small the file."""

# What all tensors take to read, for each byte of the file, and so many bytes more: names may share their values.
_MOST_READ, _ALWAYS_READ = 32, 1 << 28

_MAX_DIRECTORY_BYTES = 16_000_000
"""One entry in memory takes 13 times its size in the directory."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1

# What was compressed may take so much more room than the archive, and so many bytes more.
_MAX_INFLATION, _MAX_INFLATED = 16, 1 << 26

_DAMAGES = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error)
"""What the standard library raises on invalid archives."""


@dataclass(frozen=True)
class DeflatedRange(FileRange):
    """A part of what an archive's entry that was compressed inflates to."""

    entry: zipfile.ZipInfo
    begin: int
    """Where the compressed bytes begin in the file."""

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of their size with the bytes; those before them are inflated and dropped."""
        with self.opened() as file:
            file.seek(self.begin)
            try:
                # It inflates no more at a time than is asked for.
                content = zipfile.ZipExtFile(file, "r", self.entry)
                content.seek(self.start)
                if content.readinto(buffer) < self.size:
                    raise EOFError("what was compressed in it is shorter than declared")
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise WeightError(
                    f"{self.path}: not a readable compressed archive ({error}); copy or download it again"
                ) from error


def read_torch_zip(source: FileRange) -> TensorFile:
    """A checkpoint of PyTorch 1.6 or later."""
    entries = _read_directory(source)
    root = TorchUnpickler(io.BytesIO(_read_entry(entries["data.pkl"], source, MAX_PICKLE_BYTES)), {}).load()
    swapped = "byteorder" in entries and _read_entry(entries["byteorder"], source, 100) == b"big"
    views, left_out = find_tensors(root)
    storages = {name: _range_of(entry, source) for name, entry in _within("data/", entries).items()}
    tensors = _tensors(source, views, storages, swapped)
    notes = {
        name: _read_entry(entry, source, LONGEST_NOTE).decode(errors="replace")
        for name, entry in _within(NOTES, entries).items()
        if entry.file_size <= LONGEST_NOTE
    }
    return TensorFile(source.path, Container.TORCH_ZIP, tensors, find_notes(root) | notes, left_out)


def _within(folder: str, entries: Mapping[str, zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The entries in a folder, with a slash at its end, by their names there."""
    return {name.removeprefix(folder): entry for name, entry in entries.items() if name.startswith(folder)}


def _read_directory(source: FileRange) -> dict[str, zipfile.ZipInfo]:
    """The entries of an archive by their names in the folder that PyTorch puts all into; nothing is unpacked."""
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
    folders = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise FormatError("it is a zip archive, but not one that PyTorch wrote")
    if f"{folders[0]}constants.pkl" in entries:
        raise FormatError("it is a TorchScript program, not weights; save its state_dict in PyTorch")
    return _within(folders[0], entries)


def _range_of(entry: zipfile.ZipInfo, source: FileRange) -> FileRange:
    """Where the content of an archive's entry is, which may be as it is, or compressed by deflation."""
    name, header = quoted(entry.filename), source.part(entry.header_offset, _LOCAL_HEADER.size).read()
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04" or entry.flag_bits & _ENCRYPTED:
        raise FormatError(f"{name} is damaged or encrypted")
    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    content = source.part(start, entry.compress_size)
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        return DeflatedRange(source.path, 0, entry.file_size, source.identity, entry, start)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise FormatError(f"{name} is damaged, or compressed in a way that cannot be read")
    return content


def _read_entry(entry: zipfile.ZipInfo, source: FileRange, at_most: int) -> bytes:
    """The content of a small entry."""
    if entry.file_size > at_most:
        raise FormatError(f"{quoted(entry.filename)} has {entry.file_size} bytes; at most {at_most} are read")
    return _range_of(entry, source).read()


class _BoundedReads(io.BufferedReader):
    """A file that gives no more than a directory's size at a time, whatever an archive says about itself."""

    def read(self, count: int | None = -1) -> bytes:
        bounded = _MAX_DIRECTORY_BYTES if count is None or count < 0 else count
        if bounded > _MAX_DIRECTORY_BYTES:
            raise FormatError("damaged: its directory would be larger than that of any weights")
        return super().read(bounded)


def read_torch_legacy(source: FileRange) -> TensorFile:
    """A checkpoint of a PyTorch before 1.6."""
    pickles, noted = io.BytesIO(source.part(0, min(source.size, MAX_PICKLE_BYTES)).read()), dict[str, Storage]()
    magic, _, system, root, keys = [TorchUnpickler(pickles, noted).load() for _ in range(5)]
    if magic != LEGACY_MAGIC or not isinstance(system, dict) or not isinstance(keys, list):
        raise FormatError("its first pickles are not those of PyTorch")
    views, left_out = find_tensors(root)
    storages = _legacy_ranges(source, pickles.tell(), keys, noted)
    tensors = _tensors(source, views, storages, swapped=system.get("little_endian") is False)
    return TensorFile(source.path, Container.TORCH_LEGACY, tensors, find_notes(root), left_out)


def _legacy_ranges(
    source: FileRange, position: int, keys: list[Any], storages: Mapping[str, Storage]
) -> dict[str, FileRange]:
    """Where each storage is, in the order in which they follow the pickles."""
    ranges: dict[str, FileRange] = {}
    for key in keys:
        if type(key) is not str or key not in storages or key in ranges:
            raise FormatError("its list of storages is damaged")
        if int.from_bytes(source.part(position, _LENGTH_BYTES).read(), "little") != storages[key].count:
            raise FormatError(f"the storage {quoted(key)} is damaged: its length is not the one that was said")
        ranges[key] = source.part(position + _LENGTH_BYTES, storages[key].byte_count)
        position += _LENGTH_BYTES + ranges[key].size
    return ranges


def _tensors(
    source: FileRange, views: Mapping[str, View], storages: Mapping[str, FileRange], swapped: bool
) -> dict[str, StoredTensor]:
    """The tensors of a file, whose storages stand in it by their keys."""
    check_names(list(views))
    tensors, to_read = {}, 0
    for name, view in views.items():
        storage = storages.get(view.storage.key)
        if storage is None or storage.size < view.storage.byte_count:
            raise FormatError(f"cut short, or damaged: values of {quoted(name)} are missing")
        tensors[name] = _stored(name, view, storage, swapped, source.size)
        # What is compressed is inflated from its beginning.
        before = 0 if isinstance(storage, DeflatedRange) else view.offset
        to_read += (view.reach - before) * view.storage.itemsize
    if to_read > _MOST_READ * source.size + _ALWAYS_READ:
        raise FormatError("too many of its tensors share their values")
    return tensors


def _stored(name: str, view: View, storage: FileRange, swapped: bool, file_size: int) -> StoredTensor:
    """A view as a tensor, if its storage is large enough."""
    if view.dtype is None:
        raise FormatError(f"{quoted(name)} has a type that cannot be read, such as complex or quantised numbers")
    if view.reach * view.dtype.itemsize > view.storage.byte_count:
        raise FormatError(f"cut short, or damaged: the values of {quoted(name)} reach beyond their storage")
    values = storage.part(view.offset * view.dtype.itemsize, (view.reach - view.offset) * view.dtype.itemsize)
    if view.is_contiguous and not swapped and not isinstance(values, DeflatedRange):
        tensor = StoredTensor.in_files(view.shape, view.dtype, values)
    else:
        tensor = StoredTensor(view.shape, view.dtype, partial(_read_view, view, view.dtype, values, swapped))
    if tensor.byte_count > max(storage.size, file_size, _SMALL):
        raise FormatError(f"{quoted(name)} is larger than the file, as a repetition of few values")
    return tensor


def _read_view(view: View, dtype: DType, values: FileRange, swapped: bool) -> np.ndarray:
    """The values of a view, in row-major order, out of all from its first to its last."""
    read = read_values([values], dtype, view.shape if view.is_contiguous else (view.reach - view.offset,))
    if not view.is_contiguous:
        # A step along an axis of one leads nowhere, and may be too large for numpy.
        steps = zip(view.shape, view.strides, strict=True)
        strides = [stride * dtype.itemsize if length > 1 else 0 for length, stride in steps]
        read = np.lib.stride_tricks.as_strided(read, view.shape, strides).copy()
    return read.byteswap() if swapped else read

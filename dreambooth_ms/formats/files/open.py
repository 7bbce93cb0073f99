"""Files of tensors, opened by content and never by name, a sharded model as one file; and as arrays in memory."""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.format_error import FormatError, quoted, seems_to_be
from dreambooth_ms.formats.files.mindspore_ckpt import begins_like_a_checkpoint, read_mindspore_ckpt
from dreambooth_ms.formats.files.safetensors_file import WEIGHT_MAP, json_object, read_safetensors, write_safetensors
from dreambooth_ms.formats.files.stored import Container, FileRange, StoredTensor, TensorFile, check_names, reading
from dreambooth_ms.formats.files.torch_file import LEGACY_MAGIC, read_torch_legacy, read_torch_zip
from dreambooth_ms.formats.files.torch_writing import write_torch

# Protocol, the length of the pickle from protocol 4 on, the number's length, the number.
_LEGACY_HEAD = re.compile(
    rb"\x80[\x02-\x05](?:\x95.{8})?\x8a\x0a" + re.escape(LEGACY_MAGIC.to_bytes(10, "little")), re.DOTALL
)
_LONGEST_HEADER = 1 << 40
"""Of safetensors; text read as a number is larger."""


def recognise(path: Path) -> Container:
    """The kind of a file or folder; WeightError if there is none, or its content is of no kind that holds tensors: says
    what it seems to be."""
    # Of os.path, because that of pathlib raises on names that are too long.
    if os.path.isdir(path):
        return Container.FOLDER
    with reading(path, "weight file") as source:
        head = source.part(0, min(source.size, 4096)).read()
        if head.startswith(b"PK\x03\x04"):
            return Container.TORCH_ZIP
        if _LEGACY_HEAD.match(head):
            return Container.TORCH_LEGACY
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_HEADER:
            return Container.SAFETENSORS
        if begins_like_a_checkpoint(head):
            return Container.MINDSPORE
        if head.lstrip()[:1] == b"{":
            if WEIGHT_MAP in json_object(source):
                return Container.SHARDED
            raise FormatError(f"it is JSON, and not the index of a sharded model, which has a {WEIGHT_MAP}")
        raise FormatError(seems_to_be(head) or "it is none of the kinds that are known")


def open_tensor_file(path: Path, container: Container | None = None) -> TensorFile:
    """Open a file as one of a kind, or as what its content says; no tensor is read. WeightError if it is not there, a
    folder, damaged, or of another kind or none that holds tensors."""
    container = container or recognise(path)
    if container is Container.FOLDER:
        raise WeightError(f"{path}: a folder; name a file in it, or the index of a sharded model")
    with reading(path, container.value) as source:
        return _READERS[container](source)


def _read_sharded(source: FileRange) -> TensorFile:
    """All the files that an index names. Every tensor must be in the file that the index says, and in no other."""
    places = _checked_places(json_object(source).get(WEIGHT_MAP))
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    held: dict[str, str] = {}
    for shard in sorted(set(places.values())):
        file = _read_shard(source.path, shard)
        for name in file.tensors.keys() & held.keys():
            raise FormatError(f"{quoted(name)} is both in {held[name]} and in {shard}")
        held |= dict.fromkeys(file.tensors, shard)
        tensors |= file.tensors
        metadata |= file.metadata
    for name in places.keys() | held.keys():
        said, found = places.get(name, "no file"), held.get(name, "no file")
        if said != found:
            raise FormatError(f"it says that {quoted(name)} is in {said}, but it is in {found}")
    return TensorFile(source.path, Container.SHARDED, tensors, metadata)


def _checked_places(weight_map: Any) -> dict[str, str]:
    """Name of every tensor -> name of its file, which must be in the index's own folder."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"it has no {WEIGHT_MAP}")
    check_names(list(weight_map))
    places = {name: str(shard) for name, shard in weight_map.items()}
    for shard in set(places.values()):
        if shard in ("", ".", "..") or any(forbidden in shard for forbidden in "/\\\0:"):
            raise FormatError(f"{quoted(shard)} is not the name of a file beside it")
    return places


def _read_shard(index: Path, name: str) -> TensorFile:
    path = index.with_name(name)
    # Of os.path, because that of pathlib raises on names that are too long.
    if not os.path.isfile(path):
        raise WeightError(f"{index.parent}: {name} is missing, which {index.name} names; is the download complete?")
    container = recognise(path)
    if container in (Container.MINDSPORE, Container.SHARDED):
        found = f"{index.name} names it as a part, but it is a {container.value}"
        raise WeightError(f"{path}: {found}; download both again")
    return open_tensor_file(path, container)


_READERS: Mapping[Container, Callable[[FileRange], TensorFile]] = {
    Container.SAFETENSORS: read_safetensors,
    Container.TORCH_ZIP: read_torch_zip,
    Container.TORCH_LEGACY: read_torch_legacy,
    Container.MINDSPORE: read_mindspore_ckpt,
    Container.SHARDED: _read_sharded,
}
"""A reader opens a file of a kind, and raises a FormatError where it is cut short, damaged or of another kind."""


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file, as `read_value`, and its metadata; WeightError if it is none, or cut short."""
    file = open_tensor_file(path, Container.SAFETENSORS)
    return {name: read_value(tensor) for name, tensor in file.tensors.items()}, dict(file.metadata)


def read_value(tensor: StoredTensor) -> np.ndarray:
    """A tensor as an array, in its own dtype, but bfloat16 as float32."""
    return (tensor.cast_to(DType.F32) if tensor.dtype is DType.BF16 else tensor).read()


def read_metadata(path: Path) -> dict[str, str]:
    """A file's metadata, without reading its tensors; empty if it cannot be read."""
    with suppress(WeightError):
        return dict(open_tensor_file(path).metadata)
    return {}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as `write_safetensors`, each in its dtype; `format: pt` lets other tools read the file."""
    stored = {name: StoredTensor.of(values) for name, values in tensors.items()}
    write_safetensors(path, stored, {"format": "pt", **(metadata or {})})


def write_as_named(path: Path, tensors: Mapping[str, StoredTensor | None], metadata: Mapping[str, str]) -> None:
    """Write a file atomically: .bin as PyTorch's, else safetensors, where None has no place."""
    if path.suffix == ".bin":
        write_torch(path, tensors, metadata)
    else:
        write_safetensors(path, {name: one for name, one in tensors.items() if one}, {**metadata, "format": "pt"})

"""Opening a file of tensors, whatever it is; of a sharded model all its files, by way of its index."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.byte_ranges import reading
from dreambooth_ms.formats.files.format_error import FormatError, quoted
from dreambooth_ms.formats.files.mindspore_ckpt import read_mindspore_ckpt
from dreambooth_ms.formats.files.recognise import WEIGHT_MAP, recognise
from dreambooth_ms.formats.files.safetensors_file import read_safetensors
from dreambooth_ms.formats.files.stored import Container, TensorFile, check_names
from dreambooth_ms.formats.files.strict_json import read_json_object
from dreambooth_ms.formats.files.torch_file import read_torch_legacy, read_torch_zip


def open_tensor_file(path: Path) -> TensorFile:
    """Recognise a file by its content and open it; no tensor is read.

    Raises:
        WeightError: no such file, a folder, damaged, or of no kind that holds tensors.
    """
    container = recognise(path)
    if container is Container.FOLDER:
        raise WeightError(f"{path}: a folder; name a file in it, or the index of a sharded model")
    return _READERS[container](path)


def read_sharded(path: Path) -> TensorFile:
    """Open all the files that an index names.

    Every tensor must be in the file that the index says, and in no other.

    Raises:
        WeightError: a file is missing or damaged, or does not hold what the index says.
    """
    with reading(path, Container.SHARDED.value) as source:
        places = _checked_places(read_json_object(source).get(WEIGHT_MAP))
        shards = {name: _read_shard(path, name) for name in sorted(set(places.values()))}
        _check_that_the_index_is_right(places, shards)
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.tensors.items()}
    metadata = {name: value for shard in shards.values() for name, value in shard.metadata.items()}
    return TensorFile(path, Container.SHARDED, tensors, metadata)


def _checked_places(weight_map: Any) -> dict[str, str]:
    """Name of every tensor -> name of its file, which must be in the index's own folder."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"it has no {WEIGHT_MAP}")
    check_names(list(weight_map))
    for shard in set(map(str, weight_map.values())):
        if shard in ("", ".", "..") or any(forbidden in shard for forbidden in "/\\\0:"):
            raise FormatError(f"{quoted(shard)} is not the name of a file beside it")
    return {name: str(shard) for name, shard in weight_map.items()}


def _read_shard(index: Path, name: str) -> TensorFile:
    path = index.with_name(name)
    # Of os.path, because that of pathlib raises on names that are too long.
    if not os.path.isfile(path):
        raise WeightError(f"{index.parent}: {name} is missing, which {index.name} names; is the download complete?")
    container = recognise(path)
    if container in (Container.MINDSPORE, Container.SHARDED):
        raise WeightError(
            f"{path}: {index.name} names it as a part, but it is a {container.value}; download both again"
        )
    return _READERS[container](path)


def _check_that_the_index_is_right(places: Mapping[str, str], shards: Mapping[str, TensorFile]) -> None:
    held: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file.tensors:
            if name in held:
                raise FormatError(f"{quoted(name)} is both in {held[name]} and in {shard}")
            held[name] = shard
    if held != places:
        wrong = next(name for name in places.keys() | held.keys() if places.get(name) != held.get(name))
        raise FormatError(
            f"it says that {quoted(wrong)} is in {places.get(wrong, 'no file')}, but it is in "
            f"{held.get(wrong, 'no file')}"
        )


_READERS: Mapping[Container, Callable[[Path], TensorFile]] = {
    Container.SAFETENSORS: read_safetensors,
    Container.TORCH_ZIP: read_torch_zip,
    Container.TORCH_LEGACY: read_torch_legacy,
    Container.MINDSPORE: read_mindspore_ckpt,
    Container.SHARDED: read_sharded,
}

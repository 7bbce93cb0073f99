"""A model in several files, and the index that says which tensor is in which: `<stem>.safetensors.index.json`."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreambooth_ms.atomic import TEMPORARY_PREFIX, check_room, sync, write_bytes
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.byte_ranges import SourceFile
from dreambooth_ms.formats.files.format_error import FormatError, quoted, reading
from dreambooth_ms.formats.files.recognise import WEIGHT_MAP, recognise
from dreambooth_ms.formats.files.safetensors_file import read_safetensors, write_safetensors
from dreambooth_ms.formats.files.stored import Container, Progress, StoredTensor, TensorFile, check_names, total_bytes
from dreambooth_ms.formats.files.strict_json import read_json_object
from dreambooth_ms.formats.files.torch_file import read_torch_legacy, read_torch_zip

MAX_SHARD_BYTES = 10 * 10**9
"""diffusers' own."""

_SHARD_READERS: Mapping[Container, Callable[[Path], TensorFile]] = {
    Container.SAFETENSORS: read_safetensors,
    Container.TORCH_ZIP: read_torch_zip,
    Container.TORCH_LEGACY: read_torch_legacy,
}


def read_sharded(path: Path) -> TensorFile:
    """Open all the files that an index names.

    Every tensor must be in the file that the index says, and in no other.

    Raises:
        WeightError: a file is missing or damaged, or does not hold what the index says.
    """
    with reading(path, Container.SHARDED.value):
        places = _checked_places(read_json_object(SourceFile.at(path)).get(WEIGHT_MAP))
    shards = {name: _read_shard(path, name) for name in sorted(set(places.values()))}
    with reading(path, Container.SHARDED.value):
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
    if container not in _SHARD_READERS:
        raise WeightError(
            f"{path}: {index.name} names it as a part, but it is a {container.value}; download both again"
        )
    return _SHARD_READERS[container](path)


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


def write_sharded_safetensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str] | None = None,
    variant: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write tensors as diffusers does it: one file if they fit, otherwise several and an index.

    All files are whole before the first takes its name, and the index comes last; so an index never names a file
    that is not there.

    Args:
        folder: where they go.
        stem: `diffusion_pytorch_model` or `model`.
        tensors: what to write, in this order.
        metadata: goes into each file.
        variant: becomes part of the names, as in `diffusion_pytorch_model.fp16.safetensors`.
        max_shard_bytes: values per file; a tensor that is larger has a file of its own.
        progress: told the bytes that are written.

    Returns:
        The file, or the index and the files.

    Raises:
        WeightError: the disk lacks room, the folder cannot be written to, or a tensor cannot be read.
    """
    dotted = f".{variant}" if variant else ""
    parts = list(_parts(tensors, max_shard_bytes))
    if len(parts) == 1:
        path = folder / f"{stem}{dotted}.safetensors"
        write_safetensors(path, tensors, metadata, progress)
        return [path]
    index = folder / f"{stem}.safetensors.index{dotted}.json"
    names = [f"{stem}{dotted}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    places = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    content = {"metadata": {"total_size": total_bytes(tensors)}, WEIGHT_MAP: places}
    check_room(index, total_bytes(tensors))
    with _whole_files(folder, [*names, index.name]) as partial:
        for file, part in zip(names, parts, strict=True):
            write_safetensors(partial / file, part, metadata, progress)
        write_bytes(partial / index.name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    return [index, *(folder / name for name in names)]


def _parts(tensors: Mapping[str, StoredTensor], max_bytes: int) -> Iterator[dict[str, StoredTensor]]:
    """Cut into runs of at most so many bytes; at least one run, and none is empty if there is a tensor."""
    part: dict[str, StoredTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.byte_count > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.byte_count
    yield part


@contextmanager
def _whole_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder to write files into, which then take their names in `folder` one after the other.

    An older file with the last of the names is removed before that, so that it never stands beside newer ones.
    """
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder))
        yield partial
        (folder / names[-1]).unlink(missing_ok=True)
        for name in names:
            (partial / name).replace(folder / name)
        sync(folder)
    except OSError as error:
        raise WeightError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)

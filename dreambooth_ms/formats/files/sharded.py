"""Writing a model in several files, and the index of which tensor is in which: `<stem>.safetensors.index.json`."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from dreambooth_ms.atomic import TEMPORARY_PREFIX, check_room, sync, write_bytes
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.open import WEIGHT_MAP
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import Progress, StoredTensor, total_bytes

MAX_SHARD_BYTES = 10 * 10**9
"""diffusers' own."""


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder, ignore_cleanup_errors=True) as partial:
            for file, part in zip(names, parts, strict=True):
                write_safetensors(Path(partial, file), part, metadata, progress)
            write_bytes(Path(partial, index.name), (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
            index.unlink(missing_ok=True)  # An older index never stands beside newer files.
            for file in (*names, index.name):
                Path(partial, file).replace(folder / file)
            sync(folder)
    except OSError as error:
        raise WeightError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
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

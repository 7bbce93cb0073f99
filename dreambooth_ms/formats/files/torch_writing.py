"""PyTorch checkpoints as version 1.6 and later write them, without PyTorch; torch.load(weights_only=True) reads them.

A zip archive: `archive/data.pkl` describes the tensors, `archive/data/<n>` are their values. The pickle is put together
from its operations, since Python's pickler would import what it names.
"""

import pickle
from collections.abc import Mapping
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import ZipFile, ZipInfo

from dreambooth_ms.atomic import atomic_path
from dreambooth_ms.formats.files.stored import StoredTensor, total_bytes

Content: TypeAlias = Mapping[str, "StoredTensor | Content"]
"""What a file holds by name: tensors, and dictionaries of these."""

NOTES, LONGEST_NOTE = "extra/", 1000
"""Where text stands beside the tensors, in which PyTorch does not look; and how many bytes of it are read."""

_REBUILD, _NO_HOOKS = b"ctorch._utils\n_rebuild_tensor_v2\n", b"\x89ccollections\nOrderedDict\n)R"


def write_torch(path: Path, content: Content, notes: Mapping[str, str] | None = None) -> None:
    """Write a file atomically; one tensor at a time is in memory.

    Raises:
        WeightError: the disk lacks room, the folder cannot be written to, or a tensor cannot be read.
    """
    storages: dict[str, StoredTensor] = {}
    described = b"\x80\x02" + _operations(content, storages) + b"."
    texts = {f"{NOTES}{name}": text.encode() for name, text in (notes or {}).items()}
    with atomic_path(path, total_bytes(storages)) as partial, ZipFile(partial, "w") as archive:
        for name, value in ({"data.pkl": described, "byteorder": b"little", "version": b"3\n"} | texts).items():
            archive.writestr(ZipInfo(f"archive/{name}"), value)
        for key, tensor in storages.items():
            entry = ZipInfo(f"archive/data/{key}")
            entry.file_size = tensor.byte_count
            with archive.open(entry, "w") as file:
                tensor.write_to(file)


def _operations(value: StoredTensor | Content, storages: dict[str, StoredTensor]) -> bytes:
    """What puts a value onto the machine's stack; `storages` takes the tensors, by their keys."""
    if isinstance(value, Mapping):
        items = (_plain(name) + _operations(own, storages) for name, own in value.items())
        return b"}(" + b"".join(items) + b"u"
    assert value.dtype.storage, f"PyTorch's files have no storage of {value.dtype.value}"
    key, steps = str(len(storages)), accumulate(reversed(value.shape[1:]), mul, initial=1)
    storages[key] = value
    kind = f"ctorch\n{value.dtype.storage}\n".encode()
    count = value.byte_count // value.dtype.itemsize
    storage = b"(" + _plain("storage") + kind + _plain(key) + _plain("cpu") + _plain(count) + b"tQ"
    strides = tuple(steps)[::-1] if value.shape else ()
    return _REBUILD + b"(" + storage + b"".join(map(_plain, (0, value.shape, strides))) + _NO_HOOKS + b"tR"


def _plain(value: Any) -> bytes:
    """The operations of a text, a number or a tuple of these."""
    return pickle.dumps(value, 2)[2:-1]

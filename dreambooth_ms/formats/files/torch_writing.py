"""PyTorch checkpoints as version 1.6 and later write them, without PyTorch; torch.load(weights_only=True) reads them.

In a zip archive `data.pkl` describes the tensors, and `data/<n>` are their values. The pickle is put together from its
operations, since Python's pickler would import what it names.
"""

import pickle
from collections.abc import Mapping
from itertools import accumulate
from operator import mul
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from dreambooth_ms.atomic import atomic_path
from dreambooth_ms.formats.files.stored import StoredTensor

NOTES, LONGEST_NOTE = "extra/", 1000
"""Where text stands beside the tensors, in which PyTorch does not look; and how many bytes of it are read."""


def write_torch(path: Path, tensors: Mapping[str, StoredTensor | None], notes: Mapping[str, str]) -> None:
    """Write a file as `write_safetensors` does, atomically and tensor by tensor. None becomes an empty dictionary."""
    stored = {str(number): tensor for number, tensor in enumerate(tensors.values()) if tensor}
    items = (_plain(name) + (_view(str(n), own) if own else b"}") for n, (name, own) in enumerate(tensors.items()))
    texts = {"data.pkl": b"\x80\x02}(" + b"".join(items) + b"u.", "byteorder": b"little", "version": b"3\n"}
    texts |= {f"{NOTES}{name}": text.encode() for name, text in notes.items()}
    with atomic_path(path, sum(one.byte_count for one in stored.values())) as partial, ZipFile(partial, "w") as archive:
        for name, text in texts.items():
            archive.writestr(ZipInfo(f"archive/{name}"), text)
        for key, tensor in stored.items():
            entry = ZipInfo(f"archive/data/{key}")
            entry.file_size = tensor.byte_count
            with archive.open(entry, "w") as file:
                tensor.write_to(file)


def _view(key: str, tensor: StoredTensor) -> bytes:
    """The call that makes a tensor of the storage with this key."""
    kind, count = f"ctorch\n{tensor.dtype.storage}\n".encode(), tensor.byte_count // tensor.dtype.itemsize
    strides = tuple(accumulate(reversed(tensor.shape[1:]), mul, initial=1))[::-1] if tensor.shape else ()
    storage = b"(" + _plain("storage") + kind + b"".join(map(_plain, (key, "cpu", count))) + b"tQ"
    arguments = storage + b"".join(map(_plain, (0, tensor.shape, strides, False))) + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _plain(value: object) -> bytes:
    """The operations of a text, a number or a tuple of these."""
    return pickle.dumps(value, 2)[2:-1]

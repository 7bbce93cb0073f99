"""Digests of files and tensors: what caches and checkpoints are keyed and checked by."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dreambooth_ms.formats.files.stored import StoredTensor, raw_bytes


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, in hexadecimal; whatever file they are in.

    Raises:
        WeightError: a tensor cannot be read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype.value} {tensor.shape}\n".encode())
        digest.update(raw_bytes(tensor.read()))
    return digest.hexdigest()

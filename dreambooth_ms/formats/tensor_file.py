"""safetensors files as arrays in memory: read with a clear error, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import Container, StoredTensor

STEP_KEY = "dreambooth_ms_step"
"""In the metadata of what a run writes: the optimiser steps it was trained for."""


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a file and its metadata. Each has its own dtype, but bfloat16, which becomes float32.

    Raises:
        WeightError: the file is missing, cut short, or not a safetensors file.
    """
    file = open_tensor_file(path, Container.SAFETENSORS)
    return {name: read_value(tensor) for name, tensor in file.tensors.items()}, dict(file.metadata)


def read_value(tensor: StoredTensor) -> np.ndarray:
    """A tensor as an array, in its own dtype, but bfloat16 as float32."""
    return (tensor.cast_to(DType.F32) if tensor.dtype is DType.BF16 else tensor).read()


def read_metadata(path: Path) -> dict[str, str]:
    """A file's metadata, without reading its tensors; empty if it cannot be read."""
    try:
        return dict(open_tensor_file(path, Container.SAFETENSORS).metadata)
    except WeightError:
        return {}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file atomically. The tensors keep their dtype; `format: pt` lets other tools read the file.

    Raises:
        WeightError: the folder cannot be written to, or the disk is full.
    """
    stored = {name: StoredTensor.of(values) for name, values in tensors.items()}
    write_safetensors(path, stored, {"format": "pt", **(metadata or {})})

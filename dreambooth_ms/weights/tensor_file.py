"""safetensors files: read with a clear error, written whole or not at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dreambooth_ms.errors import WeightError
from dreambooth_ms.weights.atomic import atomic_path

STEP_KEY = "dreambooth_ms_step"
"""In the metadata of what a run leaves: the optimiser steps it was trained for."""


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a file, in their own dtype, and its metadata.

    Raises:
        WeightError: the file is missing, cut short, or not a safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def check_tensor_file(path: Path) -> None:
    """Whether a file is there, whole and a safetensors file, without reading its tensors.

    Raises:
        WeightError: it is not.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError as error:
        raise WeightError(f"{path}: no such file; check the path") from error
    except (SafetensorError, OSError, TypeError) as error:
        raise WeightError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """A file's metadata, without reading its tensors; empty if it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file atomically. The tensors keep their dtype; `format: pt` lets other tools read the file.

    Raises:
        WeightError: the folder cannot be written to, or the disk is full.
    """
    # Not ascontiguousarray: that would give a scalar an axis.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with atomic_path(path) as partial:
        try:
            save_file(contiguous, partial, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(None, str(error)) from error

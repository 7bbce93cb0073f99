"""The vectors of new words in files: one file for each word."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import write_as_named
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.models.specs import Words

OF_SEVERAL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""What the vectors of SDXL's text encoders are called in a file of both, as kohya's scripts and other programs do."""


def word_file(folder: Path, word: str, suffix: str = ".safetensors") -> Path:
    """Where a word's vectors are written.

    Raises:
        WeightError: no file can have the word's name.
    """
    if "/" in word or "\0" in word:
        raise WeightError(f"{word!r}: no file can have the name of this word; take words without a slash")
    return folder / f"{word}{suffix}"


def write_words(
    words: Words, folder: Path, dtype: DType, metadata: Mapping[str, str], suffix: str = ".safetensors"
) -> None:
    """Write a file for each word."""
    for word, vectors in words.items():
        write_word(word_file(folder, word, suffix), word, vectors, dtype, metadata)


def write_word(
    path: Path, word: str, vectors: Mapping[str, np.ndarray], dtype: DType, metadata: Mapping[str, str]
) -> None:
    """Write a word's vectors of each text encoder: of one by the word, of several by the encoders' names.

    A single vector stands as (D,), as diffusers' Custom Diffusion writes it.
    """
    names = OF_SEVERAL if len(vectors) > 1 else dict.fromkeys(vectors, word)
    flat = len(vectors) == 1 and all(len(rows) == 1 for rows in vectors.values())
    named = {names[encoder]: rows[0] if flat else rows for encoder, rows in vectors.items()}
    tensors = {name: StoredTensor.of(rows, label=f"{path}: {name}").cast_to(dtype) for name, rows in named.items()}
    write_as_named(path, tensors, metadata)

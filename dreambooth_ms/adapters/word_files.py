"""The vectors of new words in files: one file for each word."""

from collections.abc import Mapping
from pathlib import Path

from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.models.specs import Words

OF_SEVERAL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""What the vectors of SDXL's text encoders are called in a file of both, as kohya's scripts and other programs do."""


def word_file(folder: Path, word: str) -> Path:
    """Where a word's vectors are written."""
    return folder / f"{word}.safetensors"


def write_words(words: Words, folder: Path, dtype: DType, metadata: Mapping[str, str]) -> None:
    """Write a file for each word: of one text encoder the vectors by the word, of several by the encoders' names.

    A single vector stands as (D,), as diffusers' Custom Diffusion writes it.
    """
    for word, vectors in words.items():
        path = word_file(folder, word)
        names = OF_SEVERAL if len(vectors) > 1 else dict.fromkeys(vectors, word)
        flat = len(vectors) == 1 and all(len(rows) == 1 for rows in vectors.values())
        named = {names[encoder]: rows[0] if flat else rows for encoder, rows in vectors.items()}
        tensors = {name: StoredTensor.of(rows, label=f"{path}: {name}").cast_to(dtype) for name, rows in named.items()}
        write_safetensors(path, tensors, {"format": "pt", **metadata})

"""The vectors of new words in files: written one file for each word, and read from those of any program."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import read_value, write_as_named
from dreambooth_ms.formats.files.stored import StoredTensor, TensorFile
from dreambooth_ms.formats.naming.lora_formats import PARTS
from dreambooth_ms.formats.naming.recognise import word_in
from dreambooth_ms.models.specs import PUBLISHED_MODELS, ClipTextSpec, ModelSpec, Words

OF_SEVERAL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""What the vectors of SDXL's text encoders are called in a file of both, as kohya's scripts and other programs do."""


def word_file(folder: Path, word: str, suffix: str = ".safetensors") -> Path:
    """Where a word's vectors are written; WeightError if no file can have its name."""
    if "/" in word or "\0" in word:
        raise WeightError(f"{word!r}: no file can have the name of this word; take words without a slash")
    return folder / f"{word}{suffix}"


def write_words(
    words: Words, folder: Path, dtype: DType, metadata: Mapping[str, str], suffix: str = ".safetensors"
) -> None:
    """Write a file for each word: of one text encoder the vectors by the word, of several by the encoders' names. A
    single vector stands as (D,), as diffusers' Custom Diffusion writes it."""
    for word, vectors in words.items():
        path = word_file(folder, word, suffix)
        names = OF_SEVERAL if len(vectors) > 1 else dict.fromkeys(vectors, word)
        flat = len(vectors) == 1 and all(len(rows) == 1 for rows in vectors.values())
        named = {names[encoder]: rows[0] if flat else rows for encoder, rows in vectors.items()}
        tensors = {name: StoredTensor.of(rows, label=f"{path}: {name}").cast_to(dtype) for name, rows in named.items()}
        write_as_named(path, tensors, metadata)


def read_words(file: TensorFile) -> dict[str, list[np.ndarray]]:
    """The words of a file, each with its vectors (n, D) for one text encoder after the other, bfloat16 as float32;
    WeightError if something else stands for a word."""
    found: dict[str, list[np.ndarray]] = {}
    for name in sorted(file.tensors, key=lambda name: (name == OF_SEVERAL["text_encoder_2"], name)):
        word, tensor, shape = word_in(name, file.path.stem), file.tensors[name], file.tensors[name].shape
        if word is None or name.startswith("string_to_token."):
            continue
        if len(shape) not in (1, 2) or 0 in shape or not tensor.dtype.is_float:
            it_is = f"{tensor.dtype.value} of shape {shape}"
            raise WeightError(f"{file.path}: {name} is {it_is}, no vectors of a word: (width,) or (tokens, width)")
        rows = read_value(tensor).reshape(-1, shape[-1])
        counted = {f"<new{number}>": [row[None]] for number, row in enumerate(rows, 1)}
        found |= counted if word == "embed" else {word: [*found.get(word, []), rows]}
    return found


def joined_words(adapters: Mapping[str, Adapter]) -> Words:
    """The words of adapters, by the files or folders that these are from; WeightError if one has several meanings."""
    words = dict[str, Mapping[str, np.ndarray]]()
    for path, adapter in adapters.items():
        for word, own in adapter.words.items():
            if any(not np.array_equal(rows, own[name]) for name, rows in words.setdefault(word, own).items()):
                raise WeightError(f"{path}: {word} has other vectors here than in a file before it; leave one out")
    return words


def fitted_words(
    found: Mapping[str, Sequence[np.ndarray]], models: Sequence[ModelSpec], source: Path
) -> tuple[tuple[ModelSpec, ...], Words]:
    """The models whose text encoders are as wide as the vectors of words, and these by their text encoders; WeightError
    if there are none, or a word is of different numbers of tokens."""
    fitting = tuple(models)
    for word, own in found.items():
        widths = [rows.shape[1] for rows in own]
        fitting = tuple(model for model in fitting if [*_widths(model).values()] == widths)
        if not fitting or len(set(map(len, own))) > 1:
            has = " and ".join(f"{len(rows)} of width {rows.shape[1]}" for rows in own)
            of = next((f", for {m.family.value}" for m in PUBLISHED_MODELS if [*_widths(m).values()] == widths), "")
            sizes = dict.fromkeys(f"{' and '.join(map(str, _widths(m).values()))} ({m.family.value})" for m in models)
            expected = f"expected as many of width {' or '.join(sizes)}"
            raise WeightError(f"{source}: the vectors of {word} are {has}{of}; {expected}")
    return fitting, {word: dict(zip(_widths(fitting[0]), own, strict=True)) for word, own in found.items()}


def _widths(model: ModelSpec) -> dict[str, int]:
    towers = {name: getattr(model, name) for name in PARTS[1:]}
    return {name: own.transformer.hidden_size for name, own in towers.items() if isinstance(own, ClipTextSpec)}

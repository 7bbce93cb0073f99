"""CLIP's tokenizer from a folder in transformers' layout.

Shapes: N pieces of a prompt, S tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.clip_vocabulary import LENGTH, SIZE
from dreambooth_ms.formats.config_keys import KEYS, check_keys
from dreambooth_ms.formats.folder_layout import read_json
from dreambooth_ms.formats.model_config import read_config

UNMERGED_TOKENS = 2 * 256 + 2
"""Tokens of CLIP's vocabulary that no line of merges.txt makes: each byte, within a word and at its end; two marks."""


class ClipTokenizer:
    """Prompts -> the token ids that a text tower of CLIP reads, by transformers' CLIPTokenizerFast: its slow one splits
    Chinese and Japanese, and drops characters of no width, otherwise than CLIP was trained.

    Args:
        folder: `tokenizer.json`, or `vocab.json` and `merges.txt`, beside `tokenizer_config.json`.
        longest: tokens that the tower has positions for.
        vocab_size: tokens that it knows.

    Raises:
        WeightError: the files are no tokenizer of CLIP, or have more tokens.
    """

    def __init__(self, folder: Path, longest: int = LENGTH, vocab_size: int = SIZE) -> None:
        # transformers announces at import that there is no PyTorch; the tokenizers need none.
        from transformers import CLIPTokenizerFast
        from transformers.utils import logging

        logging.set_verbosity_error()
        try:
            self._tokenizer = CLIPTokenizerFast.from_pretrained(str(folder))
        except Exception as error:  # The library for tokenizers knows no other.
            raise WeightError(f"{folder}: no tokenizer of CLIP ({' '.join(str(error).split())})") from error
        if len(self._tokenizer) > vocab_size:
            raise WeightError(
                f"{folder}: {len(self._tokenizer)} tokens, its text encoder knows {vocab_size}; take both from a model"
            )
        told = self._tokenizer.model_max_length
        # Some say nothing, 10^30 or another tower's length.
        self.length: int = int(told) if 3 <= told < longest else longest
        """Tokens of a text, start and end included."""

    def lost(self, prompt: str) -> str | None:
        """What one text of full length leaves out of a prompt; None if it fits."""
        ids = self._ids(prompt)[self.length - 2 :]
        return self._tokenizer.decode(ids) if ids else None

    def num_pieces(self, prompt: str) -> int:
        """In how many pieces a prompt fits, each between a start and an end token."""
        return max(1, -(-len(self._ids(prompt)) // (self.length - 2)))

    def pieces(self, prompt: str, count: int) -> np.ndarray:
        """A prompt cut into texts of full length, one after the other: (N, S) int32; the last ones may be empty."""
        room, ids, own = self.length - 2, self._ids(prompt), self._tokenizer
        filler = own.eos_token_id if own.pad_token_id is None else own.pad_token_id
        rows = np.full((count, self.length), filler, np.int32)
        for row, first in zip(rows, range(0, count * room, room), strict=True):
            piece = [own.bos_token_id, *ids[first : first + room], own.eos_token_id]
            row[: len(piece)] = piece
        return rows

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False).input_ids
        return ids


def check_clip_tokenizer(folder: Path) -> None:
    """Whether the files are whole: with one cut short, transformers fails, or gives other tokens without a word.

    Raises:
        WeightError: a file is missing or cut short, or it is another kind of tokenizer.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name == "tokenizer_config.json" or (folder / name).exists():
            config = read_json(folder / name)
            known = {key: config[key] for key in KEYS["tokenizer"] if key in config}
            read_config(folder / name, known, lambda config: check_keys(config, "tokenizer"))
    file, vocabulary, made = _vocabulary(folder)
    if made < len(vocabulary) - UNMERGED_TOKENS:
        raise WeightError(f"{file}: cut short; download it again")


def _vocabulary(folder: Path) -> tuple[Path, dict[str, Any], int]:
    """The file that says how tokens are merged, all tokens, and how many merges there are."""
    if (file := folder / "tokenizer.json").exists():
        model = read_json(file).get("model")
        vocabulary, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        if not (isinstance(vocabulary, dict) and isinstance(merges, list)):
            raise WeightError(f"{file}: no tokenizer of CLIP; download it again")
        return file, vocabulary, len(merges)
    vocabulary, file = read_json(folder / "vocab.json"), folder / "merges.txt"
    try:
        merges = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightError(f"{file}: missing or not readable; is the download complete?") from error
    return file, vocabulary, sum(len(line.split()) == 2 and not line.startswith("#version") for line in merges)

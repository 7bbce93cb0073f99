"""CLIP's tokenizer from a folder in transformers' layout.

Shapes: N pieces of a prompt, S tokens.
"""

from pathlib import Path

import numpy as np

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.folder_layout import read_json

UNMERGED_TOKENS = 2 * 256 + 2
"""Tokens of CLIP's vocabulary that no line of merges.txt makes: each byte, within a word and at its end; two marks."""


class ClipTokenizer:
    """Prompts -> the token ids that a text tower of CLIP reads."""

    def __init__(self, folder: Path) -> None:
        # transformers announces at import that there is no PyTorch; the tokenizers need none.
        from transformers import CLIPTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        self._tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        self.length: int = self._tokenizer.model_max_length
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
        rows = np.full((count, self.length), own.pad_token_id, np.int32)
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
        WeightError: a file is missing or cut short.
    """
    vocabulary = read_json(folder / "vocab.json")
    read_json(folder / "tokenizer_config.json")
    if (folder / "special_tokens_map.json").exists():
        read_json(folder / "special_tokens_map.json")
    try:
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightError(f"{folder / 'merges.txt'}: missing or not readable; is the download complete?") from error
    made = sum(len(line.split()) == 2 and not line.startswith("#version") for line in merges)
    if made < len(vocabulary) - UNMERGED_TOKENS:
        raise WeightError(f"{folder / 'merges.txt'}: cut short; download it again")

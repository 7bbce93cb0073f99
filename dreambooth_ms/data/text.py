"""Prompts -> token ids -> what a UNet reads of them.

Shapes: B prompts, T tokenizers, S tokens, E text width, P width of pooled text.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreambooth_ms.data.conditioning import Conditioning, PromptText
from dreambooth_ms.models.clip import TextEncoders, end_positions


class PromptTokenizer:
    """The CLIP tokenizers of a model, one for each of its text encoders.

    Args:
        folders: a folder for each tokenizer, in transformers' layout.
        pooled_at: the token that ends a text of the last one, where its encoder's text is pooled; None: it is not.
    """

    def __init__(self, *folders: Path, pooled_at: int | None = None) -> None:
        # transformers announces at import that there is no PyTorch; the tokenizers need none.
        from transformers import CLIPTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        self._tokenizers = [CLIPTokenizer.from_pretrained(str(folder)) for folder in folders]
        self._pooled_at = pooled_at
        self.length: int = self._tokenizers[0].model_max_length

    def ids(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids (B, T * length) int32, those of each tokenizer side by side.

        A prompt that is too long is cut, and a warning says what was lost.
        """
        first = self._tokenizers[0]
        for prompt in prompts:
            tokens = first(prompt).input_ids
            if len(tokens) > self.length:
                lost = first.decode(tokens[self.length - 1 : -1])
                warnings.warn(f"prompt cut after {self.length} tokens; not used: {lost!r}", stacklevel=2)
        return np.concatenate(
            [
                tokenizer(
                    list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="np"
                ).input_ids.astype(np.int32)
                for tokenizer in self._tokenizers
            ],
            axis=1,
        )

    def texts(self, prompts: Sequence[str]) -> dict[str, PromptText]:
        """What text encoders take of each distinct prompt: ids, and where they end if its text is pooled."""
        distinct = sorted(set(prompts))
        return dict(zip(distinct, self._with_ends(self.ids(distinct)), strict=True))

    def num_pieces(self, prompts: Sequence[str]) -> int:
        """In how many pieces the longest of these prompts fits, each between a start and an end token."""
        longest = max(len(self._tokenizers[0](prompt, add_special_tokens=False).input_ids) for prompt in prompts)
        return max(1, -(-longest // (self.length - 2)))

    def pieces(self, prompt: str, count: int) -> list[PromptText]:
        """A prompt cut into `count` texts of full length, one after the other; the last ones may be empty."""
        room, by_tokenizer = self.length - 2, []
        for tokenizer in self._tokenizers:
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            rows = np.full((count, self.length), tokenizer.pad_token_id, np.int32)
            for row, first in zip(rows, range(0, count * room, room), strict=True):
                piece = [tokenizer.bos_token_id, *ids[first : first + room], tokenizer.eos_token_id]
                row[: len(piece)] = piece
            by_tokenizer.append(rows)
        return self._with_ends(np.concatenate(by_tokenizer, axis=1))

    def _with_ends(self, ids: np.ndarray) -> list[PromptText]:
        if self._pooled_at is None:
            return [PromptText(row) for row in ids]
        ends = end_positions(ids[:, -self.length :], self._pooled_at)
        return [PromptText(*rows) for rows in zip(ids, ends, strict=True)]


def encode_prompts(
    tokenizer: PromptTokenizer,
    text_encoders: TextEncoders,
    prompts: Sequence[str],
    batch_size: int | None = None,
    pieces: int = 1,
) -> dict[str, PromptText]:
    """What the UNet reads of each distinct prompt, float32, computed in batches of one fixed shape.

    Args:
        tokenizer: of the text encoders.
        text_encoders: the network.
        prompts: what to encode.
        batch_size: rows of a batch; None: 8, or as many as there are.
        pieces: how many texts of full length each prompt is cut into. Their embeddings stand one after the other,
            (pieces * S, E), and the pooled text is the first one's. One: what is too long is left out.
    """
    if pieces == 1:
        texts = {prompt: [text] for prompt, text in tokenizer.texts(prompts).items()}
    else:
        texts = {prompt: tokenizer.pieces(prompt, pieces) for prompt in sorted(set(prompts))}
    rows = [row for own in texts.values() for row in own]
    batch_size = batch_size or min(8, len(rows))
    found: list[PromptText] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        filler = [batch[-1]] * (batch_size - len(batch))
        encoded = [one.asnumpy() for one in text_encoders(*Conditioning.of([*batch, *filler]).tensors())]
        found += [PromptText(*row) for row in zip(*encoded, strict=True)][: len(batch)]
    joined = [_joined(found[first : first + pieces]) for first in range(0, len(found), pieces)]
    return dict(zip(texts, joined, strict=True))


def _joined(pieces: Sequence[PromptText]) -> PromptText:
    return PromptText(np.concatenate([piece.text for piece in pieces]), pieces[0].pooled)

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
        ids = self.ids(distinct)
        if self._pooled_at is None:
            return {prompt: PromptText(row) for prompt, row in zip(distinct, ids, strict=True)}
        ends = end_positions(ids[:, -self.length :], self._pooled_at)
        return {prompt: PromptText(*rows) for prompt, *rows in zip(distinct, ids, ends, strict=True)}


def encode_prompts(
    tokenizer: PromptTokenizer, text_encoders: TextEncoders, prompts: Sequence[str], batch_size: int = 8
) -> dict[str, PromptText]:
    """What the UNet reads of each distinct prompt, float32, computed in batches of one fixed shape."""
    texts = tokenizer.texts(prompts)
    distinct, rows = list(texts), list(texts.values())
    batch_size = min(batch_size, len(rows))
    found: list[PromptText] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        filler = [batch[-1]] * (batch_size - len(batch))
        encoded = [one.asnumpy() for one in text_encoders(*Conditioning.of([*batch, *filler]).tensors())]
        found += [PromptText(*row) for row in zip(*encoded, strict=True)][: len(batch)]
    return dict(zip(distinct, found, strict=True))

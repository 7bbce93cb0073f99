"""Prompts -> token ids -> text embeddings."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn


class PromptTokenizer:
    """The model folder's own CLIP tokenizer: prompts -> ids (B, 77) int32, padded and cut."""

    def __init__(self, folder: Path) -> None:
        # transformers announces at import that there is no PyTorch; the tokenizers need none.
        from transformers import CLIPTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        self._tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        self.length: int = self._tokenizer.model_max_length

    def ids(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids (B, length) int32; a prompt that is too long is cut, and a warning says what was lost."""
        for prompt in prompts:
            tokens = self._tokenizer(prompt).input_ids
            if len(tokens) > self.length:
                lost = self._tokenizer.decode(tokens[self.length - 1 : -1])
                warnings.warn(f"prompt cut after {self.length} tokens; not used: {lost!r}", stacklevel=2)
        encoded = self._tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="np"
        )
        return encoded.input_ids.astype(np.int32)


def encode_prompts(
    tokenizer: PromptTokenizer, text_encoder: nn.Cell, prompts: Sequence[str], batch_size: int = 8
) -> dict[str, np.ndarray]:
    """Text embeddings (S, E) float32 of each distinct prompt, in batches of one fixed shape."""
    distinct = sorted(set(prompts))
    ids = tokenizer.ids(distinct)
    batch_size = min(batch_size, len(distinct))
    embeddings: list[np.ndarray] = []
    for start in range(0, len(distinct), batch_size):
        rows = ids[start : start + batch_size]
        filler = np.repeat(rows[-1:], batch_size - len(rows), axis=0)
        hidden = text_encoder(Tensor(np.concatenate([rows, filler]), ms.int32)).asnumpy()
        embeddings.extend(hidden[: len(rows)])
    return dict(zip(distinct, embeddings, strict=True))

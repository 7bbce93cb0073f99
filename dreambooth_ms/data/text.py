"""Prompts -> token ids -> what a denoiser reads of them.

Shapes: B prompts, T tokenizers, S tokens, E text width, P width of pooled text.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dreambooth_ms.data.conditioning import Conditioning, PromptText
from dreambooth_ms.models.clip import end_positions
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.weights.bundle import ModelBundle
from dreambooth_ms.weights.roles import TextReader

ROWS = 8
"""Rows of a batch of text encoders, if there are as many."""


class PromptTokenizer:
    """The tokenizers of a model's text readers, all of one length. The last reader is the one that may pool."""

    def __init__(self, readers: Sequence[TextReader]) -> None:
        self._tokenizers = [reader.tokenizer() for reader in readers]
        self._pooled_at = readers[-1].pooled_at
        self.length: int = self._tokenizers[0].length

    def num_pieces(self, prompts: Iterable[str]) -> int:
        """In how many pieces of full length the longest of these prompts fits."""
        return max(self._tokenizers[0].num_pieces(prompt) for prompt in prompts)

    def ids(self, prompts: Sequence[str], pieces: int = 1) -> np.ndarray:
        """Token ids (B * pieces, T * length) int32, those of each tokenizer side by side.

        Each prompt becomes so many texts of full length; the last ones may be empty. A prompt that is too long for one
        is cut, and a warning says what was lost.
        """
        for prompt in prompts if pieces == 1 else ():
            lost = self._tokenizers[0].lost(prompt)
            if lost is not None:
                warnings.warn(f"prompt cut after {self.length} tokens; not used: {lost!r}", stacklevel=2)
        of_each = [[tokenizer.pieces(prompt, pieces) for prompt in prompts] for tokenizer in self._tokenizers]
        return np.concatenate([np.concatenate(own) for own in of_each], axis=1)

    def texts(self, prompts: Sequence[str], pieces: int = 1) -> list[PromptText]:
        """What text encoders take of prompts, one piece after the other: ids, and where they end if they are pooled."""
        ids = self.ids(prompts, pieces)
        if self._pooled_at is None:
            return [PromptText(row) for row in ids]
        ends = end_positions(ids[:, -self.length :], self._pooled_at)
        return [PromptText(*rows) for rows in zip(ids, ends, strict=True)]


def encode_prompts(
    tokenizer: PromptTokenizer,
    text_encoders: TextEncoders,
    prompts: Iterable[str],
    batch_size: int | None = None,
    pieces: int = 1,
    zeros_for_empty: bool = False,
) -> dict[str, PromptText]:
    """What the denoiser reads of each distinct prompt, float32, computed in batches of one fixed shape.

    Args:
        tokenizer: of the text encoders.
        text_encoders: the network.
        prompts: what to encode.
        batch_size: rows of a batch; None: `ROWS`, or as many as there are.
        pieces: how many texts of full length each prompt is cut into. Their embeddings stand one after the other,
            (pieces * S, E), and the pooled text is the first one's. One: what is too long is left out.
        zeros_for_empty: the empty prompt, which stands for "no negative prompt", is zeros, as with most SDXL models.
    """
    distinct = sorted(set(prompts))
    rows = tokenizer.texts(distinct, pieces)
    batch_size = batch_size or min(ROWS, len(rows))
    found: list[PromptText] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        filler = [batch[-1]] * (batch_size - len(batch))
        encoded = [one.asnumpy() for one in text_encoders(*Conditioning.of([*batch, *filler]).tensors())]
        found += [PromptText(*row) for row in zip(*encoded, strict=True)][: len(batch)]
    texts = {}
    for number, prompt in enumerate(distinct):
        own = found[number * pieces : (number + 1) * pieces]
        texts[prompt] = PromptText(np.concatenate([piece.text for piece in own]), own[0].pooled)
    if "" in texts and zeros_for_empty:
        texts[""] = PromptText(*map(np.zeros_like, texts[""]))
    return texts


def embed_prompts(bundle: ModelBundle, prompts: Iterable[str]) -> Iterator[tuple[str, PromptText]]:
    """These prompts and the empty one, each with what the base's own text encoders make of it, a part at a time, so
    that not all are in memory; the encoders are gone afterwards."""
    tokenizer, encoders, ordered = PromptTokenizer(bundle.text), bundle.load_text_encoders(), sorted({*prompts, ""})
    rows, zeros, part = min(ROWS, len(ordered)), bundle.zeros_for_empty_prompt, 8 * ROWS
    for start in range(0, len(ordered), part):
        yield from encode_prompts(tokenizer, encoders, ordered[start : start + part], rows, 1, zeros).items()

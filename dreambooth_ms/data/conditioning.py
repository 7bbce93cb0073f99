"""What a UNet reads beside noisy latents and timestep, of a prompt and of a picture: all that families differ in.

SD 1 and 2 read the prompt alone, SDXL also its pooled text and numbers of the picture, add_time_ids. Shapes: B rows or
prompts, T tokenizers, S tokens, E text width, P width of pooled text, N add_time_ids.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from mindspore import Tensor

from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.clip import end_positions
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.weights.bundle import ModelBundle, TextReader

NOTHING = np.zeros(0, np.float32)


class PromptText(NamedTuple):
    """What a network reads of one prompt."""

    text: np.ndarray
    """Embedding (S, E); or, for a network that encodes it, token ids (T * S,) int32 of T tokenizers side by side."""
    pooled: np.ndarray = NOTHING
    """Pooled text (P,), or beside token ids 1 where the prompt ends, (S,). Empty where the UNet reads none."""

    @property
    def input_names(self) -> tuple[str, str]:
        """What the two are called by the network that takes them."""
        is_tokens = np.issubdtype(self.text.dtype, np.integer)
        return ("input_ids", "end_mask") if is_tokens else ("encoder_hidden_states", "text_embeds")


def conditioning(
    prompts: Sequence[PromptText], add_time_ids: Sequence[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """What a network reads of the rows of a batch beside sample and timestep: of each its prompt, and add_time_ids (N,)
    if there are any. Rows (B, ...) by the network's `input_names`, in their order; what is empty is left out."""
    of_rows = (*zip(*prompts, strict=True), add_time_ids or [NOTHING] * len(prompts))
    named = zip((*prompts[0].input_names, "time_ids"), map(np.stack, of_rows), strict=True)
    return {name: rows for name, rows in named if rows.size}


def add_time_ids(
    count: int,
    original_size: tuple[int, int],
    crop: tuple[int, int],
    target_size: tuple[int, int],
    aesthetic_score: float = 6.0,
) -> np.ndarray:
    """The `count` numbers (N,) float32 that a UNet takes of a picture (Podell et al., 2023, section 2.2).

    6 for SDXL: height and width before the picture was resized, (top, left) of the crop after it, height and width of
    the crop. 5 for its refiner, which has a score from 0 to 10 (6 in diffusers' pipeline) in place of the last two. 0
    for others. Sizes that are given are (width, height).
    """
    ends: dict[int, tuple[float, ...]] = {6: target_size[::-1], 5: (aesthetic_score,)}
    return np.array((*original_size[::-1], *crop, *ends[count]), np.float32) if count else NOTHING


class PromptTokenizer:
    """The tokenizers of a model's text readers, all of one length, of which the last may pool. `warns`: whether it
    tells what is lost of a prompt."""

    def __init__(self, readers: Sequence[TextReader], warns: bool = True) -> None:
        if not readers:
            raise WeightError(
                "this model holds no text encoder; put text_encoder and tokenizer of the one that it was trained from "
                "into its folder, and name them in model_index.json"
            )
        self._tokenizers = [reader.tokenizer() for reader in readers]
        self._pooled_at, self._warns = readers[-1].pooled_at, warns
        self.length: int = self._tokenizers[0].length

    def ids(self, prompt: str, pieces: int = 1) -> np.ndarray:
        """Token ids (pieces, T * length) int32 of a prompt, those of each tokenizer side by side. Last pieces may be
        empty. In one piece, a prompt that is too long is cut, and a warning says what was lost."""
        lost = self.lost(prompt) if pieces == 1 and self._warns else None
        if lost is not None:
            warnings.warn(f"prompt cut after {self.length} tokens; not used: {lost!r}", stacklevel=2)
        return np.concatenate([tokenizer.pieces(prompt, pieces) for tokenizer in self._tokenizers], axis=1)

    def lost(self, prompt: str) -> str | None:
        """What of a prompt is cut off in one piece; None if it fits."""
        return self._tokenizers[0].lost(prompt)

    def texts(self, prompts: Iterable[str], pieces: int = 1) -> dict[str, list[PromptText]]:
        """What text encoders take of each piece of each distinct prompt: ids, and where they end if they are pooled."""
        found = {}
        for prompt in sorted(set(prompts)):
            ids = self.ids(prompt, pieces)
            ends = [] if self._pooled_at is None else [end_positions(ids[:, -self.length :], self._pooled_at)]
            found[prompt] = [PromptText(*row) for row in zip(ids, *ends, strict=True)]
        return found

    def num_pieces(self, prompts: Iterable[str]) -> int:
        """In how many pieces of full length the longest of these prompts fits."""
        return max(map(self._tokenizers[0].num_pieces, prompts))


def encode_prompts(
    tokenizer: PromptTokenizer,
    text_encoders: TextEncoders,
    prompts: Iterable[str],
    batch_size: int = 8,
    pieces: int = 1,
    zeros_for_empty: bool = False,
) -> Iterator[tuple[str, PromptText]]:
    """Each distinct prompt with what the UNet reads of it, float32, computed in batches of one fixed shape, the last of
    which is filled up. `pieces` is how many texts of full length each prompt is cut into: embeddings (pieces * S, E),
    pooled text of the first. `zeros_for_empty`: whether the empty prompt is zeros, as with most SDXL models."""
    ordered = sorted(set(prompts))
    for first in range(0, len(ordered), batch_size):
        texts, found = tokenizer.texts(ordered[first : first + batch_size], pieces), list[PromptText]()
        rows = [row for own in texts.values() for row in own]
        filled = rows + rows[-1:] * (-len(rows) % batch_size)
        for start in range(0, len(filled), batch_size):
            batch = conditioning(filled[start : start + batch_size])
            outputs = [one.asnumpy() for one in text_encoders(*map(Tensor, batch.values()))]
            found += [PromptText(*row) for row in zip(*outputs, strict=True)]
        for at, prompt in enumerate(texts):
            own = found[at * pieces : (at + 1) * pieces]
            read = PromptText(np.concatenate([piece.text for piece in own]), own[0].pooled)
            yield prompt, PromptText(*map(np.zeros_like, read)) if zeros_for_empty and not prompt else read


def embed_prompts(bundle: ModelBundle, prompts: Iterable[str]) -> Iterator[tuple[str, PromptText]]:
    """These prompts and the empty one, each with what the base's text encoders make of it; they are gone afterwards."""
    tokenizer, encoders, wanted = PromptTokenizer(bundle.text, warns=False), bundle.load_text_encoders(), {*prompts, ""}
    zeros = bundle.zeros_for_empty_prompt
    return encode_prompts(tokenizer, encoders, wanted, min(8, len(wanted)), zeros_for_empty=zeros)

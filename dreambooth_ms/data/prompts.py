"""Prompts as a model's own text encoders encode them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.text import PromptTokenizer, encode_prompts
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.weights.bundle import ModelBundle


def prompt_tokenizer(bundle: ModelBundle) -> PromptTokenizer:
    """The tokenizers of a base."""
    pooled = bundle.text_spec_2
    return PromptTokenizer(*bundle.tokenizer_paths, pooled_at=pooled.eos_token_id if pooled else None)


def encode(
    bundle: ModelBundle,
    tokenizer: PromptTokenizer,
    encoders: TextEncoders,
    prompts: Sequence[str],
    batch_size: int | None = None,
    pieces: int = 1,
) -> dict[str, PromptText]:
    """`encode_prompts`, with the empty prompt as it stands for "no negative prompt": zeros with most SDXL models."""
    encoded = encode_prompts(tokenizer, encoders, prompts, batch_size, pieces)
    if "" in encoded and bundle.zeros_for_empty_prompt:
        encoded[""] = PromptText(*map(np.zeros_like, encoded[""]))
    return encoded


def embed_prompts(bundle: ModelBundle, prompts: Iterable[str]) -> Iterator[tuple[str, PromptText]]:
    """These prompts and the empty one, each with what the base's own text encoders make of it, a part at a time, so
    that not all are in memory; the encoders are gone afterwards."""
    tokenizer, encoders, ordered = prompt_tokenizer(bundle), bundle.load_text_encoders(), sorted({*prompts, ""})
    rows = min(8, len(ordered))
    for start in range(0, len(ordered), 8 * rows):
        yield from encode(bundle, tokenizer, encoders, ordered[start : start + 8 * rows], rows).items()

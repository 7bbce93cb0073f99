"""How many tokens a prompt has, counted without transformers, which takes seconds to import."""

from functools import lru_cache
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from dreambooth_ms.formats.clip_tokenizer import END, LENGTH, tokenizer_on_board

MOST = LENGTH - 2
"""Tokens of a prompt that are read, beside its marks of start and end."""

# How CLIP cuts a text into words (Radford et al., 2021): contractions, letters, single digits, the rest.
_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def count_tokens(prompt: str, folder: Path | None) -> int:
    """Tokens of a prompt.

    Args:
        prompt: any text.
        folder: the model's tokenizer; None for CLIP's own.
    """
    for name in ("spiece.model", "sentencepiece.bpe.model"):
        if folder and (folder / name).exists():
            return len(_sentencepiece(folder / name).encode(prompt))
    return len(_tokenizer(folder or tokenizer_on_board()).encode(prompt, add_special_tokens=False).ids)


@lru_cache(maxsize=4)
def _sentencepiece(file: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(file))


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer

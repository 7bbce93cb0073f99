"""A byte-level BPE tokenizer in CLIP's file format, whose merges make every word of the world one token."""

import json
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def write_tokenizer(folder: Path, words: list[str]) -> int:
    """Write vocab.json, merges.txt and the configurations; returns the size of the vocabulary.

    Any text can be tokenised: what is no word of the world falls apart into letters.
    """
    merges = _merges_for(words)
    symbols = sorted(ByteLevel.alphabet())
    vocabulary = symbols + [symbol + END_OF_WORD for symbol in symbols] + ["".join(pair) for pair in merges]
    vocabulary += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(vocabulary)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "do_lower_case": True, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"},
    )
    return len(vocabulary)


def _merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Merges after which each word is one token. A later word's merges rank lower, so they never disturb an earlier."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply(merges, [*word[:-1], word[-1] + END_OF_WORD])
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(dict.fromkeys(merges))


def _apply(merges: list[tuple[str, str]], pieces: list[str]) -> list[str]:
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

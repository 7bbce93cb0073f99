"""CLIP's tokenizer from a folder in transformers' layout; and the one on board, for models in single files, which bring
none.

Its merges are the file that OpenAI published with CLIP (Radford et al., 2021), `vocabulary/`, as OpenCLIP's package
carries it under the licence beside it. Every CLIP text encoder of Stable Diffusion reads these tokens.

Shapes: N pieces of a prompt, S tokens.
"""

import atexit
import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import cache
from importlib.resources import files
from itertools import accumulate, chain, count, groupby, islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from dreambooth_ms.atomic import write_bytes
from dreambooth_ms.errors import UserError, WeightError, show_names
from dreambooth_ms.formats.config_keys import KEYS, check_keys
from dreambooth_ms.formats.folder_layout import read_json, write_json
from dreambooth_ms.formats.model_config import read_config
from dreambooth_ms.models.specs import FAMILIES, ModelSpec

SIZE = 49408
"""Tokens: 256 bytes within a word, 256 at its end, the merges, and two marks."""
UNMERGED_TOKENS = 2 * 256 + 2
"""Those that no line of merges.txt makes."""
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
"""Tokens of a prompt, marks included."""


class ClipTokenizer:
    """Prompts -> the token ids that a text tower of CLIP reads, by transformers' CLIPTokenizerFast: its slow one splits
    Chinese and Japanese, and drops characters of no width, otherwise than CLIP was trained.

    New words are found as the slow one does, by which they are trained elsewhere: as they are written, anywhere in a
    text, the longest first; what is between them is read by itself.

    Args:
        folder: `tokenizer.json`, or `vocab.json` and `merges.txt`, beside `tokenizer_config.json`.
        longest: tokens that the tower has positions for.
        vocab_size: tokens that it knows; WeightError if the files have more, or are no tokenizer of CLIP.
    """

    of = "CLIP"

    def __init__(self, folder: Path, longest: int = LENGTH, vocab_size: int = SIZE) -> None:
        # It announces at import that there is no PyTorch; the tokenizers need none.
        from transformers.utils import logging

        logging.set_verbosity_error()
        try:
            self._tokenizer = self._open(folder)
        except UserError:
            raise
        except Exception as error:  # The library for tokenizers knows no other.
            raise WeightError(f"{folder}: no tokenizer of {self.of} ({' '.join(str(error).split())})") from error
        if (size := len(self._tokenizer)) > vocab_size:
            raise WeightError(f"{folder}: {size} tokens, its text encoder knows {vocab_size}; take both from a model")
        special = self._tokenizer.all_special_tokens
        self._vocab_size = vocab_size
        added = {word: number for word, number in self._tokenizer.get_added_vocab().items() if word not in special}
        self.words: dict[str, list[int]] = {
            word: [added[token] for token in takewhile(added.__contains__, tokens_of_word(word))] for word in added
        }
        """New words -> the ids of the tokens that each stands for."""
        self._encode = self._encoder()
        *self._start, self._end = self._tokenizer.build_inputs_with_special_tokens([])
        told = self._tokenizer.model_max_length
        # Some say nothing, 10^30 or another tower's length.
        self.length: int = int(told) if 3 <= told < longest else longest
        """Tokens of a text, start and end included."""
        self._room = self.length - len(self._start) - 1

    def _open(self, folder: Path) -> Any:
        from transformers import CLIPTokenizerFast

        return CLIPTokenizerFast.from_pretrained(str(folder))

    def _encoder(self) -> Callable[[str], list[int]]:
        """What gives the ids of a text without new words and marks."""
        plain, special = self._tokenizer.backend_tokenizer, self._tokenizer.all_special_tokens
        if self.words:
            # It would find them in lower-cased text.
            content = json.loads(plain.to_str())
            content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in special]
            plain = Tokenizer.from_str(json.dumps(content))
        plain.no_truncation()
        plain.no_padding()
        return lambda text: plain.encode(text, add_special_tokens=False).ids

    @property
    def first_and_end(self) -> tuple[int, int]:
        """The id that follows those of its folder, and that of its end token."""
        return len(self._tokenizer), self._end

    def with_words(self, counts: Mapping[str, int]) -> "ClipTokenizer":
        """The same with new words, each of so many tokens, whose ids follow the table's; WeightError if it has one."""
        if known := [word for word in counts if word in self._tokenizer.get_vocab() or word in self.words]:
            raise WeightError(f"{show_names(known)}: the tokenizer has this word already; rename the new one")
        extended, first = copy(self), self._vocab_size
        ends = [*accumulate(counts.values(), initial=first)]
        own = {word: list(range(*ends_of)) for word, ends_of in zip(counts, pairwise(ends), strict=True)}
        extended.words, extended._vocab_size = self.words | own, ends[-1]
        return extended

    def lost(self, prompt: str) -> str | None:
        """What one text of full length leaves out of a prompt; None if it fits."""
        ids = self.tokens(prompt)[self._room :]
        names = {number: word for word, numbers in self.words.items() for number in numbers}
        runs = groupby(ids, lambda number: names.get(number))
        return " ".join(word or self._tokenizer.decode([*own]) for word, own in runs) or None

    def num_pieces(self, prompt: str) -> int:
        """In how many pieces a prompt fits, each between a start and an end token."""
        return max(1, -(-len(self.tokens(prompt)) // self._room))

    def pieces(self, prompt: str, count: int) -> np.ndarray:
        """A prompt cut into texts of full length, one after the other: (N, S) int32; the last ones may be empty."""
        room, ids, filler = self._room, self.tokens(prompt), self._tokenizer.pad_token_id
        rows = np.full((count, self.length), self._end if filler is None else filler, np.int32)
        for row, first in zip(rows, range(0, count * room, room), strict=True):
            piece = [*self._start, *ids[first : first + room], self._end]
            row[: len(piece)] = piece
        return rows

    def tokens(self, prompt: str) -> list[int]:
        """The ids of a text of any length, without marks."""
        longest_first = sorted(self.words, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", prompt) if self.words else [prompt]
        read = (self.words.get(part) or self._encode(part) for part in parts)
        return list(chain.from_iterable(read))


def tokens_of_word(word: str) -> Iterator[str]:
    """What the tokens that a new word may stand for are called in a folder, as in diffusers' pipelines."""
    return chain([word], (f"{word}_{number}" for number in count(1)))


def add_words(folder: Path, counts: Mapping[str, int], vocab_size: int) -> tuple[int, int]:
    """Let a folder's tokenizer know new words, each of so many tokens; transformers before 4.34 has a file for them.

    Gives the first of their ids, which follow all others, and the id of the end token. WeightError if it knows one
    already, or more tokens than there may be.
    """
    first, end = ClipTokenizer(folder, vocab_size=vocab_size).with_words(counts).first_and_end
    tokens = chain.from_iterable(islice(tokens_of_word(word), number) for word, number in counts.items())
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "special"), False) | {"normalized": True}
    file, config = folder / "added_tokens.json", read_json(folder / "tokenizer_config.json")
    added = (read_json(file) if file.exists() else {}) | {token: number for number, token in enumerate(tokens, first)}
    entries = {str(number): {"content": token, **flags} for token, number in added.items()}
    config["added_tokens_decoder"] = entries | config.get("added_tokens_decoder", {})
    write_json(file, added)
    write_json(folder / "tokenizer_config.json", config)
    return first, end


def check_clip_tokenizer(folder: Path) -> None:
    """Stop, by a WeightError, unless a tokenizer of CLIP is there and whole: with a file cut short, transformers fails,
    or gives other tokens without a word."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name == "tokenizer_config.json" or (folder / name).exists():
            config = read_json(folder / name)
            known = {key: config[key] for key in KEYS["tokenizer"] if key in config}
            read_config(folder / name, known, lambda config: check_keys(config, "tokenizer"))
    if (file := folder / "tokenizer.json").exists():
        model = read_json(file).get("model")
        vocabulary, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        if not (isinstance(vocabulary, dict) and isinstance(merges, list)):
            raise WeightError(f"{file}: no tokenizer of CLIP; download it again")
    else:
        vocabulary, file = read_json(folder / "vocab.json"), folder / "merges.txt"
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise WeightError(f"{file}: missing or not readable; is the download complete?") from error
        merges = [line for line in lines if len(line.split()) == 2 and not line.startswith("#version")]
    if len(merges) < len(vocabulary) - UNMERGED_TOKENS:
        raise WeightError(f"{file}: cut short; download it again")


def write_clip_tokenizer(folder: Path, pad_token: str = END) -> None:
    """Write vocab.json, merges.txt and the configurations as transformers' CLIPTokenizer reads them. `pad_token` fills
    short prompts: CLIP's end mark, or "!" (token 0) for the towers of OpenCLIP."""
    packed = files("dreambooth_ms.formats") / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
    # Pairs of tokens, the most frequent first; the file holds more than the vocabulary takes.
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 1 + SIZE - UNMERGED_TOKENS]
    symbols = sorted(ByteLevel.alphabet())
    made = [merge.replace(" ", "") for merge in merges]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *made, START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    config = {**special, "do_lower_case": True, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    write_bytes(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)


@cache
def tokenizer_on_board(pad_token: str = END) -> Path:
    """A folder with the tokenizer, made when it is first asked for and gone when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="dreambooth-ms-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_clip_tokenizer(folder, pad_token)
    return folder


def pad_tokens(model: ModelSpec) -> dict[str, str | None]:
    """A model's text encoders, of families with CLIP's -> what their tokenizers fill a short prompt with; None if their
    words are others."""
    specs, tokens = vars(model), FAMILIES.get(model.family.value, {}).get("pad_tokens", {})
    return {part: token if specs[part].vocab_size == SIZE else None for part, token in tokens.items() if specs[part]}

"""CLIP's byte-level vocabulary, which is on board: models in single files bring no tokenizer of their own.

The merges are the file that OpenAI published with CLIP (Radford et al., 2021), `vocabulary/`, as OpenCLIP's package
carries it under the licence beside it. Every CLIP text encoder of Stable Diffusion reads these tokens.
"""

import atexit
import gzip
import json
import shutil
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

from dreambooth_ms.atomic import write_bytes

SIZE = 49408
"""Tokens: 256 bytes within a word, 256 at its end, the merges, and two marks."""
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
"""Tokens of a prompt, marks included."""


def write_clip_tokenizer(folder: Path, pad_token: str = END) -> None:
    """Write vocab.json, merges.txt and the configurations as transformers' CLIPTokenizer reads them.

    `pad_token` is what fills a short prompt: CLIP's end mark, or "!" (token 0) for the towers of OpenCLIP.

    Raises:
        WeightError: the folder cannot be written to.
    """
    packed = files("dreambooth_ms.formats") / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
    # Pairs of tokens, the most frequent first; the file holds more than the vocabulary takes.
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 1 + SIZE - 2 * 256 - 2]
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    config = {**special, "do_lower_case": True, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    write_bytes(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", config)


@cache
def tokenizer_on_board(pad_token: str = END) -> Path:
    """A folder with the tokenizer, made when it is first asked for and gone when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="dreambooth-ms-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_clip_tokenizer(folder, pad_token)
    return folder


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]


def _write_json(path: Path, content: object) -> None:
    write_bytes(path, (json.dumps(content, ensure_ascii=False) + "\n").encode())

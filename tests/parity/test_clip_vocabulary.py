"""The tokenizer on board gives the tokens of OpenAI's CLIP, as transformers reads its files."""

from itertools import pairwise

import pytest
from transformers import CLIPTokenizer

from dreambooth_ms.formats.clip_tokenizer import ClipTokenizer
from dreambooth_ms.formats.clip_vocabulary import SIZE, write_clip_tokenizer

START, END = 49406, 49407

# Token ids that CLIP's documentation and the models' cards show for these prompts.
PUBLISHED = {
    "": [],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a photo of a dog": [320, 1125, 539, 320, 1929],
    "a diagram": [320, 22697],
}
SAMPLES = [
    "a photo of sks dog in a bucket",
    "  Spaces,   CAPITALS\tand\nlines ",
    "don't you'll we're I've",
    "numbers 1234 and signs !? #$ %&",
    "ein Bär über dem Café",
    "一只猫 🐱 emoji",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_published_prompts_have_their_published_ids(tokenizer, prompt):
    assert tokenizer(prompt).input_ids == [START, *PUBLISHED[prompt], END]


def test_the_vocabulary_has_its_published_size_and_ends_with_the_marks(tokenizer):
    assert len(tokenizer) == SIZE
    assert tokenizer.convert_tokens_to_ids(["!", "<|startoftext|>", "<|endoftext|>"]) == [0, START, END]


@pytest.mark.parametrize("prompt", SAMPLES)
def test_nothing_is_unknown_and_text_comes_back(tokenizer, prompt):
    ids = tokenizer(prompt).input_ids[1:-1]
    assert ids
    assert END not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "".join(prompt.lower().split())


def test_merges_apply_in_their_order(folder, tokenizer):
    """Byte pair encoding by its definition (Sennrich et al., 2016), written again."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    for word in ("bucket", "dreambooth", "photographs", "sks", "antidisestablishmentarianism"):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while candidates := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
            _, i = min(candidates)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        assert tokenizer.tokenize(word) == pieces


@pytest.mark.parametrize(("pad_token", "filler"), [("<|endoftext|>", END), ("!", 0)])
def test_a_short_prompt_is_filled_as_the_tower_expects(tmp_path, pad_token, filler):
    write_clip_tokenizer(tmp_path, pad_token)
    (ids,) = ClipTokenizer(tmp_path).pieces("a cat", 1)
    assert ids.tolist() == [START, 320, 2368, END] + [filler] * 73

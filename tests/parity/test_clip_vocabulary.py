"""The tokenizer on board gives the tokens of OpenAI's CLIP, as transformers reads its files."""

import json
from itertools import pairwise

import pytest
from transformers import CLIPTokenizer, CLIPTokenizerFast

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.clip_tokenizer import SIZE, ClipTokenizer, check_clip_tokenizer, write_clip_tokenizer

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
    return CLIPTokenizerFast.from_pretrained(folder)


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


# What CLIPTokenizerFast of the published models gives. CLIP takes letters that follow each other for one word, in any
# script, and characters without a width for signs; it does not look for words in Chinese and Japanese.
OTHER_SCRIPTS = {
    "一只猫": [19759, 222, 34517, 103, 163, 234, 360],
    "猫と犬": [163, 234, 104, 34671, 163, 232, 361],
    "zero\u200bwidth": [5848, 9844, 23571],
    "a\u200dphoto": [320, 728, 491, 1125],
    "CAFÉ": [15304],
    "cafe\u0301": [15304],
}


@pytest.mark.parametrize("prompt", OTHER_SCRIPTS)
def test_other_scripts_have_clips_own_ids(folder, prompt):
    (ids,) = ClipTokenizer(folder).pieces(prompt, 1)
    expected = [START, *OTHER_SCRIPTS[prompt], END]
    assert ids[: len(expected)].tolist() == expected


def changed(folder, target, **changes):
    """A copy of a tokenizer with other settings; ... takes one out."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    settings = target / "tokenizer_config.json"
    config = json.loads(settings.read_text()) | changes
    settings.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return target


@pytest.mark.parametrize(
    ("told", "longest", "length"),
    [
        (..., 77, 77),
        (None, 77, 77),
        (10**30, 77, 77),
        (1e30, 77, 77),
        (8192, 77, 77),
        (77, 77, 77),
        (77, 8, 8),
        (64, 77, 64),
    ],
)
def test_a_text_is_as_long_as_the_tower_takes(folder, tmp_path, told, longest, length):
    path = changed(folder, tmp_path / "tokenizer", model_max_length=told)
    check_clip_tokenizer(path)
    tokenizer = ClipTokenizer(path, longest)
    assert tokenizer.length == length
    assert tokenizer.pieces("a photo of a cat " * 40, 1).shape == (1, length)


@pytest.fixture
def in_one_file(folder, tmp_path):
    """As transformers 5 saves it: no vocab.json, no merges.txt."""
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "saved", legacy_format=False)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (tmp_path / "saved" / name).unlink(missing_ok=True)
    file = tmp_path / "saved" / "tokenizer_config.json"
    newer = {"backend": "tokenizers", "is_local": True, "local_files_only": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | newer))
    return tmp_path / "saved"


@pytest.mark.parametrize("prompt", [*PUBLISHED, *SAMPLES, *OTHER_SCRIPTS])
def test_a_tokenizer_in_one_file_gives_the_same(folder, in_one_file, prompt):
    check_clip_tokenizer(in_one_file)
    expected = ClipTokenizer(folder).pieces(prompt, 1).tolist()
    assert ClipTokenizer(in_one_file).pieces(prompt, 1).tolist() == expected


def test_a_tokenizer_in_one_file_that_is_cut_short_is_told(in_one_file):
    file = in_one_file / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(WeightError, match=r"tokenizer\.json: cut short; download it again"):
        check_clip_tokenizer(in_one_file)
    file.write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(WeightError, match=r"tokenizer\.json: no tokenizer of CLIP"):
        check_clip_tokenizer(in_one_file)


def test_words_that_the_text_encoder_has_not_are_told(folder):
    with pytest.raises(WeightError, match=r"49408 tokens, its text encoder knows 30000; take both from a model"):
        ClipTokenizer(folder, vocab_size=30000)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, r"tokenizer_class: expected CLIPTokenizer or .*, got 'T5Tokenizer'"),
        ({"model_max_length": "77"}, r"model_max_length: expected a number or null, got '77'"),
        ({"bos_token": None}, r"bos_token: expected text or an object, got None"),
    ],
)
def test_settings_that_are_not_followed_are_told(folder, tmp_path, changes, said):
    path = changed(folder, tmp_path / "tokenizer", **changes)
    with pytest.raises(WeightError, match=rf"tokenizer_config\.json: {said}"):
        check_clip_tokenizer(path)


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_added_words_of_a_saved_tokenizer_are_found_as_they_are_written(folder, tmp_path, kind):
    """As by the slow one, with which words are trained: the fast one finds them in lower-cased text."""
    for own, place in ((kind, "saved"), (CLIPTokenizer, "slow")):
        saved = own.from_pretrained(folder)
        saved.add_tokens(["<new1>", "<New2>"])
        saved.save_pretrained(tmp_path / place)
    check_clip_tokenizer(tmp_path / "saved")
    slow, ours = CLIPTokenizer.from_pretrained(tmp_path / "slow"), ClipTokenizer(tmp_path / "saved", 77, SIZE + 2)
    for prompt in ("a <new1> cat", "x<new1>s", "<NEW1> and <new2> or <NEW2>", "<New2><new1>", "a cat"):
        assert ours.tokens(prompt) == slow(prompt, add_special_tokens=False).input_ids, prompt
    assert ours.lost("a " * 75 + "<new1> cat") == "<new1> cat"
    assert ours.with_words({"<new3>": 2}).tokens("<new3>") == [SIZE + 2, SIZE + 3]
    with pytest.raises(WeightError, match="<new1>: the tokenizer has this word already"):
        ours.with_words({"<new1>": 1})

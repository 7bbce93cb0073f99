"""New words: how a tokenizer finds them, and the rows behind a table of tokens that they are."""

from dataclasses import replace
from functools import cache

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import ParameterTuple, Tensor, ops
from transformers import CLIPTokenizer

from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.conditioning import PromptTokenizer
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.clip_tokenizer import END, SIZE, ClipTokenizer, tokenizer_on_board
from dreambooth_ms.models.words import ExtendedEmbedding
from dreambooth_ms.ops import Embedding
from dreambooth_ms.processes.group import ALONE
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import normal
from tests.tiny_model import write_random_model, write_random_sdxl

START_ID, END_ID = 49406, 49407
# SD 1 and SDXL's first encoder; SD 2 and SDXL's second one.
PADS = (END, "!")
# One begins with another, one ends with another, one has a blank in it, and one is a word of the vocabulary.
WORDS = ("<new1>", "<new1>x", "new1>", "<new2>", "cat toy", "sks", "<*>")
TEXTS = (
    "a photo of",
    "<new1",
    "<NEW1>",
    "x",
    "'s",
    "don't",
    "toy",
    "cat",
    "!",
    "...",
    "7",
    "é",
    "<",
    ">",
    "\n",
    " ",
    "",
)


@cache
def tokenizers(pad):
    """transformers' slow tokenizer and ours, both with the words."""
    folder = tokenizer_on_board(pad)
    slow = CLIPTokenizer.from_pretrained(folder)
    assert slow.add_tokens(list(WORDS)) == len(WORDS)
    return slow, ClipTokenizer(folder).with_words(dict.fromkeys(WORDS, 1))


@pytest.mark.parametrize("pad", PADS)
@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(WORDS + TEXTS) | st.text("abC ,'<>1é", max_size=6), max_size=12))
def test_prompts_have_the_ids_of_transformers_slow_tokenizer(pad, parts):
    prompt = "".join(parts)
    slow, ours = tokenizers(pad)
    assert ours.tokens(prompt) == slow(prompt, add_special_tokens=False).input_ids
    expected = slow(prompt, padding="max_length", truncation=True).input_ids
    assert ours.pieces(prompt, 1).tolist() == [expected]


def test_a_word_of_several_tokens_has_ids_that_go_on_from_those_before():
    tokenizer = ClipTokenizer(tokenizer_on_board()).with_words({"<a>": 3, "<b>": 1}).with_words({"<c>": 2})
    assert tokenizer.words == {"<a>": [49408, 49409, 49410], "<b>": [49411], "<c>": [49412, 49413]}
    assert tokenizer.tokens("a<b> <a>") == [320, 49411, 49408, 49409, 49410]


@pytest.mark.parametrize("word", ["*", "sks</w>", "<|endoftext|>", "<new1>"])
def test_a_word_that_is_there_is_refused(word):
    tokenizer = ClipTokenizer(tokenizer_on_board()).with_words({"<new1>": 1})
    with pytest.raises(WeightError, match=r"the tokenizer has this word already; rename the new one$"):
        tokenizer.with_words({word: 1})


@pytest.mark.parametrize("before", [73, 74, 75])
def test_what_is_lost_of_a_long_prompt_has_its_words(before):
    """A word of two tokens from token 74 on is cut, one from 75 on is lost."""
    tokenizer = ClipTokenizer(tokenizer_on_board()).with_words({"<new1>": 2})
    prompt = "a " * before + "<new1>"
    assert tokenizer.lost(prompt) == (None if before == 73 else "<new1>")
    assert tokenizer.num_pieces(prompt) == (1 if before == 73 else 2)
    first, second = tokenizer.pieces(prompt, 2)
    tokens = [*first[1:-1], *second[1:]]
    assert (first[0], second[0], first[-1]) == (START_ID, START_ID, END_ID)
    assert tokens[: before + 3] == [320] * before + [SIZE, SIZE + 1] + [END_ID]
    assert tokenizer.lost("<new1> a " * 60).startswith("<new1> a <new1> a")


def test_of_an_old_configuration_a_text_ends_at_its_end_not_at_a_word(tmp_path):
    """The published SDXL's second encoder names 2 as its end token: it is the largest id that is no new word's."""
    bundle = open_bundle(write_random_sdxl(tmp_path, levels=1))
    old = replace(bundle.text[1], pooled_at=2)
    words = {"<new1>": {one.name: normal(2, one.width) for one in bundle.text}}
    plain = PromptTokenizer([bundle.text[0], old]).texts(["a photo"])
    read = PromptTokenizer([one.with_words(words) for one in (bundle.text[0], old)]).texts(["a photo", "a <new1>"])
    assert np.array_equal(read["a photo"][0].pooled, plain["a photo"][0].pooled)
    assert read["a <new1>"][0].pooled.argmax() == 1 + 1 + 2


@pytest.mark.parametrize(
    ("share", "total", "steps"), [("0.29", 100, 29), ("0.5", 5, 2), ("0.1", 9, 0), ("0.999", 9, 8), (None, 9, 9)]
)
def test_words_are_trained_for_whole_steps_of_their_share(share, total, steps):
    flags = ["--modifier_token", "<new1>", "--method", "textual_inversion", "--max_train_steps", str(total)]
    flags += ["--train_text_encoder_ti_frac", share] if share else []
    required = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "y", "--instance_prompt", "<new1>"]
    assert TrainingJob(ALONE, load(TrainConfig, [*required, *flags]), None).steps_of_words == steps


# --- Rows behind a table ---

SIZE_OF_TABLE, COUNT, WIDTH = 11, 3, 5


@pytest.fixture
def table():
    base = Embedding(SIZE_OF_TABLE, WIDTH)
    base.weight.set_data(Tensor(normal(SIZE_OF_TABLE, WIDTH)))
    base.weight.name = "weight"
    return base, ExtendedEmbedding(base, normal(COUNT, WIDTH, seed=1))


def test_old_ids_give_the_bits_of_the_table_and_new_ones_their_rows(table, pynative):
    base, extended = table
    ids = np.arange(SIZE_OF_TABLE + COUNT, dtype=np.int32).reshape(2, -1)
    both = np.concatenate([base.weight.asnumpy(), extended.new_rows.asnumpy()])
    assert extended(Tensor(ids)).asnumpy().tobytes() == both[ids].tobytes()
    old = ids[:1]
    assert np.array_equal(extended(Tensor(old)).asnumpy(), base(Tensor(old)).asnumpy())
    assert extended.weight is base.weight


def test_the_gradient_of_the_rows_is_the_sum_over_the_places_where_they_stand(table):
    """In float64; rows that no text has get none."""
    _, extended = table
    ids = np.array([[0, 11, 4, 11], [13, 10, 11, 13]], np.int32)
    sensitivity = normal(2, 4, WIDTH, seed=2)
    differentiate = ops.GradOperation(get_by_list=True, sens_param=True)(extended, ParameterTuple([extended.new_rows]))
    (gradient,) = differentiate(Tensor(ids), Tensor(sensitivity))
    expected = np.zeros((COUNT, WIDTH))
    np.add.at(expected, ids[ids >= SIZE_OF_TABLE] - SIZE_OF_TABLE, sensitivity[ids >= SIZE_OF_TABLE].astype(np.float64))
    assert not expected[1].any()
    # Sums of a few float32 numbers.
    assert np.abs(gradient.asnumpy() - expected).max() < 1e-6


def test_a_table_in_half_precision_leaves_the_rows_as_they_are(table, pynative):
    base, extended = table
    base.weight.set_dtype(ms.float16)
    found = extended(Tensor(np.array([2, 12], np.int32)))
    assert found.dtype == ms.float32
    assert np.array_equal(found.asnumpy()[1], extended.new_rows.asnumpy()[1])
    assert np.array_equal(found.asnumpy()[0], base.weight.asnumpy()[2].astype(np.float32))


def test_every_vector_of_a_model_has_the_width_of_its_encoder(tmp_path):
    bundle = open_bundle(write_random_model(tmp_path, levels=1))
    with pytest.raises(WeightError, match=r"<new1>: vectors of width 7, its text_encoder has 24"):
        bundle.with_words({"<new1>": {"text_encoder": normal(1, 7)}})
    with pytest.raises(WeightError, match=r"<new1>: has vectors for text_encoder and text_encoder_2"):
        bundle.with_words({"<new1>": {"text_encoder": normal(1, 24), "text_encoder_2": normal(1, 16)}})

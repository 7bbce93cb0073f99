"""The tokenizers of T5 and XLM-R give the ids of transformers' slow ones, on small models that are trained here."""

import numpy as np
import pytest
from transformers import T5Tokenizer, XLMRobertaTokenizer

from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats import sentencepiece_tokenizer
from dreambooth_ms.formats.folder_layout import model_files
from dreambooth_ms.formats.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.tiny_model import SENTENCEPIECE, write_sentencepiece

PROMPTS = (
    "",
    "a photo of sks dog",
    "  A  Photo\tof a Dog ",
    "ﬁne ① ℌund",
    "一只狗 on the plage",
    "zebra 🦓 x",
    "dog <extra_id_0> cat",
    "a dog</s> in a bucket",
    "<s> <pad> <mask> dog",
    " ".join(["a photo of a dog"] * 30),
)
FORMS = {"t5": T5Tokenizer, "xlm-r": XLMRobertaTokenizer}


@pytest.fixture(scope="module", params=FORMS)
def form(request, tmp_path_factory):
    """A folder with a tokenizer, and transformers' own of it."""
    kind, folder = FORMS[request.param], tmp_path_factory.mktemp(request.param)
    write_sentencepiece(folder, request.param)
    name = SENTENCEPIECE[request.param][0]
    return folder, kind.from_pretrained(str(folder)), name


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_transformers(form, prompt):
    folder, reference, _ = form
    # So T5 reads them in diffusers' pipelines.
    read = prompt.lower().strip() if isinstance(reference, T5Tokenizer) else prompt
    expected = reference(read, padding="max_length", max_length=77, truncation=True).input_ids
    (ids,) = SentencePieceTokenizer(folder).pieces(prompt, 1)
    assert ids.tolist() == expected
    assert reference.eos_token_id in expected
    assert SentencePieceTokenizer(folder).first_and_end == (len(reference), reference.eos_token_id)


def test_lengths_and_what_is_lost(form):
    folder, reference, _ = form
    tokenizer, prompt = SentencePieceTokenizer(folder, 12), PROMPTS[-1]
    assert tokenizer.length == 12
    room = 12 - len(reference.build_inputs_with_special_tokens([]))
    ids = reference(prompt, add_special_tokens=False).input_ids
    pieces = tokenizer.pieces(prompt, tokenizer.num_pieces(prompt))
    assert len(pieces) == -(-len(ids) // room)
    assert np.array_equal(pieces[0], reference(prompt, max_length=12, truncation=True).input_ids)
    inner = [number for row in pieces for number in row if number not in reference.all_special_ids]
    assert inner == ids
    assert tokenizer.lost(prompt) == reference.decode(ids[room:])
    assert tokenizer.lost("a dog") is None


def test_new_words_are_found_as_transformers_does(form):
    folder, _, name = form
    reference = FORMS["t5" if name == "spiece.model" else "xlm-r"].from_pretrained(str(folder))
    reference.add_tokens(["<new1>", "sks dog"])
    first, prompt = len(reference) - 2, "a photo of <new1>, and of sks dog on the beach<new1>"
    tokenizer = SentencePieceTokenizer(folder, vocab_size=first).with_words({"<new1>": 1, "sks dog": 1})
    (ids,) = tokenizer.pieces(prompt, 1)
    assert ids.tolist() == reference(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    assert first in ids and first + 1 in ids


def test_what_is_no_tokenizer_is_said_in_a_line(form, tmp_path, monkeypatch):
    folder, reference, name = form
    with pytest.raises(WeightError, match=rf"{len(reference)} tokens, its text encoder knows 50"):
        SentencePieceTokenizer(folder, vocab_size=50)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightError, match=r"holds no spiece.model .* take the file from the original model"):
        SentencePieceTokenizer(tmp_path)
    (tmp_path / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(WeightError, match=rf"{name}|no tokenizer of T5 or XLM-R") as caught:
        SentencePieceTokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(sentencepiece_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install sentencepiece"):
        SentencePieceTokenizer(folder)


def test_a_folder_on_the_hub_is_read_with_its_model_of_sentencepiece():
    names = ["model_index.json", "tokenizer/spiece.model", "tokenizer/README.md"]
    assert model_files(names, None) == names[:2]

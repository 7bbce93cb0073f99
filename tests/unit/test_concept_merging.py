"""Several results of Custom Diffusion become one, by the closed form, as its equations say."""

from types import SimpleNamespace

import numpy as np
import pytest

from dreambooth_ms import concept_merging
from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.file import CUSTOM_DIFFUSION
from dreambooth_ms.adapters.replacement import Replacement
from dreambooth_ms.adapters.word_files import write_words
from dreambooth_ms.adapters.writing import write_replacements
from dreambooth_ms.cli.main import main
from dreambooth_ms.concept_merging import RIDGE, plain_captions, projections
from dreambooth_ms.data.conditioning import PromptTokenizer, encode_prompts
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file, read_value
from dreambooth_ms.weights.bundle import open_bundle
from tests.tiny_model import write_random_model, write_random_sdxl

WIDTH, OUTPUTS = 24, 10


def draws(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def merged(base, concepts, states, captions):
    parts = projections(captions, states)
    return base + sum((own - base) @ part for own, part in zip(concepts, parts, strict=True))


@pytest.fixture
def problem():
    """Weights of a base and of two concepts, the states of their words, and those of captions, which share a mean."""
    base = draws(OUTPUTS, WIDTH, seed=1)
    concepts = [base + 0.1 * draws(OUTPUTS, WIDTH, seed=seed) for seed in (2, 3)]
    states = [draws(count, WIDTH, seed=seed) + 1 for count, seed in ((3, 4), (4, 5))]
    return base, concepts, states, draws(300, WIDTH, seed=6) + 1


def test_each_concept_reads_its_words_as_its_own_weights_do(problem):
    base, concepts, states, _ = problem
    weight = merged(*problem)
    for own, C in zip(concepts, states, strict=True):
        assert np.abs(weight @ C.T - own @ C.T).max() < 1e-4
    assert np.abs(weight - base).max() > 0.01


def test_nothing_changes_where_the_concepts_change_nothing(problem):
    base, _, states, captions = problem
    assert np.array_equal(merged(base, [base, base], states, captions), base)


def test_it_is_the_published_equation(problem):
    """Eq. 5, as written there, with the same ridge."""
    base, concepts, states, captions = problem
    C = np.concatenate(states)
    V = np.concatenate([rows @ own.T for own, rows in zip(concepts, states, strict=True)])
    moments = captions.T @ captions
    moments += RIDGE * np.trace(moments) / WIDTH * np.eye(WIDTH)
    d = C @ np.linalg.inv(moments)
    expected = base + (V.T - base @ C.T) @ np.linalg.inv(d @ C.T) @ d
    assert np.allclose(merged(*problem), expected, rtol=0, atol=1e-8)
    single = merged(base, concepts, [one.astype(np.float32) for one in states], captions.astype(np.float32))
    assert np.abs(single - expected).max() < 1e-5


def test_no_other_weights_that_keep_the_concepts_are_nearer_to_the_base_on_captions(problem):
    base, _, states, captions = problem
    best, C = merged(*problem), np.concatenate(states)
    free = np.eye(WIDTH) - np.linalg.pinv(C) @ C  # What it projects away, the concepts' words do not see.

    def error(weight):
        return np.linalg.norm((weight - base) @ captions.T)

    for size in (1e-3, 0.1, 1.0):
        for seed in range(20):
            other = best + size * draws(OUTPUTS, WIDTH, seed=seed) @ free
            assert np.abs((other - best) @ C.T).max() < 1e-10
            assert error(best) <= error(other)


def test_directions_that_no_caption_has_stay_with_the_base(problem):
    base, concepts, states, captions = problem
    weight = merged(base, concepts, [states[0], states[1]], captions[:12])
    C = np.concatenate(states)
    unseen = np.linalg.svd(np.concatenate([captions[:12], C]))[2][-3:]
    assert np.isfinite(weight).all()
    assert np.abs((weight - base) @ unseen.T).max() < 1e-6


def test_words_that_read_alike_are_refused(problem):
    _, _, states, captions = problem
    with pytest.raises(WeightError, match="--concepts: their words read alike"):
        projections(captions, [states[0], states[0]])
    with pytest.raises(WeightError, match="--concepts: their words read alike"):
        projections(captions, [states[0], draws(WIDTH, WIDTH, seed=8)])


def test_captions_are_many_and_different():
    captions = plain_captions()
    assert len(set(captions)) == len(captions) >= 200
    assert all(4 <= len(one.split()) <= 14 for one in captions)


KV = ("attn2.to_k", "attn2.to_v")


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    """Until adapters are opened by `open_adapter`: what `write_concept` has written."""

    def open_adapter(path, models, base=None):
        updates, words = {}, {}
        for name, tensor in open_tensor_file(path / CUSTOM_DIFFUSION).tensors.items():
            layer, parameter = name.replace(".processor", "").replace("_custom_diffusion", "").rsplit(".", 1)
            updates.setdefault(f"unet.{layer}", {})[parameter] = read_value(tensor)
        names = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
        for file in sorted(path.glob("<*.safetensors")):
            tensors = open_tensor_file(file).tensors.items()
            words[file.stem] = {names.get(n, "text_encoder"): np.atleast_2d(read_value(one)) for n, one in tensors}
        return SimpleNamespace(adapter=Adapter.of({n: Replacement.of(own) for n, own in updates.items()}, words))

    monkeypatch.setattr(concept_merging, "open_adapter", open_adapter)


def states_of(bundle, folder, phrases):
    """What layers read of each word's phrase from the word on, with the words of a result."""
    words = concept_merging.open_adapter(folder, []).adapter.words
    bundle = bundle.with_words(words)
    tokenizer = bundle.text[0].tokenizer()
    read = encode_prompts(PromptTokenizer(bundle.text), bundle.load_text_encoders(), phrases)
    return [read[phrase].text[1 : len(tokenizer.tokens(phrase)) + 2] for phrase in phrases]


def write_concept(folder, bundle, word, seed, layers=KV, prompt=None):
    """What a training of Custom Diffusion leaves."""
    tensors = bundle.opened().tensors
    names = [name.removeprefix("unet.").removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    updates = {}
    for number, layer in enumerate(name for name in names if name.endswith(layers)):
        base = read_value(tensors[f"unet.{layer}.weight"])
        updates[layer] = Replacement((base + 0.05 * draws(*base.shape, seed=seed + number)).astype(np.float32))
    folder.mkdir()
    write_replacements(updates, folder / CUSTOM_DIFFUSION, DType.F32, {})
    words = {reader.name: draws(1, reader.width, seed=seed).astype(np.float32) for reader in bundle.text}
    write_words({word: words} if word else {}, folder, DType.F32, {})
    if prompt:
        settings = f"data:\n  instance_prompt: {prompt}\n"
        (folder / "config.yaml").write_text(settings)
    return folder


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / request.param
    return (write_random_model if request.param == "sd1" else write_random_sdxl)(folder, levels=1)


def merge(base, target, *concepts, more=()):
    flags = ["--base", base, "--concepts", *concepts, "--target", target, *more]
    return main(["merge", *map(str, flags)])


def test_two_runs_become_one_that_keeps_both(base, tmp_path, capsys):
    bundle = open_bundle(base)
    one = write_concept(tmp_path / "one", bundle, "<new1>", 10, prompt="a photo of <new1> star")
    two = write_concept(tmp_path / "two", bundle, "<new1>", 50, prompt="<new1> photo")
    assert merge(base, tmp_path / "both", one, two) == 0
    told = capsys.readouterr()
    assert f'{one}: its subject is "<new1> star"' in told.out + told.err
    assert f'{two}: its subject is "<new2> photo"' in told.out + told.err
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        CUSTOM_DIFFUSION,
        "<new1>.safetensors",
        "<new2>.safetensors",
    }
    for source, name, kept in ((one, "<new1>", "<new1>"), (two, "<new1>", "<new2>")):
        before = open_tensor_file(source / f"{name}.safetensors").tensors
        after = open_tensor_file(tmp_path / "both" / f"{kept}.safetensors").tensors
        for (_, old), (_, new) in zip(sorted(before.items()), sorted(after.items()), strict=True):
            assert np.array_equal(read_value(old), read_value(new))
    states = states_of(bundle, tmp_path / "both", ["<new1> star", "<new2> photo"])
    files = [open_tensor_file(path / CUSTOM_DIFFUSION).tensors for path in (one, two, tmp_path / "both")]
    for name in files[2]:
        first, second, both = (read_value(file[name]).astype(np.float64) for file in files)
        assert np.abs(both @ states[0].T - first @ states[0].T).max() < 1e-4
        assert np.abs(both @ states[1].T - second @ states[1].T).max() < 1e-4

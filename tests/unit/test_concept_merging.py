"""Several results of Custom Diffusion become one, by the closed form, as its equations say."""

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.adapters.file import CUSTOM_DIFFUSION, open_adapter
from dreambooth_ms.adapters.formulas import Update
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


def states_of(bundle, folder, phrases):
    """What layers read of each word's phrase from the word on, with the words of a result."""
    words = open_adapter(folder, [bundle.opened().spec]).adapter.words
    bundle = bundle.with_words(words)
    tokenizer = bundle.text[0].tokenizer()
    read = dict(encode_prompts(PromptTokenizer(bundle.text), bundle.load_text_encoders(), phrases))
    return [read[phrase].text[1 : len(tokenizer.tokens(phrase)) + 2] for phrase in phrases]


def write_concept(folder, bundle, word, seed, layers=KV, prompt=None):
    """What a training of Custom Diffusion leaves."""
    tensors = bundle.opened().tensors
    names = [name.removeprefix("unet.").removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    updates = {}
    for number, layer in enumerate(name for name in names if name.endswith(layers)):
        base = read_value(tensors[f"unet.{layer}.weight"])
        updates[layer] = Update({"weight": (base + 0.05 * draws(*base.shape, seed=seed + number)).astype(np.float32)})
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


SAMPLE = ["--num_inference_steps", "2", "--guidance_scale", "1", "--batch_size", "1", "--scheduler", "ddim"]


def test_a_merged_folder_draws_and_its_words_count(tmp_path):
    base = write_random_model(tmp_path / "base", levels=1)
    bundle = open_bundle(base)
    one = write_concept(tmp_path / "one", bundle, "<new1>", 10)
    two = write_concept(tmp_path / "two", bundle, "<new1>", 50)
    captions = tmp_path / "captions.txt"
    captions.write_text("a photo of star\nof star photo a\nphoto star\n")
    more = ("--regularization_prompts", captions, "--concept_prompts", "a <new1> star", "--concept_prompts", "<new1>")
    assert merge(base, tmp_path / "both", one, two, more=(*more, "--dtype", "fp16")) == 0
    pictures = {}
    for number, (lora, word) in enumerate([("both", "<new1>"), ("both", "<new2>"), ("both", "star"), (None, "star")]):
        chosen = ["--lora", tmp_path / lora] if lora else []
        flags = ["--pretrained_model_name_or_path", base, *chosen, "--prompt", f"a photo of {word}", *SAMPLE]
        assert main(["sample", *map(str, flags), "--output_dir", str(tmp_path / str(number))]) == 0
        pictures[lora, word] = np.asarray(Image.open(tmp_path / str(number) / "00000.png")).astype(int)
    assert np.abs(pictures["both", "<new1>"] - pictures["both", "<new2>"]).max() > 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two concepts, and such that are none."""
    place = tmp_path_factory.mktemp("place")
    bundle = open_bundle(write_random_model(place / "base", levels=1))
    write_concept(place / "one", bundle, "<new1>", 10)
    write_concept(place / "two", bundle, "<new2>", 50)
    write_concept(place / "queries", bundle, "<new1>", 10, layers=(*KV, "attn2.to_q", "attn2.to_out.0"))
    write_concept(place / "no_word", bundle, None, 10)
    (place / "words").mkdir()
    write_words({"<new3>": {"text_encoder": draws(1, 24).astype(np.float32)}}, place / "words", DType.F32, {})
    other = open_bundle(write_random_sdxl(place / "other", levels=1))
    write_concept(place / "xl", other, "<new1>", 10)
    (place / "empty.txt").write_text("\n")
    return place


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--concepts", "one"], "--concepts: expected two or more, got 'one'"),
        (["--concepts", "one", "nowhere"], "nowhere: no such file or folder"),
        (["--concepts", "one", "queries"], "queries: expected new words and attn2.to_k and attn2.to_v of a UNet, got"),
        (["--concepts", "one", "no_word"], "no_word: expected new words and attn2.to_k and attn2.to_v of a UNet, got"),
        (
            ["--concepts", "one", "words"],
            "words: expected new words and attn2.to_k and attn2.to_v of a UNet, got <new3>",
        ),
        (
            ["--concepts", "one", "xl"],
            "xl/pytorch_custom_diffusion_weights.safetensors does not fit a Custom Diffusion",
        ),
        (["--concepts", "one", "one"], "--concepts: their words read alike; name each concept once"),
        (
            ["--concepts", "one", "two", "--lora", "one"],
            "--concepts: an adapter is made of them, not a model; leave out",
        ),
        (
            ["--concepts", "one", "two", "--alpha", "4"],
            "--concepts: an adapter is made of them, not a model; leave out",
        ),
        (
            ["--concepts", "one", "two", "--concept_prompts", "<new1>"],
            "--concept_prompts: expected one for each of --concepts one, two, got <new1>",
        ),
        (
            ["--concepts", "one", "two", "--concept_prompts", "<new1>", "--concept_prompts", "a star"],
            "--concept_prompts: 'a star' has no word of two (<new2>)",
        ),
        (
            ["--concepts", "one", "two", "--regularization_prompts", "nowhere.txt"],
            "--regularization_prompts nowhere.txt: no such file",
        ),
        (
            ["--concepts", "one", "two", "--regularization_prompts", "empty.txt"],
            "--regularization_prompts empty.txt: the file holds no prompt; write one per line",
        ),
        (["--concepts", "one", "two", "--target", "one"], "one: is there already; remove it, or choose another name"),
        ([], "--lora: missing; name the LoRA to merge, or --concepts"),
    ],
)
def test_what_cannot_be_merged_says_why(place, monkeypatch, capfd, flags, said):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert main(["merge", "--base", "base", *([] if "--target" in flags else ["--target", "out"]), *flags]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dreambooth-ms: error: ")]
    assert len(errors) == 1
    assert errors[0].removeprefix("dreambooth-ms: error: ").startswith(said)
    assert errors[0].endswith("; train it with --freeze_model crossattn_kv") == ("queries" in flags)
    assert sorted(place.rglob("*")) == before

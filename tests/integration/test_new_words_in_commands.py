"""Commands with Custom Diffusion and embeddings in place of a LoRA."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from dreambooth_ms.cli.main import main
from dreambooth_ms.sampling.picture_file import SETTINGS_KEY
from dreambooth_ms.weights.opened_model import open_model
from tests.tiny_model import write_random_model

WIDTH = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, a folder of Custom Diffusion with a word, an embedding alone, and photographs."""
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0)
    rng = np.random.default_rng(0)
    weights = {
        f"{name.removeprefix('unet.').partition('.to_')[0]}.processor.to_{kind}_custom_diffusion.weight": tensor.shape
        for name, tensor in open_model(home / "base").tensors.items()
        for kind in "kv"
        if name.endswith(f".attn2.to_{kind}.weight")
    }
    (home / "run").mkdir()
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in weights.items()}
    save_file(tensors, home / "run" / "pytorch_custom_diffusion_weights.safetensors")
    save_file({"<new1>": rng.standard_normal(WIDTH, dtype=np.float32)}, home / "run" / "<new1>.safetensors")
    save_file({"emb_params": rng.standard_normal((2, WIDTH), dtype=np.float32)}, home / "cat.safetensors")
    (home / "photographs").mkdir()
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(home / "photographs" / f"{number}.png")
    return home


def sampled(home, name, *flags, prompt="a photo of <new1> with a cat"):
    command = ["--pretrained_model_name_or_path", str(home / "base"), "--num_inference_steps", "2", "--prompt", prompt]
    assert main(["sample", *command, *flags, "--output_dir", str(home / name)]) == 0
    with Image.open(home / name / "00000.png") as picture:
        return np.asarray(picture).astype(int), json.loads(picture.text[SETTINGS_KEY])


def test_layers_and_words_each_change_the_picture_and_are_in_its_settings(home):
    lora, words = ("--lora", str(home / "run")), ("--embedding", str(home / "cat.safetensors"))
    both, settings = sampled(home, "both", *lora, *words)
    assert (settings["lora"], settings["embedding"]) == ([lora[1]], [words[1]])
    others = [
        sampled(home, "base")[0],
        sampled(home, "lora", *lora)[0],
        sampled(home, "words", *words)[0],
        sampled(home, "weak", *lora, *words, "--lora_scale", "0")[0],
    ]
    for number, one in enumerate([both, *others]):
        assert all(np.abs(one - other).max() > 2 for other in [both, *others][number + 1 :]), number


def test_evaluation_compares_with_the_base_that_does_not_know_the_word(home):
    flags = {
        "pretrained_model_name_or_path": home / "base",
        "embedding": home / "cat.safetensors",
        "instance_data_dir": home / "photographs",
        "prompt": "a photo of cat",
        "class_prompt": "a photo of star",
        "num_inference_steps": 2,
        "output_dir": home / "evaluation",
    }
    assert main(["evaluate", *[text for name, value in flags.items() for text in (f"--{name}", str(value))]]) == 0
    metrics = json.loads((home / "evaluation" / "metrics.json").read_text())
    assert metrics["before"]["subject_similarity"] != metrics["after"]["subject_similarity"]
    assert metrics["after"]["class_drift"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "negative", "is_told"), [("a dog", "", True), ("a cat", "", False), ("a dog", "cat", False)]
)
def test_an_embedding_that_no_prompt_holds_is_told(home, capsys, prompt, negative, is_told):
    words = ["--embedding", str(home / "cat.safetensors"), "--negative_prompt", negative]
    sampled(home, f"{prompt}, {negative}", *words, prompt=prompt)
    assert (f"--embedding {home}/cat.safetensors: no prompt holds cat" in capsys.readouterr().err) == is_told


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--embedding", "run"], "--embedding {home}/run: changes layers, too; name it with --lora"),
        (["--embedding", "dog.safetensors"], "{home}/dog.safetensors: no such file or folder"),
        (["--embedding", "base"], "{home}/base: holds no LoRA, such as pytorch_lora_weights.safetensors (found: "),
        (["--embedding", "other.safetensors"], "the vectors of <new1> are 1 of width 7; expected as many of width 24"),
        (["--lora", "run", "--embedding", "again.safetensors"], "again.safetensors: <new1> has other vectors here"),
    ],
)
def test_embeddings_that_cannot_be_used(home, capsys, flags, said):
    save_file({"<new1>": np.ones(7, np.float32)}, home / "other.safetensors")
    save_file({"<new1>": np.ones(WIDTH, np.float32)}, home / "again.safetensors")
    placed = [text if text.startswith("--") else str(home / text) for text in flags]
    command = ["sample", "--pretrained_model_name_or_path", str(home / "base"), "--prompt", "a", *placed]
    assert main([*command, "--output_dir", str(home / "none")]) == 2
    assert said.format(home=home) in capsys.readouterr().err
    assert not (home / "none").exists()

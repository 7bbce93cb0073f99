"""What the page may use: what is in its folders, and nothing else."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizerFast

from demo import session
from demo.library import Places, choose, describe, find, find_photographs, newest_run, read_run
from demo.processes import REPOSITORY
from demo.tokens import count_tokens
from dreambooth_ms.errors import DataError
from dreambooth_ms.formats.clip_tokenizer import tokenizer_on_board
from dreambooth_ms.formats.files.open import write_tensors
from dreambooth_ms.models.specs import Family
from tests.whole_loras import write_run_lora

EMBEDDED = REPOSITORY / "checkpoints" / "tiny-shapes"


def write_run(folder, base=EMBEDDED, prompt="a photo of a sks star", step=3):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"pretrained_model_name_or_path: {base}\ninstance_data_dir: pictures\ninstance_prompt: {prompt}\n"
    )
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {layer: (np.zeros((1, 64), np.float32), np.zeros((64, 1), np.float32))}
    write_run_lora(folder, {"unet": factors}, step)
    return folder


@pytest.fixture
def places(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "models").mkdir()
    return Places.of([REPOSITORY / "checkpoints", tmp_path / "models"], tmp_path / "runs")


def test_models_and_loras_are_found_wherever_they_are(places, tmp_path):
    run = write_run(places.runs / "dog")
    write_run(tmp_path / "models" / "deeper" / "cat")
    single = tmp_path / "models" / "style.safetensors"
    single.write_bytes((run / "pytorch_lora_weights.safetensors").read_bytes())
    shelf = find(places)
    assert shelf.models == (EMBEDDED,)
    assert set(shelf.loras) == {run, tmp_path / "models" / "deeper" / "cat", single}


def test_checkpoints_of_a_run_and_other_files_are_no_loras(places):
    run = write_run(places.runs / "dog")
    write_run(run / "checkpoint-2")
    write_tensors(places.runs / "other.safetensors", {"a": np.zeros(3, np.float32)})
    (places.runs / "damaged.safetensors").write_bytes(b"no")
    assert find(places).loras == (run,)


def test_the_newest_run_whose_base_is_here_comes_first(places):
    for age, name in enumerate(["new", "old"]):
        file = write_run(places.runs / name, prompt=name) / "pytorch_lora_weights.safetensors"
        os.utime(file, (1000 - age, 1000 - age))
    write_run(places.runs / "of another base", base="elsewhere")
    assert newest_run(places, find(places)).instance_prompt == "new"
    assert read_run(places.runs) is None


def test_a_lora_that_was_trained_on_is_another_one(places):
    run = write_run(places.runs / "dog")
    before = choose(str(EMBEDDED), [str(run)], None)
    assert before.serves(choose(str(EMBEDDED), [str(run)], None))
    assert before.serves(choose(str(EMBEDDED), [], None))
    os.utime(run / "pytorch_lora_weights.safetensors", (5000, 5000))
    assert not before.serves(choose(str(EMBEDDED), [str(run)], None))


@pytest.mark.parametrize("name", ["/etc", "/etc/passwd", "..", "{runs}/../secret", "{runs}/link", "~root", "\0"])
def test_paths_outside_are_refused(places, tmp_path, name):
    (tmp_path / "secret").mkdir()
    (places.runs / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"outside the folders of this page|not a path"):
        places.confined(name.format(runs=places.runs))


def test_paths_inside_are_taken_and_missing_ones_refused(places):
    run = write_run(places.runs / "dog")
    assert places.confined(f" {places.runs}/../runs/dog ") == run
    with pytest.raises(DataError, match="no such file or folder"):
        places.confined(str(places.runs / "cat"))


def test_the_home_folder_has_a_short_name(places, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.confined("~/models") == tmp_path / "models"
    with pytest.raises(DataError, match=f"-- --folder '?{tmp_path}/my photos"):
        places.confined("~/my photos")
    assert Places.of([Path("~/models")], Path("~/runs")).readable == (tmp_path / "models", tmp_path / "runs")


def test_labels_are_short_and_name_runs(places):
    assert places.label(EMBEDDED) == "tiny-shapes"
    assert places.label(places.runs / "dog") == "runs/dog"


def test_a_model_is_described_without_its_weights():
    facts = describe(EMBEDDED)
    assert (facts.family, facts.picture_size, facts.side_step, facts.guidance) == (Family.SD1, 64, 16, 3.0)
    assert facts.sizes()["Square"] == (64, 64)
    assert all(side % 16 == 0 for size in facts.sizes().values() for side in size)
    assert facts.sizes()["Landscape"][0] > facts.sizes()["Landscape"][1]
    assert len(set(facts.sizes().values())) == len(facts.sizes())


def test_folders_of_photographs_are_found_but_not_what_runs_have_sampled(places):
    for folder in ("photos", "dog/class_images", "dog/validation"):
        (places.runs / folder).mkdir(parents=True)
        (places.runs / folder / "1.png").write_bytes(b"")
    (places.runs / "dog" / "config.yaml").write_text("")
    assert find_photographs(places) == [places.runs / "photos"]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photo of a sks star",
        "It's 42 DOGS, and-or   more!",
        "naïve café über 東京 🙂",
        "一只猫 zero\u200bwidth",
        "word " * 90,
        "don't we'll\n\tI'm",
    ],
)
def test_tokens_are_counted_as_the_text_encoder_reads_them(prompt):
    for folder in (EMBEDDED / "tokenizer", tokenizer_on_board()):
        theirs = CLIPTokenizerFast.from_pretrained(str(folder))(prompt).input_ids
        assert count_tokens(prompt, folder) == len(theirs) - 2


def test_the_page_listens_to_this_machine_alone():
    tomllib = pytest.importorskip("tomllib")
    config = tomllib.loads((REPOSITORY / "demo" / ".streamlit" / "config.toml").read_text())
    assert config["server"]["address"] in session.LOCAL
    assert config["client"]["showErrorDetails"] == "none"
    assert json.dumps(config["server"]["allowedHosts"]) == '["localhost", "127.0.0.1"]'

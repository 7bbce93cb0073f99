"""Photographs in; an adapter, pictures, a sheet and figures out: the three commands one after the other."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from demo.sampling_without_streamlit import sample_flags
from dreambooth_ms.cli.main import main
from dreambooth_ms.training.history import read_history
from tests.picture_settings import read_settings
from tests.tiny_model import write_random_dino, write_random_model
from tools.tiny_base.world import write_subject


def run(command, **values):
    return main([command, *(part for name, value in values.items() for part in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, photographs beside a stray file, and a run of two steps on them."""
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0)
    write_subject(home / "photographs")
    (home / "photographs" / "notes.txt").write_text("not a picture")
    status = run(
        "train",
        pretrained_model_name_or_path=home / "base",
        instance_data_dir=home / "photographs",
        instance_prompt="a photo of sks star",
        with_prior_preservation=True,
        class_data_dir=home / "class",
        class_prompt="a photo of star",
        num_class_images=3,
        sample_batch_size=2,
        infer_steps=2,
        resolution=32,
        train_batch_size=2,
        max_train_steps=2,
        seed=1,
        output_dir=home / "run",
    )
    assert status == 0
    return home


def test_the_run_leaves_adapter_configuration_history_curve_and_log(home):
    held = {path.name for path in (home / "run").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "config.yaml", "history.jsonl", "loss.png", "logs"} <= held
    history = read_history(home / "run")
    assert [line["step"] for line in history] == [1, 2]
    assert all(line["loss"] == pytest.approx(line["instance_loss"] + line["class_loss"], rel=1e-5) for line in history)


def test_missing_class_pictures_are_sampled_and_say_how(home):
    files = sorted((home / "class").iterdir())
    assert [file.name for file in files] == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert read_settings(files[2])["prompt"] == "a photo of star"
    pictures = [np.asarray(Image.open(file)) for file in files]
    assert not np.array_equal(pictures[0], pictures[1])


def test_sampling_is_the_same_whatever_the_batch_size(home):
    sampled = {}
    for size in (1, 3):
        status = run(
            "sample",
            weight=f"{home / 'base'},{home / 'run'}",
            prompt="a photo of sks star",
            num_images_per_prompt=3,
            batch_size=size,
            num_inference_steps=2,
            # Its steps draw noise.
            scheduler="euler_a",
            seed=4,
            output_dir=home / f"sampled{size}",
        )
        assert status == 0
        sampled[size] = [np.asarray(Image.open(p)).astype(int) for p in sorted((home / f"sampled{size}").glob("*.png"))]
    # Products of other shapes round differently; a level of 255 is far less than one picture differs from another.
    assert len(sampled[1]) == 3
    assert max(np.abs(a - b).max() for a, b in zip(sampled[1], sampled[3], strict=True)) <= 1
    assert np.abs(sampled[1][0] - sampled[1][1]).max() > 10


def test_the_flags_of_the_guide_sample_from_a_picture_and_write_a_sheet(home):
    """Two adapters with scales of their own; the metadata repeats what was asked for."""
    photograph = next((home / "photographs").glob("*.png"))
    (home / "inference.yaml").write_text("pictures: {num_inference_steps: 4, scheduler: euler}")
    flags = sample_flags(
        [
            *("--task", "img2img", "--config", str(home / "inference.yaml"), "--img", str(photograph)),
            *("--weight", f"{home / 'base'},{home / 'run'},{home / 'run'}", "--lora_scale", "1.0,0.6"),
            *("--prompt", "a photo of sks star", "--strength", "0.5", "--num_rows", "1", "--num_cols", "2"),
            *("--sampler", "EulerAncestralSampler", "--save_path", str(home / "guide")),
        ]
    )
    assert main(["sample", *flags]) == 0
    assert sorted(path.name for path in (home / "guide").iterdir()) == ["00000.png", "00001.png", "grid-00000.png"]
    sheet, first, second = (
        np.asarray(Image.open(home / "guide" / name)) for name in ("grid-00000.png", "00000.png", "00001.png")
    )
    assert np.array_equal(sheet, np.concatenate([first, second], axis=1))
    assert not np.array_equal(first, second)
    settings = read_settings(home / "guide" / "00001.png")
    expected = {"scheduler": "euler_a", "lora_scale": [1.0, 0.6], "strength": 0.5, "image": str(photograph)}
    assert expected.items() <= settings.items()
    assert (settings["prompt"], settings["number"], settings["num_inference_steps"]) == ("a photo of sks star", 1, 4)


def evaluate(home, name, **flags):
    status = run(
        "evaluate",
        weight=f"{home / 'base'},{home / 'run'}",
        instance_data_dir=home / "photographs",
        prompt="a photo of sks star",
        class_prompt="a photo of star",
        num_images_per_prompt=2,
        num_inference_steps=2,
        output_dir=home / name,
        **flags,
    )
    assert status == 0
    return json.loads((home / name / "metrics.json").read_text())


def test_evaluation_writes_a_sheet_and_the_figures_before_and_after(home, capsys):
    metrics = evaluate(home, "run", num_seeds=1, num_class_images=2)
    assert metrics["before"]["class_drift"] == pytest.approx(0, abs=1e-6)
    assert all(-1 <= value <= 2 for side in ("before", "after") for value in metrics[side].values())
    assert metrics["seeds"] == [0]
    assert list(metrics["measures"]) == ["CLIP-I", "CLIP-T", "PRES, CLIP", "DIV, CLIP", "class drift, CLIP"]
    assert metrics["measures"]["CLIP-I"]["adapted"]["spread"] is None
    assert f"CLIP-I             higher  {metrics['before']['subject_similarity']:.3f}" in capsys.readouterr().out
    with Image.open(home / "run" / "before_after.png") as sheet:
        assert min(sheet.size) > 400


def test_evaluation_by_dino_too_beside_other_photographs_from_several_seeds(home):
    held_out, other = home / "held out", home / "other"
    with Image.open(next((home / "photographs").glob("*.png"))) as photograph:
        for folder, picture in ((held_out, photograph.rotate(20)), (other, ImageOps.invert(photograph))):
            folder.mkdir()
            picture.save(folder / "0.png")
    more = {"dino": write_random_dino(home), "held_out_data_dir": held_out, "other_data_dir": other}
    metrics = evaluate(home, "measured", num_seeds=2, num_class_images=3, seed=2**64 - 1, **more)
    alone = evaluate(home, "alone", num_seeds=1, num_class_images=3, seed=2**64 - 1)
    found = metrics["measures"]
    fidelity = ["DINO", "DINO, held out", "CLIP-I", "CLIP-I, held out"]
    assert list(found) == [
        *(*fidelity[:2], "PRES, DINO", "DIV, DINO", "class drift, DINO"),
        *(*fidelity[2:], "CLIP-T", "PRES, CLIP", "DIV, CLIP", "class drift, CLIP"),
    ]
    assert metrics["seeds"] == [2**64 - 1, 0]
    for name, one in found.items():
        assert (one["floor"] is not None) == (one["ceiling"] is not None) == (name in fidelity)
        for model in (one["base"], one["adapted"]):
            assert model["mean"] == pytest.approx(np.mean(model["seeds"]))
            assert model["spread"] == pytest.approx(abs(np.subtract(*model["seeds"])) / 2**0.5)
    assert found["CLIP-I"]["adapted"]["seeds"][0] != found["CLIP-I"]["adapted"]["seeds"][1]
    assert metrics["after"]["subject_similarity"] == found["CLIP-I"]["adapted"]["mean"]
    # The first of several seeds is that seed alone.
    assert alone["measures"]["CLIP-I"]["adapted"]["mean"] == pytest.approx(
        found["CLIP-I"]["adapted"]["seeds"][0], abs=1e-6
    )

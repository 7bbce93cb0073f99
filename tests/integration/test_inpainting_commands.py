"""A base that inpaints through the commands: trained, stopped and resumed, converted, sampled with, evaluated."""

import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.folder_layout import read_json
from dreambooth_ms.sampling.picture_file import validation_pictures
from dreambooth_ms.training.checkpoint import STATE
from tests.picture_settings import read_settings
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, photographs and a mask of one."""
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0, in_channels=9)
    write_subject(home / "photographs")
    with Image.open(next((home / "photographs").glob("*.png"))) as photograph:
        photograph.save(home / "photograph.png")
        mask = Image.new("LA", photograph.size)
        width, height = photograph.size
        ImageDraw.Draw(mask).rectangle((width // 4, height // 4, width // 2, height // 2), fill=(255, 255))
        mask.save(home / "mask.png")
    return home


def run(command, *more, **values):
    return main([command, *(part for name, value in values.items() for part in (f"--{name}", str(value))), *more])


def train(home, output, steps, *more):
    return run(
        "train",
        *("--with_prior_preservation", *more),
        pretrained_model_name_or_path=home / "base",
        instance_data_dir=home / "photographs",
        instance_prompt="a photo of sks star",
        class_data_dir=home / "class",
        class_prompt="a photo of star",
        num_class_images=2,
        infer_steps=2,
        resolution=32,
        train_batch_size=1,
        checkpointing_steps=1,
        validation_prompt="a photo of sks star",
        validation_steps=3,
        num_validation_images=1,
        validation_inference_steps=2,
        max_train_steps=steps,
        seed=1,
        output_dir=home / output,
    )


@pytest.fixture(scope="module")
def trained(home):
    assert train(home, "run", 3) == 0
    return home


def sample(home, base, output, *more):
    status = run(
        "sample",
        *more,
        pretrained_model_name_or_path=base,
        prompt="a photo of sks star",
        num_inference_steps=2,
        height=32,
        width=32,
        seed=4,
        output_dir=home / output,
    )
    return status, sorted((home / output).glob("*.png"))


def inpaint(home, base, output, *more):
    start = ("--image", str(home / "photograph.png"), "--mask", str(home / "mask.png"))
    return sample(home, base, output, *start, *more)


def test_a_run_that_was_stopped_is_the_straight_one_bit_for_bit(trained):
    assert train(trained, "parts", 1) == 0
    shutil.rmtree(trained / "parts" / "cache")
    assert train(trained, "parts", 3) == 0
    for step in (1, 2, 3):
        parts, straight = (trained / name / f"checkpoint-{step}" / STATE for name in ("parts", "run"))
        assert parts.read_bytes() == straight.read_bytes()


def test_each_row_has_latents_of_its_picture_and_of_what_is_left_of_it(trained):
    """Three steps of two rows; what has the same crop and no hole is encoded once."""
    held = len(list((trained / "run" / "cache").glob("*.safetensors")))
    prompts = 2 * 3  # Embedding and pooled text of the prompt, the class's and the empty one.
    assert prompts + 6 < held <= prompts + 12


def test_class_pictures_are_drawn_as_a_whole(trained):
    files = sorted((trained / "class").iterdir())
    assert [read_settings(file)["number"] for file in files] == [0, 1]
    first, second = (np.asarray(Image.open(file)).astype(int) for file in files)
    assert np.abs(first - second).max() > 10


def test_validation_draws_a_part_of_a_picture_of_the_subject(trained):
    (path,) = validation_pictures(trained / "run" / "validation")[3]
    assert read_settings(path)["strength"] == 1.0


def test_a_masked_part_is_drawn_anew(trained, capsys):
    lora = ("--lora", str(trained / "run"))
    status, (path,) = inpaint(trained, trained / "base", "drawn", "--task", "inpaint", *lora)
    assert status == 0
    settings = read_settings(path)
    assert settings["strength"] == 1.0
    assert (settings["image"], settings["mask"]) == (str(trained / "photograph.png"), str(trained / "mask.png"))
    _, (again,) = inpaint(trained, trained / "base", "again", *lora)
    _, (near,) = inpaint(trained, trained / "base", "near", "--strength", "0.5", *lora)
    assert np.array_equal(Image.open(path), Image.open(again))
    assert not np.array_equal(Image.open(path), Image.open(near))


def test_what_was_converted_to_a_single_file_and_back_draws_the_same(trained, capsys):
    file, folder = trained / "single.safetensors", trained / "folder"
    assert main(["convert", str(trained / "base"), str(file)]) == 0
    assert main(["inspect", str(file)]) == 0
    assert "Its UNet takes 9 channels: a model for inpainting." in capsys.readouterr().out
    assert main(["convert", str(file), str(folder)]) == 0
    assert read_json(folder / "model_index.json")["_class_name"] == "StableDiffusionInpaintPipeline"
    shutil.copytree(trained / "base" / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    lora = ("--lora", str(trained / "run"))
    pictures = [inpaint(trained, trained / name, f"of {name}", *lora)[1][0] for name in ("base", "folder")]
    assert np.array_equal(*map(Image.open, pictures))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "base inpaints: name a picture with --image, and with --mask one of its size that is white where it is"),
        (("--image", "photograph.png"), "--mask: missing; "),
        (("--mask", "mask.png"), "--mask: needs --image, the picture"),
        (("--task", "inpaint"), "--task inpaint: needs --image and --mask, which is white where the picture is drawn"),
        (
            ("--task", "img2img", "--image", "photograph.png", "--mask", "mask.png"),
            "--mask: goes with --task inpaint, not img2img",
        ),
        (
            ("--image", "photograph.png", "--mask", "mask.png", "--refiner", "base"),
            "--mask: a --refiner would change what is not masked; leave one of them out",
        ),
        (("--image", "photograph.png", "--mask", "nothing.png"), "nothing.png: no such file"),
        (("--image", "photograph.png", "--mask", "small.png"), "--mask: 8x9 pixels, its --image "),
    ],
)
def test_what_cannot_be_drawn_is_refused(home, monkeypatch, capsys, more, said):
    monkeypatch.chdir(home)
    Image.new("L", (8, 9)).save("small.png")
    status, pictures = sample(home, home / "base", "none", *more)
    assert (status, pictures) == (2, [])
    assert said in capsys.readouterr().err


def test_another_base_takes_no_mask(home, capsys):
    write_random_model(home / "plain", levels=0)
    status, pictures = inpaint(home, home / "plain", "none")
    assert (status, pictures) == (2, [])
    assert "plain is no base for inpainting, its UNet takes 4 channels and not 9; name one" in capsys.readouterr().err


def test_evaluation_compares_whole_pictures(trained):
    status = run(
        "evaluate",
        pretrained_model_name_or_path=trained / "base",
        lora=trained / "run",
        instance_data_dir=trained / "photographs",
        prompt="a photo of sks star",
        class_prompt="a photo of star",
        num_inference_steps=2,
        batch_size=1,
        output_dir=trained / "evaluated",
    )
    assert status == 0
    assert (trained / "evaluated" / "metrics.json").is_file()

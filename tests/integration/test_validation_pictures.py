"""Pictures during training: several prompts, one sheet each time, and a strip that survives a stop."""

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.cli.main import main
from dreambooth_ms.sampling.picture_file import validation_pictures
from dreambooth_ms.training.history import read_history
from tests.picture_settings import read_settings
from tests.tiny_model import write_random_model
from tests.tracker_stubs import logged, services  # noqa: F401 - a fixture
from tools.tiny_base.world import write_subject

STAR, SNOW = "a photo of sks star", "a photo of a star, in the snow"


@pytest.fixture
def home(tmp_path):
    write_random_model(tmp_path / "base", levels=0)
    write_subject(tmp_path / "photographs")
    (tmp_path / "prompts.txt").write_text(f"{SNOW}\n\n{STAR}\n{SNOW}\n", encoding="utf-8")
    return tmp_path


def train(home, output, steps, *more):
    """Train so many steps, with pictures of 32 pixels after each."""
    flags = {
        "pretrained_model_name_or_path": home / "base",
        "instance_data_dir": home / "photographs",
        "instance_prompt": STAR,
        "output_dir": home / output,
        "max_train_steps": steps,
        "resolution": 32,
        "train_batch_size": 1,
        "seed": 5,
        "checkpointing_steps": 1,
        "validation_steps": 1,
        "num_validation_images": 2,
        "validation_inference_steps": 2,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return main(["train", *words, *more])


def pictures(folder, step, prompt):
    """Of a prompt after a step."""
    paths = validation_pictures(folder / "validation")[step]
    return [np.asarray(Image.open(path)) for path in paths if read_settings(path)["prompt"] == prompt]


def test_prompts_are_added_to_a_run_that_goes_on_and_draw_as_before(home):
    assert train(home, "straight", 3, "--validation_prompt", STAR, "--validation_negative_prompt", "snow") == 0
    assert train(home, "resumed", 2, "--test_prompt", STAR, "--test_negative_prompt", "snow") == 0
    more = ("--test_prompts_file", str(home / "prompts.txt"), "--test_negative_prompt", "snow")
    assert train(home, "resumed", 3, *more) == 0
    straight, resumed = home / "straight", home / "resumed"
    for step in (1, 2, 3):
        # The files of before say the same, and after the stop a prompt before it changes nothing.
        for one, other in zip(pictures(straight, step, STAR), pictures(resumed, step, STAR), strict=True):
            assert np.array_equal(one, other)
    assert len(pictures(resumed, 3, SNOW)) == 2
    settings = read_settings(validation_pictures(resumed / "validation")[3][0])
    assert {"step": 3, "negative_prompt": "snow", "number": 0, "seed": 5}.items() <= settings.items()
    assert "a photo of a star, in the snow" in (resumed / "config.yaml").read_text(encoding="utf-8")
    with (
        Image.open(resumed / "validation" / "step-000003.png") as sheet,
        Image.open(resumed / "validation" / "over_time.png") as strip,
    ):
        assert strip.height == pytest.approx(sheet.height, abs=60)
        assert strip.width - sheet.width == 170, "three validations, two pictures"


def test_a_file_that_is_not_there_ends_before_any_work(home, capfd):
    assert train(home, "run", 1, "--validation_prompt", str(home / "none.txt")) == 2
    assert f"--validation_prompt {home / 'none.txt'}: no such file" in capfd.readouterr().err
    assert not (home / "run").exists()


def test_a_service_is_sent_pictures_with_their_prompts_and_follows_a_run_that_goes_on(home, services, capfd):  # noqa: F811
    prompts = ("--validation_prompt", STAR, "--validation_prompt", SNOW)
    shown = ("--report_to", "tensorboard", "wandb", "swanlab")
    services["swanlab"].fails_at.add("init")
    assert train(home, "run", 1, *prompts, *shown) == 0
    assert train(home, "run", 2, *prompts, *shown, "--tracker_project_name", "stars") == 0
    said = capfd.readouterr()
    assert said.err.count("swanlab: no init without a network; the training goes on without it") == 2  # Once a run.
    first, second = (values for call, values, _ in services["wandb"].calls if call == "init")
    assert (first["id"], first["name"]) == (second["id"], "run")
    assert (first["project"], second["project"]) == ("dreambooth-lora", "stars")
    assert first["config"]["validation"]["validation_prompt"] == [STAR, SNOW]
    sent = logged(services["wandb"])
    for line in read_history(home / "run"):
        step = line.pop("step")
        assert line.items() <= sent[step].items()
        own = [sent[step][f"validation/{number}"] for number in range(4)]
        assert [one.caption for one in own] == [STAR, STAR, SNOW, SNOW]
        for prompt, pair in ((STAR, own[:2]), (SNOW, own[2:])):
            files = pictures(home / "run", step, prompt)
            assert all(np.array_equal(one.data, file) for one, file in zip(pair, files, strict=True))
    assert {*sent} == {1, 2}
    assert len([*(home / "run" / "logs").iterdir()]) == 2

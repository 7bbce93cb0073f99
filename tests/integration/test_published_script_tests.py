"""What diffusers' tests of its DreamBooth scripts ask for, asked of our command: files, names of weights, checkpoints.

As there: two pictures' worth of a subject, batches of one, a few steps; and every result is used by diffusers.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject

PROMPT = "a photo of sks star"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0)
    write_subject(home / "photographs")
    return home


def train(home, name, steps, *more):
    """Train in the folder of this name, with a checkpoint every second step."""
    options = {
        "pretrained_model_name_or_path": home / "base",
        "instance_data_dir": home / "photographs",
        "instance_prompt": PROMPT,
        "resolution": 32,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_train_steps": steps,
        "learning_rate": 5e-4,
        "lr_scheduler": "constant",
        "checkpointing_steps": 2,
        "seed": 0,
        "output_dir": home / name,
    }
    flags = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    assert main(["train", *flags, "--scale_lr", *more]) == 0
    return home / name


def checkpoints(folder):
    return {path.name for path in folder.iterdir() if path.name.startswith("checkpoint")}


def sample(pipeline):
    """A picture of the subject from one step, which is a picture if it is finite and not all the same."""
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, num_inference_steps=1, output_type="np").images[0]
    assert np.isfinite(picture).all()
    assert np.ptp(picture) > 0


@pytest.fixture(scope="module")
def full(home):
    """A run of four steps that goes on to the sixth, after its first checkpoint was removed."""
    folder = train(home, "full", 4, "--method", "full")
    first = SimpleNamespace(
        files={path.relative_to(folder).as_posix() for path in folder.rglob("*")},
        checkpoints=checkpoints(folder),
        unet=load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"),
    )
    sample(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None))
    middle = UNet2DConditionModel.from_pretrained(folder / "checkpoint-2", subfolder="unet")
    shutil.rmtree(folder / "checkpoint-2")
    train(home, "full", 6, "--method", "full", "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    return SimpleNamespace(folder=folder, first=first, middle=middle)


class TestFull:
    def test_the_result_is_a_pipeline(self, full):
        assert {"unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"} <= full.first.files
        assert full.first.checkpoints == {"checkpoint-2", "checkpoint-4"}

    def test_the_unet_of_a_checkpoint_takes_its_place_in_the_pipeline(self, full, home):
        sample(StableDiffusionPipeline.from_pretrained(home / "base", unet=full.middle, safety_checker=None))
        values = {name: value.numpy() for name, value in full.middle.state_dict().items()}
        assert values.keys() == full.first.unet.keys()
        assert any(not np.array_equal(values[name], value) for name, value in full.first.unet.items())

    def test_a_resumed_run_makes_what_is_missing_and_no_more(self, full):
        assert checkpoints(full.folder) == {"checkpoint-4", "checkpoint-6"}
        pipeline = StableDiffusionPipeline.from_pretrained(full.folder, safety_checker=None)
        sample(pipeline)
        after = pipeline.unet.state_dict()
        assert any(not np.array_equal(after[name].numpy(), value) for name, value in full.first.unet.items())


@pytest.fixture(scope="module")
def lora(home):
    """A run of four steps that keeps all checkpoints, and goes on to the eighth with a limit."""
    folder = train(home, "lora", 4)
    first = SimpleNamespace(files={path.name for path in folder.iterdir()}, checkpoints=checkpoints(folder))
    train(home, "lora", 8, "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest")
    return SimpleNamespace(folder=folder, first=first)


@pytest.fixture(scope="module")
def lora_with_text_encoder(home):
    """A run of six steps that keeps two checkpoints."""
    return train(home, "text", 6, "--train_text_encoder", "--checkpoints_total_limit", "2")


class TestLora:
    def test_the_result_is_one_file_of_factors_of_the_unet(self, lora):
        assert FILE_NAME in lora.first.files
        names = load_file(lora.folder / FILE_NAME).keys()
        assert names
        assert all("lora" in name and name.startswith("unet.") for name in names)

    def test_with_the_text_encoder_it_holds_both_and_nothing_else(self, lora_with_text_encoder):
        names = load_file(lora_with_text_encoder / FILE_NAME).keys()
        assert all("lora" in name for name in names)
        assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder"}

    def test_a_limit_keeps_the_last_checkpoints(self, lora_with_text_encoder):
        assert checkpoints(lora_with_text_encoder) == {"checkpoint-4", "checkpoint-6"}

    def test_a_limit_that_comes_later_removes_all_that_are_too_many(self, lora):
        assert lora.first.checkpoints == {"checkpoint-2", "checkpoint-4"}
        assert checkpoints(lora.folder) == {"checkpoint-6", "checkpoint-8"}

    @pytest.mark.parametrize("part", ["", "checkpoint-6"], ids=["result", "checkpoint"])
    @pytest.mark.parametrize("run", ["lora", "lora_with_text_encoder"])
    def test_a_pipeline_loads_it_and_samples(self, home, request, run, part):
        value = request.getfixturevalue(run)
        folder = value if run == "lora_with_text_encoder" else value.folder
        pipeline = StableDiffusionPipeline.from_pretrained(home / "base", safety_checker=None)
        pipeline.load_lora_weights(folder / part)
        parts = {"unet"} | ({"text_encoder"} if run == "lora_with_text_encoder" else set())
        assert pipeline.get_list_adapters().keys() == parts
        sample(pipeline)

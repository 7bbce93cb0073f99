"""fp16 from the command line: class pictures first, a run that skips, stops and goes on, pictures in half precision."""

import shutil

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.cli.main import main
from dreambooth_ms.training.checkpoint import STATE
from dreambooth_ms.training.trackers import HISTORY, read_history
from dreambooth_ms.weights.lora_file import FILE_NAME
from dreambooth_ms.weights.tensor_file import read_tensors
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject

STEPS = 4


def run(home, command, **values):
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return main([command, *flags, "--output_dir", str(home / command)])


def train(home):
    """Steps whose scale overflows twice before it fits, with 8-bit moments and an average of the weights."""
    return run(
        home,
        "train",
        pretrained_model_name_or_path=home / "base",
        instance_data_dir=home / "photographs",
        instance_prompt="a photo of sks star",
        with_prior_preservation=True,
        class_data_dir=home / "class",
        class_prompt="a photo of star",
        num_class_images=2,
        infer_steps=2,
        resolution=32,
        train_batch_size=1,
        max_train_steps=STEPS,
        checkpointing_steps=3,
        lr_scheduler="linear",
        lr_warmup_steps=3,
        seed=1,
        ms_mode=1,
        mixed_precision="fp16",
        init_loss_scale=2.0**36,
        loss_scale_factor=2.0**11,
        use_8bit_adam=True,
        use_ema=True,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base")
    write_subject(home / "photographs")
    assert train(home) == 0
    return home


def results(home):
    tensors, _ = read_tensors(home / "train" / FILE_NAME)
    return {name: values.tobytes() for name, values in tensors.items()}


def test_steps_that_overflow_are_counted_and_not_by_the_schedule(home):
    history = read_history(home / "train")
    skipped = [line["skipped_steps"] for line in history]
    assert 0 < skipped[-1] < STEPS
    assert [line["loss_scale"] for line in history] == [2.0 ** (36 - 11 * before) for before in [0, *skipped[:-1]]]
    updates = [step - before for step, before in enumerate([0, *skipped[:-1]])]
    assert [line["learning_rate"] for line in history] == pytest.approx([5e-4 * update / 3 for update in updates])
    assert [np.isfinite(line["grad_norm"]) for line in history] == [
        after == before for before, after in zip([0, *skipped[:-1]], skipped, strict=True)
    ]
    assert (home / "train" / "loss.png").is_file()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(home):
    whole, history = results(home), (home / "train" / HISTORY).read_text()
    state, _ = read_tensors(home / "train" / "checkpoint-3" / STATE)
    assert {"loss_scale", "good_steps", "skipped_steps"} <= state.keys()
    assert any(values.dtype == np.uint8 for values in state.values())
    (home / "train" / FILE_NAME).unlink()
    assert train(home) == 0
    assert results(home) == whole
    assert (home / "train" / HISTORY).read_text() == history


def test_pictures_are_drawn_in_half_precision(home):
    drawn = {}
    for precision in ("no", "fp16"):
        status = run(
            home,
            "sample",
            weight=f"{home / 'base'},{home / 'train'}",
            prompt="a photo of sks star",
            num_inference_steps=2,
            ms_mode=1,
            ms_amp_level="O2" if precision == "fp16" else "O0",
        )
        assert status == 0
        drawn[precision] = np.asarray(Image.open(home / "sample" / "00000.png")).astype(int)
        shutil.rmtree(home / "sample")
    difference = np.abs(drawn["no"] - drawn["fp16"])
    print(f"levels of 255: {difference.max()}")
    assert difference.max() <= 3

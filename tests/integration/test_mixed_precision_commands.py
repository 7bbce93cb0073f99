"""fp16 from the command line: a run that skips a step, is stopped and goes on."""

import numpy as np
import pytest

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.open import read_tensors
from dreambooth_ms.training.checkpoint import STATE
from dreambooth_ms.training.history import HISTORY, read_history
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject

STEPS = 3


def run(home, command, **values):
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return main([command, *flags, "--output_dir", str(home / command)])


def train(home):
    """Steps whose scale overflows once before it fits, with 8-bit moments and an average of the weights."""
    return run(
        home,
        "train",
        pretrained_model_name_or_path=home / "base",
        instance_data_dir=home / "photographs",
        instance_prompt="a photo of sks star",
        resolution=32,
        train_batch_size=1,
        max_train_steps=STEPS,
        checkpointing_steps=2,
        lr_scheduler="linear",
        lr_warmup_steps=3,
        seed=1,
        mixed_precision="fp16",
        init_loss_scale=2.0**32,
        loss_scale_factor=2.0**20,
        use_8bit_adam=True,
        use_ema=True,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0)
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
    assert [line["loss_scale"] for line in history] == [2.0 ** (32 - 20 * before) for before in [0, *skipped[:-1]]]
    updates = [step - before for step, before in enumerate([0, *skipped[:-1]])]
    assert [line["learning_rate"] for line in history] == pytest.approx([5e-4 * update / 3 for update in updates])
    assert [np.isfinite(line["grad_norm"]) for line in history] == [
        after == before for before, after in zip([0, *skipped[:-1]], skipped, strict=True)
    ]
    assert (home / "train" / "loss.png").is_file()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(home):
    whole, history = results(home), (home / "train" / HISTORY).read_text()
    state, _ = read_tensors(home / "train" / "checkpoint-2" / STATE)
    assert {"loss_scale", "good_steps", "skipped_steps"} <= state.keys()
    assert any(values.dtype == np.uint8 for values in state.values())
    (home / "train" / FILE_NAME).unlink()
    assert train(home) == 0
    assert results(home) == whole
    assert (home / "train" / HISTORY).read_text() == history

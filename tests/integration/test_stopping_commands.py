"""A run that is measured while it goes on, ends by itself, and whose best checkpoint is its result."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli import validation_loss
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.open import read_metadata, read_tensors
from dreambooth_ms.training.checkpoint import STEP_KEY, checkpoint_folders, open_checkpoint, result_of
from dreambooth_ms.training.history import read_history
from tests.tiny_model import write_random_model
from tools.tiny_base.world import subject_pictures

MEASURED = ("--validation_loss", "--validation_loss_steps", "2", "--checkpointing_steps", "2")
LIVELY = ("--lora_dropout", "0.3", "--use_ema", "--ema_decay", "0.5")
BEST = ("--keep_best", "fidelity", "--class_prompt", "a photo of star", "--validation_inference_steps", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, five photographs and three that are held out."""
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0)
    for number, picture in enumerate(subject_pictures(8)):
        path = home / ("held_out" if number > 4 else "photographs") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    return home


def train(home, output, steps, *more):
    flags = {
        "pretrained_model_name_or_path": home / "base",
        "instance_data_dir": home / "photographs",
        "instance_prompt": "a photo of sks star",
        "output_dir": home / output,
        "max_train_steps": steps,
        "resolution": 32,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "seed": 5,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return main(["train", *words, *more])


def measured(folder, name="validation_loss"):
    """By step, as the history has it."""
    return {line["step"]: line[name] for line in read_history(folder) if name in line}


def adapter(folder):
    return {name: value.tobytes() for name, value in read_tensors(folder / FILE_NAME)[0].items()}


def test_measuring_changes_nothing_and_is_the_same_when_a_run_goes_on(home):
    held_out = ("--held_out_data_dir", str(home / "held_out"))
    assert train(home, "straight", 6, *MEASURED, *LIVELY, *BEST, *held_out) == 0
    assert train(home, "resumed", 4, *MEASURED, *LIVELY, *BEST, *held_out) == 0
    assert train(home, "resumed", 6, *MEASURED, *LIVELY, *BEST, *held_out) == 0
    assert train(home, "plain", 6, "--checkpointing_steps", "2", *LIVELY) == 0
    straight, resumed = (open_checkpoint(home / name / "checkpoint-6") for name in ("straight", "resumed"))
    assert [one["step"] for one in straight.measured] == [2, 4, 6]
    assert all({"validation_loss", "fidelity"} <= one.keys() for one in straight.measured)
    assert len({one["validation_loss"] for one in straight.measured}) == 3
    assert straight.measured == resumed.measured
    assert measured(home / "straight", "fidelity") == {one["step"]: one["fidelity"] for one in straight.measured}
    assert adapter(home / "straight") == adapter(home / "resumed")
    for step in (2, 4, 6):
        assert adapter(home / "straight" / f"checkpoint-{step}") == adapter(home / "plain" / f"checkpoint-{step}")
    best = max(straight.measured, key=lambda one: one["fidelity"])["step"]
    assert adapter(home / "straight") == adapter(home / "plain" / f"checkpoint-{best}")


def test_the_loss_is_of_the_same_rows_however_a_step_is_cut(home):
    assert train(home, "whole", 2, *MEASURED) == 0
    assert train(home, "cut", 2, *MEASURED, "--train_batch_size", "1", "--gradient_accumulation_steps", "2") == 0
    assert train(home, "held", 2, *MEASURED, "--held_out_data_dir", str(home / "held_out")) == 0
    whole, cut, held = (measured(home / name) for name in ("whole", "cut", "held"))
    assert cut == pytest.approx(whole, rel=1e-5)
    assert whole != held


def test_a_run_that_ended_early_is_whole_and_goes_on_if_it_shall(home, capsys):
    early = ("--validation_loss_steps", "1", "--early_stop", "--early_stop_patience", "2")
    flags = ("--validation_loss", "--checkpointing_steps", "5", *early, "--early_stop_threshold", "0.9999")
    assert train(home, "early", 20, *flags) == 0
    said = capsys.readouterr().err
    step = max(measured(home / "early"))
    assert step < 20
    assert (
        f"over after {step} steps: the validation loss has settled: the variance of the newest 2 of {step} is" in said
    )
    losses = list(measured(home / "early").values())
    ratios = [np.var(losses[n - 2 : n]) / np.var(losses[:n]) for n in range(3, step + 1)]
    assert [ratio < 0.9999 for ratio in ratios] == [False] * (step - 3) + [True]
    assert result_of(home / "early").steps == step
    assert train(home, "early", 20, *flags) == 0
    assert f"trained for {step} steps; nothing left to do" in capsys.readouterr().err

    # A kill before the result was written.
    before = adapter(home / "early")
    (home / "early" / FILE_NAME).unlink()
    assert train(home, "early", 20, *flags) == 0
    assert (adapter(home / "early"), result_of(home / "early").steps) == (before, step)

    assert train(home, "early", step + 2, "--checkpointing_steps", "5") == 0
    assert train(home, "late", step + 2, "--checkpointing_steps", "5") == 0
    assert adapter(home / "early") == adapter(home / "late")


def test_the_best_checkpoint_stays_and_is_the_result(home, capsys, monkeypatch):
    sums, best = iter([8.0, 2.0, 4.0, 6.0]), 4
    monkeypatch.setattr(validation_loss, "math", SimpleNamespace(fsum=lambda losses: next(sums)))
    flags = (*MEASURED, "--keep_best", "loss", "--checkpoints_total_limit", "1")
    assert train(home, "best", 8, *flags) == 0
    assert measured(home / "best") == {2: 2.0, 4: 0.5, 6: 1.0, 8: 1.5}
    folder = home / "best"
    assert f"the best is step {best}; what the last one left is in {folder / 'checkpoint-8'}" in capsys.readouterr().err
    assert [path.name for path in checkpoint_folders(folder)] == [f"checkpoint-{best}", "checkpoint-8"]
    assert adapter(folder) == adapter(folder / f"checkpoint-{best}") != adapter(folder / "checkpoint-8")
    assert read_metadata(folder / FILE_NAME)[STEP_KEY] == str(best)
    assert train(home, "best", 8, *flags) == 0
    assert "trained for 8 steps; nothing left to do" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_before_anything_is_written(home, tmp_path, capsys):
    one, mixed, bare = tmp_path / "one", tmp_path / "mixed", tmp_path / "bare"
    shutil.copytree(home / "held_out", mixed)
    shutil.copy(home / "photographs" / "0.png", mixed / "again.png")
    one.mkdir()
    shutil.copy(home / "held_out" / "5.png", one)
    shutil.copytree(home / "base", bare, ignore=shutil.ignore_patterns("clip"))
    cases = [
        (
            ("--validation_loss", "--held_out_data_dir", str(one)),
            "expected two or more; put another there",
        ),
        (
            ("--validation_loss", "--held_out_data_dir", str(mixed)),
            "again.png trained on, too; keep them in one folder",
        ),
        (
            (*BEST, "--checkpointing_steps", "2", "--pretrained_model_name_or_path", str(bare)),
            "has no CLIP model; name",
        ),
    ]
    for flags, line in cases:
        assert train(home, "refused", 4, *flags) == 2
        assert line in capsys.readouterr().err.splitlines()[-1]
    assert not (home / "refused").exists()

"""A training that a page started: its command, whether it runs, what it says, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from demo import training_process
from demo.library import describe
from demo.processes import REPOSITORY, environment
from demo.subjects import Pictures, Subject
from demo.training_plan import (
    BY_WORDS,
    CONFIGS,
    METHODS,
    PRESETS,
    SMALL,
    TrainingWishes,
    flags,
    preset_files,
    rate_of,
    read_preset,
)
from demo.training_process import Training, arguments_of, new_folder, resume, running, start, trainings
from demo.training_view import POINTS, curve_table
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError, DataError
from dreambooth_ms.training.history import draw_loss

EMBEDDED = REPOSITORY / "checkpoints" / "tiny-shapes"

# Says what `dreambooth-ms train` says, and waits to be stopped.
PROGRAM = """
import signal, sys, time
folder = sys.argv[sys.argv.index("--output_dir") + 1]
steps = int(sys.argv[sys.argv.index("--max_train_steps") + 1])
if steps == 13:
    print("dreambooth-ms: error: --rank: too large", flush=True)
    sys.exit(2)
if steps == 14:
    raise RuntimeError
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
for step in range(1, 4):
    print(f"training:  50%|##   | {step}/{steps} [00:01<00:02,  3.50step/s, instance=0.1]", end="\\r", flush=True)
    with open(folder + "/history.jsonl", "a") as history:
        history.write('{"step": %d, "loss": 0.5, "instance_loss": 0.5, "learning_rate": 0.001}\\n' % step)
time.sleep(60)
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(training_process, "PROGRAM", (sys.executable, "-c", PROGRAM))
    yield tmp_path / "runs"
    for training in trainings(tmp_path / "runs"):
        if training.process_id:
            os.kill(training.process_id, signal.SIGKILL)


def wishes(**changes):
    facts = describe(EMBEDDED)
    preset = read_preset(preset_files(facts)[0])
    return TrainingWishes(
        **{
            "base": EMBEDDED,
            "preset": preset,
            "resolution": 64,
            "buckets": False,
            "side_step": 8,
            "num_class_images": 4,
            "max_train_steps": 6,
            "learning_rate": preset.learning_rate,
            "rank": 4,
            "center_crop": True,
            "train_text_encoder": False,
            "validation_prompts": [],
            "validation_steps": 3,
            "num_validation_images": 1,
            "seed": 0,
        }
        | changes
    )


def subject(**changes):
    own = {"prompt": "a photo of a sks star", "class_prompt": "a photo of a star"}
    return Subject(**{"pictures": Pictures(REPOSITORY / "demo" / "subject")} | own | changes)


def arguments(folder, subjects=None, **changes):
    own = wishes(**changes)
    return arguments_of(flags(own, subjects or [subject()], folder), own.preset.file)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_page_is_a_training_that_can_start(tmp_path, method):
    words = ["<new1>"] if method in BY_WORDS else []
    own = [subject(prompt="a photo of a <new1> star" if words else "a photo of a sks star")]
    rate = rate_of(read_preset(CONFIGS / SMALL), method)
    given = arguments(
        tmp_path, own, method=method, new_words=words, initial_words=["star"] * len(words), learning_rate=rate
    )
    config = load(TrainConfig, given, tell=lambda note: None)
    assert (config.method.method, config.words.words, config.learning_rate) == (method, words, rate)


@pytest.mark.parametrize("name", [SMALL, *(name for names in PRESETS.values() for name in names)])
def test_every_preset_can_be_started_from(name):
    preset = read_preset(CONFIGS / name)
    assert preset.max_train_steps > 0
    assert preset.learning_rate > 0


def test_what_is_filled_in_becomes_a_configuration(tmp_path):
    words = arguments(tmp_path, validation_prompts=["a sks star, 'quoted' --rank 9"], learning_rate=3e-4)
    config = load(TrainConfig, words)
    assert config.validation.validation_prompt == ("a sks star, 'quoted' --rank 9",)
    assert (config.learning_rate, config.method.rank, config.run.max_train_steps) == (3e-4, 4, 6)
    assert config.prior.class_data_dir == str(tmp_path / "class_images")
    assert not load(TrainConfig, arguments(tmp_path, [subject(class_prompt=None)])).prior.with_prior_preservation


def test_a_training_is_followed_stopped_and_taken_up_again(runs):
    folder = new_folder(runs, "my star")
    training = start(folder, arguments(folder))
    wait_for(lambda: len(training.history()) == 3)
    assert training.state == "running"
    assert [report["step"] for report in training.history(after=1)] == [2, 3]
    bar = training.bar()
    assert (bar.name, bar.total, bar.time_left, bar.rate) == ("training", 6, "00:02", "3.50 step/s")
    assert running(runs) == training
    with pytest.raises(ConfigError, match="one at a time"):
        start(new_folder(runs, "another"), arguments(runs / "another"))
    assert not (runs / "another").exists()

    training.stop()
    wait_for(lambda: training.state == "stopped")
    assert running(runs) is None
    assert resume(training).state == "running"
    assert json.loads((folder / "page_command.json").read_text()) == arguments(folder)


def test_a_page_that_comes_later_finds_it(runs):
    folder = new_folder(runs, "star")
    process = start(folder, arguments(folder)).process_id
    assert Training(folder).process_id == process
    assert trainings(runs) == [Training(folder)]


def test_mistakes_are_told_before_anything_is_written(runs):
    folder = new_folder(runs, "star")
    with pytest.raises(ConfigError, match="rank"):
        start(folder, [*arguments(folder), "--rank", "-1"])
    assert not folder.exists()


@pytest.mark.parametrize(
    ("steps", "sentence"), [(13, "--rank: too large"), (14, "for a reason that the page does not")]
)
def test_a_training_that_fails_says_why(runs, steps, sentence):
    folder = new_folder(runs, "star")
    training = start(folder, arguments(folder, max_train_steps=steps))
    wait_for(lambda: training.state == "failed")
    assert sentence in training.errors()[0]


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a\0", "x" * 80, "ends."])
def test_names_are_names(runs, name):
    with pytest.raises(ConfigError, match="expected a name"):
        new_folder(runs, name)


def test_a_name_is_taken_once(runs):
    folder = new_folder(runs, "star")
    start(folder, arguments(folder))
    with pytest.raises(ConfigError, match="there is a training of this name"):
        new_folder(runs, "star")


def test_a_run_of_the_command_line_is_shown_but_not_resumed(runs):
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "config.yaml").write_text("")
    (training,) = trainings(runs)
    assert training.state == "stopped"
    with pytest.raises(DataError, match="its own command"):
        resume(training)


def test_a_run_that_lives_in_a_terminal_is_shown_as_running(runs):
    folder = runs / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("max_train_steps: 8\n")
    program = (
        "import sys, time; from pathlib import Path; from dreambooth_ms.training.run_lock import only_run_in\n"
        "with only_run_in(Path(sys.argv[1]), print): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in\n"
    training = Training(folder)
    assert (training.state, training.process_id, running(runs)) == ("running", process.pid, training)
    assert (training.can_be_stopped, training.can_be_resumed, training.bar()) == (True, False, None)
    (folder / "history.jsonl").write_text('{"step": 3, "loss": 0.5}\n')
    assert (training.bar().name, training.bar().done) == ("training", 3)
    with pytest.raises(ConfigError, match="one at a time"):
        start(new_folder(runs, "another"), arguments(runs / "another"))
    training.stop()
    process.wait()
    assert (training.state, training.can_be_resumed) == ("stopped", False)


def test_curves_have_few_points_and_a_running_mean():
    history = [{"step": step, "instance_loss": step % 2, "class_loss": 1.0} for step in range(1, 1001)]
    table = curve_table(history)
    assert set(table["of"]) == {"subject", "class"}
    assert len(table) <= 2 * POINTS
    middle = table[(table["of"] == "subject") & (table["step"].between(200, 800))]["mean"]
    assert middle.between(0.45, 0.55).all()
    assert curve_table([{"step": 1, "loss": 1.0}]).empty
    several = [{"step": 1, "loss": 4.0, "instance_loss": 1.0, "instance_2_loss": 1.0, "class_loss": 2.0}]
    assert curve_table(several)["of"].tolist() == ["subject", "subject 2", "class"]


def test_subjects_that_take_turns_have_a_curve_each(tmp_path):
    """Of a step with one row only its subject is reported."""
    history = [{"step": step, "loss": 1.0, f"instance{'_2' * (step % 2)}_loss": float(step)} for step in range(1, 7)]
    table = curve_table(history)
    assert {of: list(own["step"]) for of, own in table.groupby("of")} == {"subject": [2, 4, 6], "subject 2": [1, 3, 5]}
    draw_loss(history, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        colours = {colour for count, colour in picture.getcolors(2**20) if count > 100}
    assert {(34, 94, 168), (217, 95, 2)} <= colours


def test_processes_find_the_repository_and_keep_what_the_user_set(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("GLOG_v", "1")
    assert environment()["PYTHONPATH"].split(os.pathsep) == [str(REPOSITORY), "mine"]
    assert environment()["GLOG_v"] == "1"

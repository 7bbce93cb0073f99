"""A run gives the same weights however it is executed: compiled, cached or not, stopped and resumed.

The programs run as users run them, in processes of their own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.open import read_tensors
from dreambooth_ms.training.checkpoint import STATE, find_latest
from dreambooth_ms.training.history import HISTORY
from tests.tiny_model import write_random_model

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 600
STEPS, STOP = 42, 3
"""Enough steps for a signal to come before the last; a checkpoint every third."""

# Sums in another order; measured 8e-8 of A, which starts from draws of size 1, and 1.2e-5 of B, which has gone three
# steps of 5e-4 from zero, in steps that Adam divides by the size of the gradients.
PYNATIVE = {"lora.down": 1e-6, "lora.up": 1e-4}
BETA1 = 0.5


class Place:
    """A folder with a base model and pictures, where commands are run."""

    def __init__(self, root):
        self.root = root
        write_random_model(root / "model", levels=0)
        for group, count in (("dog", 3), ("class", 2)):
            (root / group).mkdir()
            for i in range(count):
                pixels = np.random.default_rng([count, i]).integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(root / group / f"{i}.png")

    def start(self, *arguments, cache=None):
        """Start a training, with the compile cache in a folder or without; MindSpore says what it finds there."""
        kept = {"MS_COMPILER_CACHE_PATH": str(self.root / cache)} if cache else {"MS_COMPILER_CACHE_ENABLE": "0"}
        environment = os.environ | kept | {"MS_SUBMODULE_LOG_v": "{PIPELINE:2}"}
        return subprocess.Popen(
            [sys.executable, "-m", "dreambooth_ms.cli.main", *arguments],
            cwd=self.root,
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, cache=None):
        """The same to its end, which must be a good one."""
        process = self.start(*arguments, cache=cache)
        printed, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, printed
        return printed

    def state(self, name, step):
        """The file with a checkpoint's weights and moments, bit by bit."""
        return (self.root / name / f"checkpoint-{step}" / STATE).read_bytes()

    def adapter(self, name):
        """The matrices of a run's result, bit by bit; the order of the file's metadata is another each time."""
        tensors, _ = read_tensors(self.root / name / FILE_NAME)
        return {layer: matrix.tobytes() for layer, matrix in tensors.items()}

    def history(self, name):
        path = self.root / name / HISTORY
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def train(name, steps, *flags):
    """The command line of a training into the folder `name`."""
    return [
        *("train", "--seed", "7", "--output_dir", name, "--max_train_steps", str(steps)),
        *("--pretrained_model_name_or_path", "model", "--resolution", "32", "--random_flip"),
        *("--instance_data_dir", "dog", "--instance_prompt", "a photo of star", "--train_batch_size", "1"),
        *("--with_prior_preservation", "--class_data_dir", "class", "--class_prompt", "a photo"),
        *("--num_class_images", "2", "--checkpointing_steps", str(STOP)),
        *flags,
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def straight(place):
    """All steps in one go, compiled, without a cache: what every other run is compared with."""
    place.run(*train("straight", STEPS))


@pytest.fixture(scope="module")
def begun(place):
    """The first steps of the same run, compiled into a cache."""
    place.run(*train("parts", STOP), cache="graphs")


@pytest.fixture(scope="module")
def interrupted(place, begun):
    """Some more of its steps, compiled from the cache, until Ctrl-C."""
    process = place.start(*train("parts", STEPS), cache="graphs")
    while len(place.history("parts")) < STOP + 2 and process.poll() is None:
        time.sleep(0.005)
    # Into the middle of the next step.
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=TIMEOUT)
    return SimpleNamespace(status=process.returncode, printed=printed, latest=find_latest(place.root / "parts"))


@pytest.fixture(scope="module")
def resumed(place, interrupted):
    """The rest of its steps, by the same command with its paths spelt otherwise and its pictures under other names."""
    (place.root / "link").symlink_to("model")
    shutil.copytree(place.root / "dog", place.root / "moved")
    (place.root / "moved" / "0.png").rename(place.root / "moved" / "9.png")
    spelling = ("--pretrained_model_name_or_path", "link/", "--instance_data_dir", f"{place.root}/moved")
    return place.run(*train("parts", STEPS, *spelling), cache="graphs")


def test_a_run_that_is_compiled_into_a_cache_is_the_run_without_one(place, straight, begun):
    # The text encoder, the autoencoder's encoder and the step.
    assert len(list(place.root.glob("graphs/*"))) == 3
    assert place.state("parts", STOP) == place.state("straight", STOP)


def test_ctrl_c_ends_a_run_after_a_whole_step_and_saves_it(place, interrupted):
    assert interrupted.status == 130, interrupted.printed
    assert STOP + 2 <= interrupted.latest.step < STEPS
    assert f"stopped; saved parts/checkpoint-{interrupted.latest.step}" in interrupted.printed


def test_a_run_that_is_stopped_twice_and_resumed_from_the_cache_is_the_straight_one(place, straight, resumed):
    """Although the resumed parts compile less: the embeddings are there already."""
    assert resumed.count("Use the compilation cache") == 1
    assert "Failed to load the compilation cache" not in resumed
    assert "resuming from parts/checkpoint-" in resumed
    assert place.state("parts", STEPS) == place.state("straight", STEPS)
    assert place.adapter("parts") == place.adapter("straight")
    assert place.history("parts") == place.history("straight")


def test_the_cache_is_not_used_for_another_configuration(place, begun):
    """The first moments of the first step are (1 - beta1) times the clipped gradients."""
    place.run(*train("other", 1, "--adam_beta1", str(BETA1), "--checkpointing_steps", "1"), cache="graphs")
    tensors, _ = read_tensors(place.root / "other" / "checkpoint-1" / STATE)
    moments = [tensor for name, tensor in tensors.items() if name.startswith("first_moment.")]
    norm = np.sqrt(sum(np.square(moment.astype(np.float64)).sum() for moment in moments))
    # Float32 sums.
    assert norm == pytest.approx((1 - BETA1) * min(place.history("other")[0]["grad_norm"], 1), rel=1e-4)


def test_pynative_trains_the_same_adapter(place, straight):
    place.run(*train("pynative", STOP, "--ms_mode", "1"))
    ours, _ = read_tensors(place.root / "pynative" / FILE_NAME)
    compiled, _ = read_tensors(place.root / "straight" / f"checkpoint-{STOP}" / FILE_NAME)
    assert ours.keys() == compiled.keys()
    for factor, tolerance in PYNATIVE.items():
        a, b = (
            np.concatenate([tensors[name].ravel() for name in sorted(tensors) if factor in name]).astype(np.float64)
            for tensors in (ours, compiled)
        )
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        print(f"PyNative against graph, {factor}: {error:.1e}")
        assert error < tolerance


def test_gradient_checkpointing_trains_the_same_lora_bit_for_bit(place, straight, begun):
    """Weights and moments, and the adapter's file, by another graph of the step."""
    graphs = set(place.root.glob("graphs/*"))
    place.run(*train("recomputed", STOP, "--gradient_checkpointing"), cache="graphs")
    assert len(set(place.root.glob("graphs/*")) - graphs) == 1
    assert place.state("recomputed", STOP) == place.state("straight", STOP)
    adapters = [place.root / name / f"checkpoint-{STOP}" / FILE_NAME for name in ("recomputed", "straight")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_the_same_command_again_does_nothing(place, straight, monkeypatch, capsys):
    def contents():
        return {path: path.read_bytes() for path in (place.root / "straight").rglob("*") if path.is_file()}

    before = contents()
    monkeypatch.chdir(place.root)
    assert main(train("straight", STEPS)) == 0
    assert f"already there, trained for {STEPS} steps; nothing left to do" in capsys.readouterr().err
    assert contents() == before


def test_other_pictures_or_weights_are_refused_by_name(place, resumed, monkeypatch, capsys):
    """Of the whole run as of one that would go on; nothing in the folder changes."""
    monkeypatch.chdir(place.root)
    held = {path: path.stat().st_mtime_ns for path in (place.root / "parts").rglob("*")}
    shutil.copytree("dog", "fewer")
    (place.root / "fewer" / "1.png").unlink()
    shutil.copytree("class", "others")
    write_random_model(place.root / "other", seed=1, levels=0)
    for steps in (STEPS, STEPS + 3):
        other = "instance: 2.png, 9.png removed; instance: 0.png added; instance: 1.png changed"
        for flag, folder, said in (
            ("instance_data_dir", "fewer", "instance: 1.png removed"),
            ("instance_data_dir", "others", other),
            ("pretrained_model_name_or_path", "other", "base: text_encoder, unet, vae changed"),
        ):
            assert main(train("parts", steps, f"--{flag}", folder)) == 2
            assert f"parts/checkpoint-{STEPS}: was trained on other data ({said}); bring" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (place.root / "parts").rglob("*")} == held


def test_a_checkpoint_is_asked_for_by_its_name_in_the_folder(place, straight, monkeypatch, capsys):
    monkeypatch.chdir(place.root)
    assert main(train("straight", 2, "--resume_from_checkpoint", f"checkpoint-{STOP}")) == 2
    assert f"straight/checkpoint-{STOP}: {STOP} steps done, the run would end after 2" in capsys.readouterr().err


def test_another_rank_in_the_same_folder_is_refused_with_both_values(place, straight, monkeypatch, capsys):
    monkeypatch.chdir(place.root)
    assert main(train("straight", STEPS + 1, "--rank", "8")) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "dreambooth-ms: error: straight holds a run with another configuration (--rank: 4 there, 8 here); "
        "choose another --output_dir"
    ]

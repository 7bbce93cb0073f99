"""Whatever ends a run, what it had saved is whole, and the run goes on as if nothing had happened."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.atomic import TEMPORARY_PREFIX, atomic_path, remove_leftovers
from dreambooth_ms.cli import train as train_command
from dreambooth_ms.cli.main import main
from dreambooth_ms.data.batches import Batch
from dreambooth_ms.formats.files.open import read_tensors
from dreambooth_ms.training.checkpoint import STATE, checkpoint_folders, find_latest, open_checkpoint, save_checkpoint
from dreambooth_ms.training.history import HISTORY, read_history
from dreambooth_ms.training.loop import StepReport, stop_requests
from tests.tiny_model import write_random_model

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 900


def leftovers(folder):
    names = [name for _, folders, files in os.walk(folder) for name in folders + files]
    return [name for name in names if name.startswith(TEMPORARY_PREFIX)]


# --- kill -9 while a checkpoint is saved ---

KILLS, KEEP = 60, 2
SAVES = 3
"""So many checkpoints may be saved before a kill, at most."""

SAVER = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from dreambooth_ms.training.checkpoint import save_checkpoint

def parameters(step):
    shapes = {"down": (300, 200), "up": (200, 300), "moment": (120000,)}
    values = {name: np.full(shape, step, np.float32) for name, shape in shapes.items()}
    return [SimpleNamespace(name=name, asnumpy=lambda value=value: value) for name, value in values.items()]

def write_results(folder, step):
    (folder / "unet").mkdir()
    (folder / "unet" / "weights.bin").write_bytes(step.to_bytes(4, "big") * 20000)

def say(text):
    os.write(1, text.encode() + b"\\n")

say("ready")
for line in sys.stdin:
    folder, step, keep = line.split()
    child = os.fork()
    if child == 0:
        say(f"child {os.getpid()}")
        for step in range(int(step), 10**6):
            save_checkpoint(Path(folder), step, parameters(step), "rank: 4", write_results, keep=int(keep))
            say(f"saved {step}")
    os.waitpid(child, 0)
    say("dead")
"""


class Saver:
    """A program that saves one checkpoint after the other, and can be killed again and again.

    It is a copy of a process that has imported everything already, so that starting it takes no time.
    """

    def __init__(self, folder):
        self.folder = folder
        self.seconds = 0.0
        """That a save took last: a disk may be ten times slower from one moment to the next."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", SAVER],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run_and_kill(self, first_step, whole, part):
        """Save a number of checkpoints from a step on, and kill after a part of the time that a save took last.

        Returns the steps that were reported as saved.
        """
        child, start = self._start(first_step), time.monotonic()
        saved = [self._saved_step(self._hear()) for _ in range(whole)]
        if whole:
            self.seconds = (time.monotonic() - start) / whole
        time.sleep(part * self.seconds)
        os.kill(child, signal.SIGKILL)
        while (said := self._hear())[0] != "dead":
            saved.append(self._saved_step(said))
        return saved

    def _saved_step(self, said):
        word, step = said
        assert word == "saved"
        return int(step)

    def _start(self, first_step):
        self.process.stdin.write(f"{self.folder} {first_step} {KEEP}\n")
        self.process.stdin.flush()
        word, child = self._hear()
        assert word == "child"
        return int(child)

    def _hear(self):
        line = self.process.stdout.readline()
        assert line, "the program itself has ended"
        return line.split()

    def end(self):
        self.process.stdin.close()
        self.process.wait(TIMEOUT)


def test_a_kill_at_any_moment_of_saving_costs_no_checkpoint(tmp_path):
    folder, rng = tmp_path / "run", random.Random(0)
    folder.mkdir()
    saver = Saver(folder)
    reported, half_written = max(saver.run_and_kill(1, SAVES, 0.0)), 0
    for attempt in range(KILLS):
        # Every third time a step is saved that is there already, as by a run that was resumed from an older one.
        first = reported if attempt % 3 == 2 else reported + 1
        saved = saver.run_and_kill(first, rng.randrange(SAVES), rng.uniform(0, 1.2))
        reported = max([reported, *saved])
        latest = find_latest(folder)
        assert latest.step >= reported
        tensors, _ = read_tensors(latest.path / STATE)
        assert {value for tensor in tensors.values() for value in np.unique(tensor)} == {latest.step}
        assert (latest.path / "unet" / "weights.bin").read_bytes() == latest.step.to_bytes(4, "big") * 20000
        reported = latest.step
        half_written += bool(leftovers(folder))
        assert len([path for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]) <= 1
        if saved:
            assert len(checkpoint_folders(folder)) <= KEEP + 1
    saver.end()
    print(f"{KILLS} kills, {reported} checkpoints, {half_written} half-written")
    assert reported > 10
    assert half_written > 5, "the kills must meet the program while it writes"
    save_checkpoint(folder, reported + 1, [], "", lambda target, step: None, keep=KEEP)
    assert leftovers(folder) == []
    assert [open_checkpoint(path).step for path in checkpoint_folders(folder)][-1] == reported + 1
    assert len(checkpoint_folders(folder)) == KEEP


def test_a_checkpoint_that_is_replaced_counts_until_the_new_one_is_there(tmp_path, monkeypatch):
    """Killed between the two renames."""

    def killed(path, target):
        if path.is_dir() and TEMPORARY_PREFIX in path.name:
            raise SystemExit
        return replace(path, target)

    replace = Path.replace
    save_checkpoint(tmp_path, 3, [], "first", lambda target, step: None)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "replace", killed)
        save_checkpoint(tmp_path, 3, [], "second", lambda target, step: None)
    assert find_latest(tmp_path).step == 3
    save_checkpoint(tmp_path, 3, [], "third", lambda target, step: None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_killed_programs_left_is_cleared_and_nothing_else(tmp_path):
    for name in (f"{TEMPORARY_PREFIX}a.safetensors", f"unet/{TEMPORARY_PREFIX}b", f"{TEMPORARY_PREFIX}c/state"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    for name in ("partial-run", ".hidden", "unet/weights"):
        (tmp_path / name).write_bytes(b"whole")
    remove_leftovers(tmp_path)
    held = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert held == {"partial-run", ".hidden", "unet", "unet/weights"}
    remove_leftovers(tmp_path / "nowhere")


# --- A disk that is full ---


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only the superuser may mount a disk")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk, leave=0):
    """Write a file until the disk is full, but for so many bytes."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(file.tell() - leave)


def held_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base model and three photographs."""
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "model", levels=0)
    (home / "dog").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(home / "dog" / f"{number}.png")
    return home


def command(output, steps, *flags):
    return [
        *("train", "--pretrained_model_name_or_path", "model", "--instance_data_dir", "dog", "--resolution", "32"),
        *("--instance_prompt", "a photo of star", "--train_batch_size", "1", "--seed", "5"),
        *("--output_dir", str(output), "--max_train_steps", str(steps), *flags),
    ]


@pytest.mark.parametrize(
    ("moment", "method"), [("log", "lora"), ("checkpoint", "lora"), ("result", "lora"), ("result", "full")]
)
def test_a_full_disk_ends_a_run_with_one_line_and_costs_nothing(
    home, small_disk, monkeypatch, capsys, encoded, moment, method
):
    """Steps that take no time stand in for the training. The same command goes on when there is space again."""
    disk_is_full = {"log": (21, 0), "checkpoint": (20, 3 * 4096), "result": (40, 0)}
    full_at, leave = disk_is_full[moment]

    def train(step_cell, make_batch, batches_per_step, learning_rate, steps, hooks, *_):
        for step in steps:
            for hook in hooks:
                hook(StepReport(step + 1, 1.0, {"instance": 1.0}, 1.0, 5e-4))
            if step + 1 == full_at and steps.start == 0:
                fill(small_disk, leave)

    monkeypatch.chdir(home)
    monkeypatch.setattr(train_command, "train", train)
    output = small_disk / "run"
    shutil.copytree(encoded / "cache", output / "cache")
    arguments = command(output, 40, "--method", method, "--checkpointing_steps", "10", "--checkpoints_total_limit", "1")

    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("dreambooth-ms: error: ")]
    assert errors == said[-1:]
    assert "No space left on device" in errors[0]
    assert "free some space" in errors[0]
    latest = find_latest(output)
    assert latest.step == (40 if moment == "result" else 20)
    assert leftovers(output) == []

    (small_disk / "filler").unlink()
    assert main(arguments) == 0
    assert f"resuming from {latest.path}" in capsys.readouterr().err
    assert [line["step"] for line in read_history(output)] == list(range(1, 41))
    assert (output / (FILE_NAME if method == "lora" else "unet/diffusion_pytorch_model.safetensors")).is_file()


@pytest.fixture(scope="module")
def encoded(home, tmp_path_factory):
    """What runs keep of pictures and prompts, made once."""
    folder = tmp_path_factory.mktemp("encoded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(train_command, "train", lambda *arguments: None)
        assert main(command(folder, 40)) == 0
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_disk_without_room_for_the_result_is_found_before_anything_is_written(
    home, small_disk, monkeypatch, capsys, method
):
    monkeypatch.chdir(home)
    fill(small_disk, leave=8 * 4096)
    arguments = command(small_disk / "run", 40, "--method", method, "--checkpointing_steps", "10")
    assert main(arguments) == 2
    assert " are free); free some for 4 checkpoints and the result, or keep fewer by" in capsys.readouterr().err
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_full_disk_costs_no_file_that_was_to_be_replaced(small_disk):
    (small_disk / "adapter").write_bytes(b"old")
    fill(small_disk, leave=4096)
    with (
        pytest.raises(Exception, match=r"No space left on device.*; free some space"),
        atomic_path(small_disk / "adapter") as partial,
    ):
        partial.write_bytes(bytes(10 * 4096))
    assert (small_disk / "adapter").read_bytes() == b"old"
    assert leftovers(small_disk) == []


# --- Stopped and gone on with ---

STEPS, SAVED = 10, 5
"""At one picture a batch, the end of step 5 is in the middle of an epoch of 3 pictures."""


def compared(folder):
    """All that a run leaves behind of its training, bit by bit."""
    state, _ = read_tensors(folder / f"checkpoint-{STEPS}" / STATE)
    return {name: tensor.tobytes() for name, tensor in state.items()}, read_history(folder)


def results(folder):
    return {
        (path.relative_to(folder), name): tensor.tobytes()
        for path in sorted(folder.glob("**/*.safetensors"))
        if not {"cache", *(f.name for f in checkpoint_folders(folder))} & set(path.relative_to(folder).parts)
        for name, tensor in read_tensors(path)[0].items()
    }


LORA = (
    *("--train_text_encoder", "--text_encoder_lr", "1e-4", "--lora_dropout", "0.2", "--use_ema", "--ema_decay", "0.9"),
    *("--gradient_accumulation_steps", "3", "--random_flip", "--checkpointing_steps", str(SAVED)),
)
FULL = (
    *("--method", "full", "--train_text_encoder", "--use_ema", "--ema_decay", "0.9", "--snr_gamma", "5"),
    *("--gradient_accumulation_steps", "2", "--offset_noise", "--checkpointing_steps", str(SAVED)),
)


def test_a_second_ctrl_c_leaves_at_once_and_an_adapter_is_the_same_in_the_end(home, monkeypatch, capsys):
    """In the middle of the accumulation of step 6; two Ctrl-C are two signals in the same step."""
    monkeypatch.chdir(home)
    assert main(command("straight", STEPS, *LORA)) == 0

    taken = []

    def tensors(batch):
        taken.append(batch)
        if len(taken) == 3 * SAVED + 2:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        return whole_tensors(batch)

    whole_tensors = Batch.tensors
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "tensors", tensors)
        assert main(command("stopped", STEPS, *LORA)) == 130
    assert len(taken) == 3 * SAVED + 2
    assert capsys.readouterr().err.endswith("dreambooth-ms: interrupted\n")
    assert find_latest(home / "stopped").step == SAVED
    assert leftovers(home / "stopped") == []

    assert main(command("stopped", STEPS, *LORA)) == 0
    assert compared(home / "stopped") == compared(home / "straight")
    assert results(home / "stopped") == results(home / "straight")

    # Stopped once more, after the last step and before the result was written.
    (home / "stopped" / FILE_NAME).unlink()
    assert main(command("stopped", STEPS, *LORA)) == 0
    assert results(home / "stopped") == results(home / "straight")


def test_a_run_of_all_weights_that_is_killed_is_the_same_in_the_end(home, monkeypatch):
    """kill -9, in the middle of some step after the checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dreambooth_ms.cli.main", *command("killed", 1000, *FULL)],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(read_history(home / "killed")) < SAVED + 2 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL, said
    latest = find_latest(home / "killed")
    assert latest is not None and latest.step >= SAVED

    # The kill may have come after later checkpoints on a slow machine; the run goes on from the first.
    for path in checkpoint_folders(home / "killed"):
        if path.name != f"checkpoint-{SAVED}":
            shutil.rmtree(path)
    monkeypatch.chdir(home)
    assert main(command("killed", STEPS, *FULL)) == 0
    assert main(command("unharmed", STEPS, *FULL)) == 0
    assert compared(home / "killed") == compared(home / "unharmed")
    assert results(home / "killed") == results(home / "unharmed")
    assert (home / "killed" / HISTORY).read_text().count("\n") == STEPS


def test_one_ctrl_c_is_noted_and_a_second_one_leaves_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop_asked:
        signal.raise_signal(signal.SIGINT)
        assert stop_asked()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

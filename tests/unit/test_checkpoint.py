"""A checkpoint is whole or it is not there; what it holds comes back bit by bit, and only to its own training."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from dreambooth_ms.atomic import TEMPORARY_PREFIX, write_bytes
from dreambooth_ms.errors import WeightError
from dreambooth_ms.training import checkpoint as checkpoint_module
from dreambooth_ms.training.checkpoint import (
    FORMAT,
    MANIFEST,
    STATE,
    checkpoint_folders,
    find_latest,
    open_checkpoint,
    restore,
    save_checkpoint,
)

ADAPTER = "adapter.bin"
AWKWARD = np.array([[-0.0, 1e-45, np.finfo(np.float32).max], [np.nan, -np.inf, 1 / 3]], np.float32)
"""Values that only a copy of the bits brings back."""


def parameters(fill=0.0):
    values = {"down": np.full((2, 3), fill), "moment.down": np.full((2, 3), fill), "up": np.full((4,), fill)}
    return [Parameter(Tensor(value.astype(np.float32)), name=name) for name, value in values.items()]


def bits(state):
    return {parameter.name: parameter.asnumpy().tobytes() for parameter in state}


def save(folder, step, fill=None, keep=None, config="rank: 4\n", write_results=None):
    """A checkpoint whose values are its step's number."""
    results = write_results or (lambda target, step: write_bytes(target / ADAPTER, b"adapter of step %d" % step))
    return save_checkpoint(folder, step, parameters(step if fill is None else fill), config, results, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps_held(folder):
    return [open_checkpoint(path).step for path in checkpoint_folders(folder)]


class TestSavingAndRestoring:
    def test_every_bit_comes_back(self, tmp_path):
        state = parameters(0.5)
        state[0].set_data(Tensor(AWKWARD))
        before = bits(state)
        path = save_checkpoint(tmp_path, 7, state, "", lambda target, step: None)
        restored = parameters(0.0)
        assert bits(restored) != before
        restore(open_checkpoint(path), restored)
        assert bits(restored) == before
        assert restored[0].asnumpy().tobytes() == AWKWARD.tobytes()

    def test_a_training_that_goes_on_does_not_change_what_was_saved(self, tmp_path):
        state = parameters(1.0)
        before = bits(state)
        path = save_checkpoint(tmp_path, 1, state, "", lambda target, step: None)
        for parameter in state:
            parameter.set_data(parameter + 1)
        assert bits(state) != before
        restore(open_checkpoint(path), state)
        assert bits(state) == before

    def test_the_folder_holds_state_results_and_a_manifest_of_both(self, tmp_path):
        path = save(tmp_path, 500, config="rank: 8\n")
        assert path == tmp_path / "checkpoint-500"
        assert names(path) == sorted([ADAPTER, MANIFEST, STATE])
        manifest = json.loads((path / MANIFEST).read_text())
        assert (manifest["format"], manifest["step"], manifest["config"]) == (FORMAT, 500, "rank: 8\n")
        assert manifest["files"].keys() == {ADAPTER, STATE}
        assert manifest["files"][ADAPTER]["size"] == len(b"adapter of step 500")

    def test_a_step_that_is_saved_again_takes_the_place_of_the_old(self, tmp_path):
        save(tmp_path, 3, fill=1.0)
        path = save(tmp_path, 3, fill=2.0)
        state = parameters()
        restore(open_checkpoint(path), state)
        assert bits(state) == bits(parameters(2.0))
        assert names(tmp_path) == ["checkpoint-3"]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"up": None}, "1 other parameter, such as up"),
            ({"up": (8,)}, "1 other parameter, such as up"),
            ({"mid": (1,)}, "1 other parameter, such as mid"),
            ({"down": None, "first": (2, 3), "up": (8,)}, "3 other parameters, such as down"),
        ],
        ids=["one fewer", "another shape", "one more", "another network"],
    )
    def test_the_checkpoint_of_another_training_is_refused_with_the_difference(self, tmp_path, change, named):
        shapes = {p.name: tuple(p.shape) for p in parameters()} | change
        state = [Parameter(Tensor(np.ones(shape, np.float32)), name=name) for name, shape in shapes.items() if shape]
        before = bits(state)
        with pytest.raises(WeightError, match=rf"checkpoint-3: belongs to another training \({named}\)"):
            restore(open_checkpoint(save(tmp_path, 3)), state)
        assert bits(state) == before


def truncate(path):
    (path / STATE).write_bytes((path / STATE).read_bytes()[:-1])


def change_one_bit(path):
    content = bytearray((path / STATE).read_bytes())
    content[-1] ^= 1
    (path / STATE).write_bytes(content)


def remove_manifest(path):
    (path / MANIFEST).unlink()


def cut_manifest(path):
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40])


def remove_adapter(path):
    (path / ADAPTER).unlink()


def claim_another_format(path):
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": FORMAT + 1}))


DAMAGES = {
    truncate: f"{STATE} is missing, cut short or changed",
    change_one_bit: f"{STATE} is missing, cut short or changed",
    remove_adapter: f"{ADAPTER} is missing, cut short or changed",
    remove_manifest: f"{MANIFEST} is missing or damaged",
    cut_manifest: f"{MANIFEST} is missing or damaged",
    claim_another_format: f"written in format {FORMAT + 1}, this version reads format {FORMAT}",
}


class TestFindingTheLatest:
    def test_it_is_the_highest_number_not_the_last_name(self, tmp_path):
        for step in (1000, 9, 100):
            save(tmp_path, step)
        assert find_latest(tmp_path).step == 1000
        assert [path.name for path in checkpoint_folders(tmp_path)] == [
            "checkpoint-9",
            "checkpoint-100",
            "checkpoint-1000",
        ]

    @pytest.mark.parametrize(("damage", "said"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
    def test_a_damaged_one_is_named_when_asked_for_and_skipped_otherwise(self, tmp_path, damage, said):
        for step in (1, 2, 3):
            save(tmp_path, step)
        assert find_latest(tmp_path).step == 3
        damage(tmp_path / "checkpoint-3")
        with pytest.raises(WeightError, match=said):
            open_checkpoint(tmp_path / "checkpoint-3")
        assert find_latest(tmp_path).step == 2

    def test_several_damaged_ones_are_skipped(self, tmp_path):
        for step in (1, 2, 3, 4):
            save(tmp_path, step)
        for step, damage in ((2, truncate), (3, change_one_bit), (4, remove_manifest)):
            damage(tmp_path / f"checkpoint-{step}")
        assert find_latest(tmp_path).path == tmp_path / "checkpoint-1"

    def test_nothing_whole_is_nothing(self, tmp_path):
        assert find_latest(tmp_path / "no such folder") is None
        assert find_latest(tmp_path) is None
        truncate(save(tmp_path, 1))
        assert find_latest(tmp_path) is None

    def test_half_written_folders_and_other_names_do_not_count(self, tmp_path):
        path = save(tmp_path, 1)
        for name in (f"{TEMPORARY_PREFIX}checkpoint-5", "checkpoint-5.bak", "checkpoint-", "my-checkpoint-5"):
            shutil.copytree(path, tmp_path / name)
        assert checkpoint_folders(tmp_path) == [path]
        assert find_latest(tmp_path).path == path


class TestKeeping:
    def test_the_two_newest_stay(self, tmp_path):
        held = []
        for step in (8, 9, 10, 11):
            save(tmp_path, step, keep=2)
            held.append(steps_held(tmp_path))
        assert held == [[8], [8, 9], [9, 10], [10, 11]]

    def test_all_stay_when_nothing_is_said(self, tmp_path):
        for step in (1, 2, 3):
            save(tmp_path, step)
        assert steps_held(tmp_path) == [1, 2, 3]

    def test_old_ones_go_only_when_the_new_one_is_there(self, tmp_path, monkeypatch):
        present = []

        def watched(path, *args, **kwargs):
            present.append((Path(path).name, steps_held(tmp_path)))
            return remove(path, *args, **kwargs)

        remove = shutil.rmtree
        save(tmp_path, 1)
        monkeypatch.setattr(checkpoint_module.shutil, "rmtree", watched)
        save(tmp_path, 2, keep=1)
        assert [held for name, held in present if name == "checkpoint-1"] == [[1, 2]]
        assert steps_held(tmp_path) == [2]

    def test_a_new_one_that_fails_costs_no_old_one(self, tmp_path):
        for step in (1, 2):
            save(tmp_path, step, keep=2)

        def full_disk(target, step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(WeightError, match=r"checkpoint-3: cannot be written \(No space left on device\)"):
            save(tmp_path, 3, keep=2, write_results=full_disk)
        assert steps_held(tmp_path) == [1, 2]
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]

    def test_a_step_that_cannot_be_saved_again_is_still_there(self, tmp_path, monkeypatch):
        save(tmp_path, 3, fill=1.0)

        def refuse(path, target):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(checkpoint_module.Path, "rename", refuse)
        with pytest.raises(WeightError, match=r"checkpoint-3: cannot be written \(Input/output error\)"):
            save(tmp_path, 3, fill=2.0)
        assert steps_held(tmp_path) == [3]

    def test_an_older_training_that_goes_on_keeps_what_it_just_wrote(self, tmp_path):
        """Resumed from checkpoint 1 by name, in a folder that holds later ones."""
        for step in (1, 8, 9):
            save(tmp_path, step)
        path = save(tmp_path, 2, keep=2)
        assert path.is_dir()

    def test_an_interrupt_leaves_nothing_half_written(self, tmp_path):
        def interrupted(target, step):
            assert names(tmp_path) != []
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, write_results=interrupted)
        assert names(tmp_path) == []


class TestUnwritableFolders:
    def test_a_file_in_the_way_is_a_clear_error(self, tmp_path):
        (tmp_path / "run").write_text("a file")
        with pytest.raises(WeightError, match="run/checkpoint-1: cannot be written"):
            save(tmp_path / "run", 1)

    def test_a_folder_without_permission_is_a_clear_error(self, tmp_path, monkeypatch):
        """Refused by the system call, because the superuser is refused nowhere."""

        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        with pytest.raises(WeightError, match=r"checkpoint-1: cannot be written \(Permission denied\)"):
            save(tmp_path, 1)
        assert names(tmp_path) == []

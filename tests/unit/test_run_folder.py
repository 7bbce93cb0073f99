"""Who may train in a folder, what a run that goes on must find there, and what is told before it starts."""

import errno
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dreambooth_ms.cli import training_needs
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.cli.training_pictures import check_same_pictures
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.records import INSTANCE, Concept, Record
from dreambooth_ms.errors import ConfigError, DataError, WeightError, count_of
from dreambooth_ms.processes.group import ALONE, Processes
from dreambooth_ms.training import run_lock
from dreambooth_ms.training.checkpoint import MANIFEST, Checkpoint, open_checkpoint, save_checkpoint
from dreambooth_ms.training.content import changes, content_of, digests_of, in_order
from dreambooth_ms.training.history import HISTORY, round_ticks
from dreambooth_ms.training.run_folder import check_data, settle_config, write_config
from dreambooth_ms.training.run_lock import INHERITED, LOCK, Runner, only_run_in, runner_of, sign, take_lock
from dreambooth_ms.weights.bundle import open_bundle
from tests.tiny_model import write_random_model

HOLDER = """
import sys, time
from pathlib import Path
from dreambooth_ms.training.run_lock import only_run_in
with only_run_in(Path(sys.argv[1]), print):
    print("in", flush=True)
    time.sleep(60)
"""


def hold(folder, **more):
    """Another process that is at work in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ.copy(), **more
    )
    assert process.stdout.readline() == "in\n"
    return process


class TestOneRunInAFolder:
    def test_a_second_is_refused_by_name_until_the_first_ends_however_it_ends(self, tmp_path):
        process = hold(tmp_path)
        try:
            assert runner_of(tmp_path) == Runner(process.pid, platform.node())
            assert runner_of(tmp_path).is_here
            with pytest.raises(ConfigError, match=f"process {process.pid} on .* is training in it; wait for its end"):
                take_lock(tmp_path)
        finally:
            process.kill()
            process.wait()
        assert runner_of(tmp_path) is None
        with only_run_in(tmp_path, pytest.fail):
            assert runner_of(tmp_path) == Runner(os.getpid(), platform.node())
        assert list(tmp_path.iterdir()) == []

    def test_who_starts_a_training_hands_its_lock_over(self, tmp_path):
        with take_lock(tmp_path) as lock, pytest.MonkeyPatch.context() as patch:
            patch.setenv(INHERITED, str(lock.fileno()))
            sign(lock, 7)
            process = hold(tmp_path, pass_fds=[lock.fileno()])
        assert runner_of(tmp_path) == Runner(process.pid, platform.node())
        process.kill()
        process.wait()
        assert runner_of(tmp_path) is None

    def test_who_only_looks_hinders_nobody(self, tmp_path, monkeypatch):
        (tmp_path / LOCK).touch()
        with (tmp_path / LOCK).open("rb") as looking:
            run_lock.fcntl.flock(looking, run_lock.fcntl.LOCK_SH)
            monkeypatch.setattr(time, "sleep", lambda seconds: looking.close())
            take_lock(tmp_path).close()

    def test_a_file_that_the_one_before_removed_is_no_lock(self, tmp_path, monkeypatch):
        def lock_late(file, operation):
            monkeypatch.undo()
            (tmp_path / LOCK).unlink()

        monkeypatch.setattr(run_lock.fcntl, "flock", lock_late)
        with take_lock(tmp_path), pytest.raises(ConfigError, match="is training in it"):
            take_lock(tmp_path)

    def test_a_file_system_without_locks_is_told_and_trained_on(self, tmp_path, monkeypatch):
        def without_locks(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(run_lock.fcntl, "flock", without_locks)
        said = []
        with only_run_in(tmp_path, said.append):
            pass
        assert said == [
            f"{tmp_path}: its file system has no locks (No locks available); start no second training in it"
        ]

    def test_another_machine_is_named_and_not_taken_for_this_one(self, tmp_path, monkeypatch):
        with take_lock(tmp_path) as lock, monkeypatch.context() as patch:
            patch.setattr(platform, "node", lambda: "elsewhere")
            sign(lock, 7)
            patch.undo()
            assert runner_of(tmp_path) == Runner(7, "elsewhere")
            assert not runner_of(tmp_path).is_here
            with pytest.raises(ConfigError, match="process 7 on elsewhere is training in it"):
                take_lock(tmp_path)


def concept(**digests):
    """Pictures by name, each with its digest."""
    return Concept(INSTANCE, tuple(Record(path_of(name), digest, (9, 9), ("",)) for name, digest in digests.items()))


def path_of(name):
    return run_lock.Path("pictures") / name


BASE = {"unet": "u", "vae": "v"}
BEFORE = content_of(BASE, [concept(a="1", b="2", c="1")])


class TestContent:
    @pytest.mark.parametrize(
        ("base", "pictures", "said"),
        [
            (BASE, {"a": "1", "b": "2", "c": "1"}, []),
            (BASE, {"x": "2", "y": "1", "z": "1"}, []),
            (BASE, {"a": "1", "b": "2"}, ["instance: c removed"]),
            (BASE, {"a": "1", "b": "2", "c": "1", "d": "4"}, ["instance: d added"]),
            (BASE, {"a": "1", "b": "3", "c": "1"}, ["instance: b changed"]),
            (BASE | {"unet": "w"}, {"a": "1", "b": "2", "c": "1"}, ["base: unet changed"]),
            (BASE, {}, ["instance: a, b, c removed"]),
            (BASE, {"c": "1", "x": "2"}, ["instance: a removed"]),
            (BASE, {"x": "2", "y": "5", "z": "1"}, ["instance: c removed", "instance: y added"]),
            (BASE, {f"n{i}": f"{i}" for i in range(7)} | {"a": "1", "b": "2", "c": "1"},
             ["instance: n0, n1, n2, n3, n4 and 2 more added"]),
        ],
    )  # fmt: skip
    def test_what_is_not_as_it_was_is_named(self, base, pictures, said):
        assert changes(BEFORE, content_of(base, [concept(**pictures)])) == said

    def test_what_is_yet_to_be_made_is_not_missed(self):
        now = content_of(BASE, [concept(a="1", b="2")])
        assert changes(BEFORE, now, to_come={INSTANCE: ["c", "d"]}) == []

    def test_renamed_pictures_keep_their_places_in_the_run(self):
        """Equal pictures too, which count as often as they are there."""
        renamed = in_order(concept(x="1", y="1", z="2"), BEFORE)
        assert [record.digest for record in renamed.records] == ["1", "2", "1"]
        others = concept(x="1", y="3")
        assert in_order(others, BEFORE) is others
        assert in_order(others, {}) is others

    def test_a_manifest_holds_it(self, tmp_path):
        path = save_checkpoint(tmp_path, 3, [], "", lambda target, step: None, content=BEFORE)
        assert open_checkpoint(path).content == BEFORE
        (path / MANIFEST).write_text('{"format": 1, "step": 3, "files": {}, "content": [1]}')
        with pytest.raises(WeightError, match="missing or damaged"):
            open_checkpoint(path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that was trained with these paths, as its folder knows it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to("pictures")
    write_config(settle_config(configuration()))
    (tmp_path / "out" / HISTORY).touch()
    return tmp_path


def configuration(*flags, pictures="pictures"):
    required = [
        "--pretrained_model_name_or_path",
        "owner/base",
        "--instance_prompt",
        "a sks dog",
        "--output_dir",
        "out",
    ]
    return load(TrainConfig, [*required, "--instance_data_dir", str(pictures), "--seed", "1", *flags])


class TestGoingOn:
    @pytest.mark.parametrize("spelling", ["pictures", "pictures/", "./pictures", "link", "{}/pictures"])
    def test_without_content_another_spelling_of_a_path_is_the_same(self, run, spelling):
        config = configuration(pictures=spelling.format(run))
        assert settle_config(config)
        check_data(config, None, {}, (), pytest.fail)

    def test_without_content_another_path_is_refused_or_accepted(self, run):
        """As of a checkpoint of the version before."""
        earlier = Checkpoint(run / "out" / "checkpoint-4", 4)
        with pytest.raises(
            ConfigError, match=r"other data \(--instance_data_dir: 'pictures' there, 'dog' here\); bring"
        ):
            check_data(configuration(pictures="dog"), earlier, BEFORE, (), pytest.fail)
        said = []
        check_data(configuration("--accept_changed_data", pictures="dog"), earlier, BEFORE, (), said.append)
        assert said == ["out: going on with changed data (--instance_data_dir: 'pictures' there, 'dog' here)"]

    def test_with_content_paths_do_not_count_and_content_does(self, run):
        checkpoint = Checkpoint(run / "out" / "checkpoint-4", 4, BEFORE)
        moved, now = configuration(pictures="dog"), content_of(BASE, [concept(a="1", b="2")])
        assert settle_config(moved)
        check_data(moved, checkpoint, BEFORE, (), pytest.fail)
        with pytest.raises(
            ConfigError, match=r"checkpoint-4: was trained on other data \(instance: c removed\); bring"
        ):
            check_data(moved, checkpoint, now, (), pytest.fail)
        said = []
        check_data(configuration("--accept_changed_data"), checkpoint, now, (), said.append)
        assert said == ["out: going on with changed data (instance: c removed)"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    write_random_model(folder)
    return open_bundle(folder)


class TestRoomOnTheDisk:
    @pytest.mark.parametrize(
        ("flags", "done", "checkpoints"),
        [
            ([], 0, 4),
            ([], 250, 2),
            (["--checkpoints_total_limit", "2"], 0, 3),
            (["--checkpoints_total_limit", "1"], 300, 1),
            (["--method", "full"], 0, 4),
        ],
    )
    def test_what_is_needed_is_what_will_be_kept(self, base, tmp_path, monkeypatch, flags, done, checkpoints):
        asked = []
        monkeypatch.setattr(training_needs, "check_room", lambda place, size, advice: asked.append((size, advice)))
        config = configuration("--checkpointing_steps", "100", "--max_train_steps", "400", *flags)
        config = replace(config, run=replace(config.run, output_dir=str(tmp_path)))
        training_needs.check_expected_disk(TrainingJob(ALONE, config, base, checkpoint=Checkpoint(tmp_path, done)))
        ((size, advice),) = asked
        trained = training_needs._workload(config, base, 1).numbers[1]
        # Weights, their copy for other tools, and two moments.
        rest = size - checkpoints * 4 * 4 * trained
        assert advice.startswith(f"free some for {count_of(checkpoints, 'checkpoint')} and the result")
        assert rest == 4 * trained if flags[-1:] != ["full"] else rest > 4 * trained


@pytest.mark.parametrize(
    ("flags", "total", "said"),
    [
        (["--max_train_steps", "2"], 2, "2 steps in all will hardly teach anything"),
        ([], 1, "1 step in all will hardly teach anything, some hundred are usual; give --max_train_steps"),
        (["--lr_scheduler", "cosine"], 200, "--lr_warmup_steps 500: the learning rate never arrives at its value"),
        (["--max_train_steps", "200"], 200, ""),
    ],
)
def test_a_run_that_can_teach_nothing_is_told_of(capsys, flags, total, said):
    training_needs.warn_of_little(SimpleNamespace(config=configuration(*flags), total=total))
    told = capsys.readouterr().err
    assert said in told
    assert bool(told) == bool(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--class_prompt", "a dog, sks"], "the subject has no name of its own; add a rare word"),
        (["--class_prompt", "a dog"], ""),
        (["--train_text_encoder"], "the default learning rate of 0.0005 is the UNet's"),
        (["--train_text_encoder", "--learning_rate", "5e-4"], ""),
        (["--train_text_encoder", "--text_encoder_lr", "5e-6"], ""),
        (["--train_text_encoder", "--method", "full"], ""),
        (["--train_text_encoder", "--optimizer", "prodigy"], ""),
    ],
)
def test_settings_that_teach_nothing_or_spoil_are_told_of(flags, said):
    told = []
    required = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "d", "--instance_prompt", "a sks dog"]
    preserved = ["--with_prior_preservation", "--class_data_dir", "c"] if "--class_prompt" in flags else []
    load(TrainConfig, [*required, *flags, *preserved], told.append)
    assert said in "".join(told)
    assert bool(told) == bool(said)


@pytest.mark.parametrize(
    ("highest", "labels"),
    [
        (0.34, "0.00 0.05 0.10 0.15 0.20 0.25 0.30"),
        (1.05, "0.0 0.2 0.4 0.6 0.8 1.0"),
        (3, "0.0 0.5 1.0 1.5 2.0 2.5 3.0"),
        (1200, "0 200 400 600 800 1000 1200"),
        (7.1, "0 2 4 6"),
    ],
)
def test_ticks_are_round(highest, labels):
    assert " ".join(label for _, label in round_ticks(highest)) == labels


def test_one_is_singular():
    assert [count_of(number, "picture") for number in (0, 1, 2, 1200)] == [
        *("0 pictures", "1 picture", "2 pictures", "1,200 pictures"),
    ]


def test_processes_that_found_other_captions_are_told():
    """On two machines the pictures may be the same, and what stands beside them not."""
    mine = Concept(INSTANCE, tuple(Record(path_of(name), name, (9, 9), (f"a {name}",)) for name in "ab"))
    other = replace(mine, records=(mine.records[0], replace(mine.records[1], captions=("another",))))
    both = [digests_of(mine), digests_of(other)]
    pair = Processes(rank=0, count=2, exchange=lambda what, value: both)
    with pytest.raises(DataError, match="rank 1 found other pictures than rank 0"):
        check_same_pictures(pair, [mine])
    check_same_pictures(replace(pair, exchange=lambda what, value: [value, value]), [mine])

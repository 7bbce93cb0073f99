"""A training as a process of its own: started, followed, stopped and taken up again.

The process is `dreambooth-ms train` and needs no page: it goes on when the browser or the server is closed. Whether one
runs, of this page or in a terminal, is known from the lock that each holds on its folder; the page takes it first and
hands it over, so that there is no moment without.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from demo.library import ADAPTERS, RUN_CONFIG, words_of
from demo.processes import environment
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError, DataError
from dreambooth_ms.formats.folder_layout import INDEX
from dreambooth_ms.sampling.picture_file import validation_pictures
from dreambooth_ms.training.run_lock import INHERITED, Runner, runner_of, sign, take_lock

COMMAND, LOG = "page_command.json", "page_training.log"
HISTORY, VALIDATION, STRIP = "history.jsonl", "validation", "over_time.png"
PROGRAM = (sys.executable, "-m", "dreambooth_ms.cli.main", "train")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,59}")
_BAR = re.compile(r"([a-z ]+): +\d+%\|.*?\| (\d+)/(\d+) \[([\d:]+)<([\d:?]+), +([\d.]+|\?)([^,\]]*)")
_ERROR, _CRASH = "dreambooth-ms: error: ", "Traceback (most recent call last)"
_UNKNOWN = "The training ended for a reason that the page does not know; what it said last is below."

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Bar:
    """Where a part of the work is, as its progress bar says."""

    name: str
    """What is being done: class pictures, encoding pictures, training."""
    done: int
    total: int
    time_left: str
    rate: str


@dataclass(frozen=True)
class Training:
    """A training's folder."""

    folder: Path

    @property
    def name(self) -> str:
        """As the page shows it."""
        return self.folder.name

    @property
    def state(self) -> State:
        """What it does."""
        if self.runner is not None:
            return "running"
        if self.has_result:
            return "finished"
        return "failed" if self.errors() else "stopped"

    @property
    def has_result(self) -> bool:
        """Whether there is something to sample with."""
        return any((self.folder / name).is_file() for name in (*ADAPTERS, INDEX)) or bool(words_of(self.folder))

    @property
    def process_id(self) -> int | None:
        """Of the running process; None if it does not run. It may be one of another machine: see `runner`."""
        return self.runner.process_id if self.runner else None

    @property
    def runner(self) -> Runner | None:
        """Who trains in the folder, started by a page or in a terminal; None if nobody does."""
        return runner_of(self.folder)

    @property
    def can_be_stopped(self) -> bool:
        """Whether it runs on this machine."""
        return self.runner is not None and self.runner.is_here

    @property
    def is_of_a_page(self) -> bool:
        """Whether a page started it, so that its command is known."""
        return (self.folder / COMMAND).is_file()

    @property
    def can_be_resumed(self) -> bool:
        """Whether the page can give its command again."""
        return self.runner is None and self.is_of_a_page

    def stop(self) -> None:
        """Let it finish its step, save and end."""
        runner = self.runner
        if runner and runner.is_here:
            os.kill(runner.process_id, signal.SIGTERM)

    def history(self, after: int = 0) -> list[dict[str, float]]:
        """The reports of the steps after one, as far as they are written."""
        try:
            text = (self.folder / HISTORY).read_text(encoding="utf-8")
        except OSError:
            return []
        reports = []
        for line in text.splitlines():
            try:
                report = json.loads(line)
            except ValueError:
                break
            if report["step"] > after:
                reports.append(report)
        return reports

    def validation_pictures(self) -> dict[int, list[Path]]:
        """The pictures sampled during training, by step."""
        return validation_pictures(self.folder / VALIDATION)

    def strip(self) -> list[Path]:
        """The sheet that shows every prompt through the run, if there is one."""
        return [path for path in [self.folder / VALIDATION / STRIP] if path.is_file()]

    def bar(self) -> Bar | None:
        """The newest progress bar in its log; of a run that a terminal shows, where its steps are."""
        bars = _BAR.findall(self.log())
        if not bars:
            history = [] if self.runner is None or (self.folder / LOG).exists() else self.history()
            done = int(history[-1]["step"]) if history else 0
            return Bar("training", done, self._total() or 0, "?", "–") if history else None
        name, done, total, _, left, number, unit = bars[-1]
        return Bar(name.strip(), int(done), int(total), left, f"{number} {unit}".strip())

    def _total(self) -> int | None:
        """The steps that its configuration asks for."""
        with suppress(OSError, ConfigError):
            return load(TrainConfig, ["--config", str(self.folder / RUN_CONFIG)], lambda note: None).run.max_train_steps
        return None

    @property
    def compiling(self) -> str | None:
        """What its command says of what it compiles just now."""
        last = self.log().rstrip().rpartition("\n")[2]
        return last if last.startswith("compiling ") else None

    def errors(self) -> list[str]:
        """What its command complained about, in its own sentences."""
        log = self.log()
        lines = [line.removeprefix(_ERROR) for line in log.splitlines() if line.startswith(_ERROR)]
        return lines or ([_UNKNOWN] if _CRASH in log else [])

    def log(self, most: int = 20_000) -> str:
        """The end of what it has said."""
        try:
            with (self.folder / LOG).open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - most, 0))
                return file.read().decode(errors="replace").replace("\r", "\n")
        except OSError:
            return ""

    def arguments(self) -> list[str]:
        """What it was started with.

        Raises:
            DataError: it was not started by a page.
        """
        try:
            return list(map(str, json.loads((self.folder / COMMAND).read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{self.folder}: not started from this page; go on with its own command") from error


def trainings(runs: Path) -> list[Training]:
    """The trainings in the folder of runs, the newest first."""
    folders = [path.parent for path in runs.glob(f"*/{RUN_CONFIG}")] + [
        path.parent for path in runs.glob(f"*/{COMMAND}")
    ]
    return [Training(folder) for folder in sorted(set(folders), key=lambda f: f.stat().st_mtime, reverse=True)]


def running(runs: Path) -> Training | None:
    """The training that runs; there is one at a time."""
    return next((training for training in trainings(runs) if training.runner is not None), None)


def new_folder(runs: Path, name: str) -> Path:
    """The folder of a new training.

    Raises:
        ConfigError: not a name for a folder, or taken.
    """
    if not _NAME.fullmatch(name) or name.endswith((" ", ".")):
        raise ConfigError(f"{name or 'no name'}: expected a name of letters, digits, spaces, dots and dashes")
    folder = runs / name
    if folder.exists():
        raise ConfigError(f"{name}: there is a training of this name; choose another, or go on with that one")
    return folder


def arguments_of(values: Mapping[str, Any], config: Path) -> list[str]:
    """The command line of a training.

    Args:
        values: flags of `dreambooth-ms train` by name; a list is a flag for each of it; None leaves one out.
        config: a YAML file that they are put on top of.
    """
    given = {name: value if isinstance(value, list) else [value] for name, value in values.items() if value is not None}
    return [
        "--config",
        str(config),
        *(word for name, of in given.items() for one in of for word in (f"--{name}", str(one))),
    ]


def check(arguments: Sequence[str]) -> list[str]:
    """What `dreambooth-ms check` says of a training, in lines; nothing is written."""
    command = [*PROGRAM[:-1], "check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment())
    errors = [line.removeprefix(_ERROR) for line in done.stderr.splitlines() if line.startswith(_ERROR)]
    return done.stdout.splitlines() or errors or [_UNKNOWN]


def start(folder: Path, arguments: Sequence[str]) -> Training:
    """Start a training into its folder, which its arguments name as --output_dir.

    Raises:
        ConfigError: the arguments are wrong, or another training runs; nothing was written.
    """
    load(TrainConfig, arguments)
    _check_alone(folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMAND).write_text(json.dumps(list(arguments), indent=1), encoding="utf-8")
    return launch(folder, arguments)


def resume(training: Training) -> Training:
    """Give a training's command again: it goes on from its newest checkpoint.

    Raises:
        ConfigError: another training runs.
        DataError: it was not started by a page.
    """
    return launch(training.folder, training.arguments())


def launch(folder: Path, arguments: Sequence[str]) -> Training:
    """Start the process of a training; its folder's lock goes over to it."""
    _check_alone(folder.parent)
    with take_lock(folder) as lock, (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            env=environment() | {INHERITED: str(lock.fileno())},
            # A Ctrl-C in the server's terminal is not meant for the training.
            start_new_session=True,
        )
        sign(lock, process.pid)
    threading.Thread(target=process.wait, daemon=True, name="training").start()
    return Training(folder)


def _check_alone(runs: Path) -> None:
    other = running(runs)
    if other:
        raise ConfigError(f"{other.name} is being trained; one at a time, or both take twice as long")

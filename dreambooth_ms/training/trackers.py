"""Where a run is shown while it goes on: TensorBoard's files, and services, each by its own library. A run never
depends on them; its own record is `history.jsonl`."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from importlib.util import find_spec
from secrets import token_hex
from textwrap import indent, shorten
from typing import Any

import numpy as np
import yaml
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dreambooth_ms.atomic import write_bytes
from dreambooth_ms.config.load import to_yaml
from dreambooth_ms.config.train import PROJECTS, TrainConfig
from dreambooth_ms.errors import ConfigError, Tell
from dreambooth_ms.training.history import values_of, writing_log
from dreambooth_ms.training.loop import StepReport

TENSORBOARD, IDS = "tensorboard", "trackers.json"
"""IDS is in a run's folder: service -> the id by which it knows the run, and the last step that it was sent before."""


class TensorBoard:
    """Writes files that TensorBoard reads, of a run that goes on after `done` steps. tensorboardX's own writer is a
    thread, which a full disk ends, and the training would wait for it forever. Raises WeightError if the folder cannot
    be made."""

    name = TENSORBOARD

    def __init__(self, config: TrainConfig, done: int) -> None:
        self._folder, self._done = config.output_dir / config.run.logging_dir, done
        with writing_log(config.output_dir):
            self._folder.mkdir(parents=True, exist_ok=True)

    def start(self, config: Mapping[str, Any]) -> None:
        self._board = EventsWriter(str(self._folder / "events"), f".{self._done}")
        # Hides what an interrupted run had logged of later steps.
        self._show(self._done + 1, file_version="brain.Event:2")
        self._show(self._done + 1, session_log=SessionLog(status=SessionLog.START))
        # Markdown leaves lines as they are that are indented.
        text = indent(yaml.safe_dump(config, sort_keys=False), "    ")
        self._show(self._done, summary=summary.text("config", text))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        entries = [entry for name, value in values.items() for entry in summary.scalar(name, value).value]
        self._show(step, summary=summary.Summary(value=entries))

    def images(self, step: int, tag: str, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            shown = summary.image(f"{tag}/{number}", picture, dataformats="HWC")
            shown.value[0].metadata.summary_description = caption
            self._show(step, summary=shown)

    def finish(self) -> None:
        with suppress(OSError):
            self._board.close()

    def _show(self, step: int, **content: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **content))
        self._board.flush()


SERVICES: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "wandb": lambda name, own, folder: {"name": name, "id": own, "dir": folder, "settings": {"console": "off"}},
    "swanlab": lambda name, own, folder: {"experiment_name": name, "id": own, "logdir": f"{folder}/swanlog"},
    "trackio": lambda name, own, folder: {"name": f"{name}-{own[:6]}"},
}
"""Service -> what its `init` is given beside what all are, of a run's name, id and folder. trackio has names alone."""


class Service:
    """A library that has wandb's calls: init, log, Image, finish. A run that goes on is the same run there, and what an
    interrupted one had sent, up to step `reached`, is not sent again."""

    def __init__(self, name: str, config: TrainConfig, reached: int) -> None:
        self.name, self._config, self._reached = name, config, reached

    def start(self, config: Mapping[str, Any]) -> None:
        self._library, run, folder = import_module(self.name), self._config.run, self._config.output_dir
        kept: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            kept = json.loads((folder / IDS).read_bytes())
        # An id that every version of swanlab takes. A run keeps the name that it began with.
        first = [token_hex(16)[:21], run.tracker_run_name or folder.absolute().name, 0]
        own, name, sent = kept.get(self.name, first)
        self._sent = max(sent, self._reached) if self.name in kept else 0
        write_bytes(folder / IDS, json.dumps(kept | {self.name: [own, name, self._sent]}).encode())
        project = run.tracker_project_name or PROJECTS[self._config.method.method]
        more = SERVICES[self.name](name, own, str(folder))
        self._library.init(project=project, config=config, resume="allow", **more)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self._sent:
            self._library.log(values, step=step)

    def images(self, step: int, tag: str, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        shown = [self._library.Image(one, caption=own) for one, own in zip(pictures, captions, strict=True)]
        self.scalars(step, {f"{tag}/{number}": picture for number, picture in enumerate(shown)})

    def finish(self) -> None:
        self._library.finish()


def installed_trackers(wanted: Sequence[str]) -> list[str]:
    """The trackers that --report_to names. Raises ConfigError if one of them is not installed."""
    # A folder of that name, such as wandb leaves, is a package without an origin.
    there = [TENSORBOARD, *(name for name in SERVICES if (spec := find_spec(name)) and spec.origin)]
    named = there if wanted == ["all"] else [name for name in dict.fromkeys(wanted) if name != "none"]
    if missing := " ".join(name for name in named if name not in there):
        raise ConfigError(f"--report_to {missing}: not installed; pip install {missing}")
    return named


class Trackers:
    """Those that --report_to names, of a run that goes on after `done` steps and was once logged up to `reached`. One
    that fails is told once, and left out from then on: the training goes on without it."""

    def __init__(self, config: TrainConfig, done: int, reached: int, tell: Tell) -> None:
        self._tell, self._last = tell, time.monotonic()
        names = installed_trackers(config.run.report_to)
        # Each has start(config), scalars, images and finish, and may raise whatever its library raises.
        self._own: list[TensorBoard | Service] = [Service(one, config, reached) for one in names if one in SERVICES]
        if TENSORBOARD in names:
            self._own.append(TensorBoard(config, done))
        values = yaml.safe_load(to_yaml(config))
        self._each(lambda one: one.start(values))

    def log(self, report: StepReport) -> None:
        """A hook: show the step, and the seconds since the last one or its pictures."""
        before, self._last = self._last, time.monotonic()
        values = values_of(report) | {"step_seconds": self._last - before}
        self._each(lambda one: one.scalars(report.step, values))

    def images(self, step: int, tag: str, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> None:
        """Show pictures, each (H, W, 3) uint8, as they were after a step, each with its caption."""
        self._each(lambda one: one.images(step, tag, pictures, captions))
        self._last = time.monotonic()

    def close(self) -> None:
        """End all of them."""
        self._each(lambda one: one.finish())

    def _each(self, call: Callable[[TensorBoard | Service], None]) -> None:
        # Libraries send the command line, which may hold a token. What they print is no result.
        words, sys.argv = sys.argv, sys.argv[:1]
        for one in list(self._own):
            try:
                with redirect_stdout(sys.stderr):
                    call(one)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - libraries fail in their own ways.
                self._own.remove(one)
                reason = shorten(str(error), 200).rstrip(".") or type(error).__name__
                self._tell(f"{one.name}: {reason}; the training goes on without it")
        sys.argv = words

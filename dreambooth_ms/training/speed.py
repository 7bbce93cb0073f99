"""How long steps took on this machine: kept beside the compile cache, for an estimate of the next run."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dreambooth_ms.atomic import write_bytes
from dreambooth_ms.errors import WeightError
from dreambooth_ms.runtime.compile_cache import compile_cache, default_folder
from dreambooth_ms.training.loop import StepReport

MOST_STEPS = 200
"""The newest that are kept."""


class Speed(NamedTuple):
    """What was measured on this machine. All in seconds."""

    steps: list[float]
    compilation: float
    """How much longer than the others the first step of a run took at most."""

    @property
    def of_step(self) -> tuple[float, float, float]:
        """The 10th, 50th and 90th percentile."""
        low, middle, high = np.percentile(self.steps, (10, 50, 90)).tolist()
        return low, middle, high


class KeepSpeed:
    """A hook that measures steps, what is done between them included; `kind` names steps that take as long."""

    def __init__(self, kind: str) -> None:
        self._kind, self._times = kind, [time.monotonic()]

    def measure(self, report: StepReport) -> None:
        """Note the time of a step."""
        self._times.append(time.monotonic())

    def close(self) -> None:
        """Keep what was measured, if it is enough to tell the first step from the others."""
        first, *others = np.diff(self._times).tolist() or [0.0]
        file = _file(self._kind)
        if file and len(others) > 1:
            steps, compilation = read_speed(self._kind) or ([], 0.0)
            longest = max(compilation, first - float(np.median(others)))
            with suppress(WeightError):
                write_bytes(file, json.dumps(Speed((steps + others)[-MOST_STEPS:], longest)).encode())


def read_speed(kind: str) -> Speed | None:
    """What was measured of steps of a kind; None if nothing was."""
    with suppress(OSError, ValueError, TypeError):
        file = _file(kind)
        return Speed(*json.loads(file.read_bytes())) if file else None
    return None


def _file(kind: str) -> Path | None:
    cache = compile_cache()
    folder = cache.folder if cache else default_folder()
    return folder / f"{kind}.speed" if folder else None

"""MindSpore's profiler on some steps of a run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from mindspore.profiler import profile, schedule, tensorboard_trace_handler

from dreambooth_ms.training.loop import StepReport


@contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[StepReport], None]]:
    """A hook by which MindSpore records so many steps after the first, which compiles, in a new folder inside this one.

    Of a run that ends earlier it writes what there is.
    """
    plan, handler = schedule(wait=1, active=steps, repeat=1), tensorboard_trace_handler(str(folder))
    recorder = profile(schedule=plan, on_trace_ready=handler)

    def record(_: StepReport) -> None:
        with redirect_stdout(sys.stderr):  # MindSpore says what it writes; stdout is left to results.
            recorder.step()

    yield record
    with redirect_stdout(sys.stderr):
        recorder.stop()

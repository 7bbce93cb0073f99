"""A run's own record: a line of JSON per step, the loss as a picture, a profile."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from decimal import Decimal
from itertools import cycle
from pathlib import Path

import numpy as np
from mindspore.profiler import profile, schedule, tensorboard_trace_handler
from PIL import Image, ImageDraw, ImageFont

from dreambooth_ms.atomic import atomic_path, write_bytes, writing
from dreambooth_ms.training.loop import StepReport

HISTORY = "history.jsonl"
_COLOURS = ((34, 94, 168), (217, 95, 2), (27, 158, 119), (117, 112, 179), (231, 41, 138))
"""Of the concepts in their order; after the last the first comes again."""
_INK, _GRID = (60, 60, 60), (225, 225, 225)


class History:
    """Writes every step's report to `history.jsonl`. Reports of steps after `done` that an interrupted run had written
    are dropped, as those steps are taken again. Raises WeightError if the folder cannot be written to, or the disk is
    full."""

    def __init__(self, folder: Path, done: int) -> None:
        lines, self._folder = read_history(folder), folder
        self.reached = max((int(line["step"]) for line in lines), default=0)
        """The last step that an interrupted run had reported."""
        kept = [line for line in lines if line["step"] <= done]
        write_bytes(folder / HISTORY, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with writing_log(folder):
            self._file = (folder / HISTORY).open("a", encoding="utf-8")

    def log(self, report: StepReport) -> None:
        """A hook: record the step."""
        with writing_log(self._folder):
            self._file.write(json.dumps({"step": report.step, **values_of(report)}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; all that was logged is in it."""
        with suppress(OSError):
            self._file.close()


def writing_log(folder: Path) -> AbstractContextManager[None]:
    """Inside, what is wrong with writing a run's log becomes a WeightError."""
    return writing(f"{folder}: the log", "free some space and resume")


def values_of(report: StepReport) -> dict[str, float]:
    """What is logged of a step, by name."""
    losses = {f"{name}_loss": value for name, value in report.concept_losses.items()}
    values = {"loss": report.loss, **losses, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate}
    values |= report.measured
    if report.loss_scale is not None:
        values |= {"loss_scale": report.loss_scale, "skipped_steps": report.skipped_steps}
    return values


def read_history(folder: Path) -> list[dict[str, float]]:
    """The reports of a run so far; a last line that was cut short is left out."""
    lines: list[dict[str, float]] = []
    with suppress(ValueError, FileNotFoundError):
        lines.extend(map(json.loads, (folder / HISTORY).read_text(encoding="utf-8", errors="replace").splitlines()))
    return lines


def round_ticks(highest: float) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten from 0 up to a number, at most eight, with their labels."""
    power = Decimal(10) ** (Decimal(highest).adjusted() - 1)
    step = next(step for factor in (1, 2, 5, 10, 20) if highest <= 7 * (step := factor * power)).normalize()
    return [(float(number * step), f"{number * step:f}") for number in range(int(Decimal(highest) / step) + 1)]


def draw_loss(history: Iterable[dict[str, float]], path: Path) -> None:
    """Draw each concept's loss over the steps that it was in, pale as it was and strong as a mean over a tenth of them,
    without steps whose loss overflowed."""
    lines = [line for line in history if np.isfinite(line["loss"])]
    # A step may have rows of some concepts only.
    names = dict.fromkeys(key for line in lines for key in line if key.endswith("_loss"))
    curves = {name: np.array([(line["step"], line[name]) for line in lines if name in line]).T for name in names}
    highest = max((values.max() for _, values in curves.values()), default=1.0) * 1.05 or 1.0
    last = max((line["step"] for line in lines), default=1)
    image = Image.new("RGB", (960, 480), "white")
    left, top, right, bottom = 70, 44, image.width - 24, image.height - 44
    canvas, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(15)

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - 1) / max(last - 1, 1)
        return left + across * (right - left), bottom - value / highest * (bottom - top)

    for tick, label in round_ticks(highest):
        y = place(1, tick)[1]
        canvas.line((left, y, right, y), fill=_GRID)
        canvas.text((left - 8, y), label, fill=_INK, font=font, anchor="rm")
    for tick, _ in round_ticks(last):
        if tick >= 1 and tick.is_integer():
            canvas.text((place(tick, 0)[0], bottom + 8), f"{tick:.0f}", fill=_INK, font=font, anchor="mt")
    canvas.text(((left + right) / 2, image.height - 6), "step", fill=_INK, font=font, anchor="mb")
    x = float(left)
    for (name, (steps, values)), colour in zip(curves.items(), cycle(_COLOURS), strict=False):
        label, half = name.replace("_loss", " loss"), max(len(values) // 20, 1)
        means = [values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))]
        for heights, fill, width in ((values, (*colour, 60), 1), (means, colour, 3)):
            canvas.line(list(map(place, steps, heights)), fill=fill, width=width)
        canvas.rectangle((x, 16, x + 16, 28), fill=colour)
        canvas.text((x + 24, 22), label, fill=_INK, font=font, anchor="lm")
        x += 48 + canvas.textlength(label, font=font)
    with atomic_path(path) as partial:
        image.save(partial, format="PNG")


@contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[StepReport], None]]:
    """A hook by which MindSpore records so many steps after the first, which compiles, in a new folder inside this one;
    of a run that ends earlier what there is."""
    plan, handler = schedule(wait=1, active=steps, repeat=1), tensorboard_trace_handler(str(folder))
    recorder = profile(schedule=plan, on_trace_ready=handler)

    def record(_: StepReport) -> None:
        with redirect_stdout(sys.stderr):  # MindSpore says what it writes; stdout is left to results.
            recorder.step()

    yield record
    with redirect_stdout(sys.stderr):
        recorder.stop()

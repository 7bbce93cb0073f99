"""What commands say while they work. Of several processes that train as one, one speaks."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from tqdm import tqdm

PROGRAM = "dreambooth-ms"
Item = TypeVar("Item")

_quiet = False
_bars: WeakSet[tqdm] = WeakSet()


def is_quiet() -> bool:
    """Whether another process speaks."""
    return _quiet


def be_quiet() -> None:
    """Say nothing in this process from now on, but what `complain` says."""
    global _quiet
    _quiet = True


def tell(line: str) -> None:
    """Print a line about what goes on to stderr, above the bar; stdout is left to results."""
    if not _quiet:
        tqdm.write(line, file=sys.stderr)


def tell_warnings() -> None:
    """From now on a warning of this package is a line; one of a library says nothing to a user, and is left out."""

    def show(message: Warning | str, category: object, filename: str, *_: Any, **__: Any) -> None:
        if filename.startswith(str(Path(__file__).parents[1])):
            tell(f"warning: {message}")

    warnings.showwarning = show


def progress(**options: Any) -> Any:
    """tqdm's progress bar. It appears with the first step, or when what that needs is compiled."""
    bar = tqdm(disable=_quiet, delay=1e-9, **options)
    _bars.add(bar)
    return bar


def with_progress(items: Iterable[Item], total: int, **options: Any) -> Iterator[Item]:
    """The items, with a bar of how many there were. (tqdm's own loop counts some twice if it is paused.)"""
    with progress(total=total, **options) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def bars_paused() -> Iterator[None]:
    """Inside, no bar is shown; afterwards they go on as if it had taken no time."""
    bars = [bar for bar in _bars if not bar.disable]
    for bar in bars:
        bar.clear()
    yield
    for bar in bars:
        bar.unpause()
        bar.refresh()


def complain(lines: str) -> None:
    """Print what ends the command, one line per problem; file names that are not UTF-8 are escaped."""
    _end_bars()
    for problem in lines.splitlines():
        print(f"{PROGRAM}: error: {problem}".encode(errors="backslashreplace").decode(), file=sys.stderr)


def complain_of_interruption() -> None:
    """Print that the command was interrupted."""
    if not _quiet:
        _end_bars()
        print(f"{PROGRAM}: interrupted", file=sys.stderr)


def _end_bars() -> None:
    for bar in list(_bars):
        bar.close()

"""A run that is asked to stop finishes its step first, so that what it saves is the state after a whole step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# MindSpore answers Ctrl-C inside a graph with a SIGTERM to its own process, so both mean the same.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM are noted instead of ending the program; a second one raises KeyboardInterrupt.

    Yields whether the program was asked to stop.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

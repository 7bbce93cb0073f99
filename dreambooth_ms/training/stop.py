"""A run that is asked to stop finishes its step first, so that what it saves is the state after a whole step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# MindSpore answers Ctrl-C inside a graph with a SIGTERM to its own process, so both mean the same.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether someone asked."""

    asked = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, Ctrl-C and SIGTERM are noted instead of ending the program; a second one raises KeyboardInterrupt."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

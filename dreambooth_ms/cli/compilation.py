"""What is said of the compiler's work while it goes on."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dreambooth_ms.cli.output import bars_paused, is_quiet
from dreambooth_ms.runtime.compile_cache import Outlook

_CLOCK = """
import select, sys, time
begun = time.monotonic()
while not select.select([sys.stdin], [], [], 1)[0]:
    sys.stderr.write(f"\\r{sys.argv[1]}: {time.monotonic() - begun:.0f} s{sys.argv[2]}")
    sys.stderr.flush()
"""
"""A program, because other threads may have to wait for seconds while MindSpore compiles (measured: 3.8 of 24 s)."""


@contextmanager
def show_compilation(title: str, outlook: Outlook) -> Iterator[None]:
    """Inside, say that something is compiled: on a terminal with the time that has gone, elsewhere before and after."""
    before = "" if outlook.seconds is None else f", {outlook.seconds:.0f} s last time"
    with bars_paused():
        if is_quiet() or (outlook.is_kept and not sys.stderr.isatty()):
            yield
        elif sys.stderr.isatty():
            with _clock(f"reading {title} from the compile cache" if outlook.is_kept else f"compiling {title}", before):
                yield
        else:
            begun = time.monotonic()
            print(f"compiling {title}{before}", file=sys.stderr)
            yield
            print(f"compiled {title} in {time.monotonic() - begun:.0f} s", file=sys.stderr)


@contextmanager
def _clock(what: str, before: str) -> Iterator[None]:
    """Inside, a line on the terminal that is renewed every second."""
    program = [sys.executable, "-IS", "-c", _CLOCK, what, before]
    try:
        # In a session of its own, so that Ctrl-C does not reach it; it ends with its input.
        with subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True):
            yield
    finally:
        print("\r" + " " * (len(what) + len(before) + 10) + "\r", end="", file=sys.stderr, flush=True)

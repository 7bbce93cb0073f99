"""Host memory that is given back goes to the system, with GNU's allocator.

Each in a process of its own: in one that has run other tests, an array finds room between what they left.
"""

import ctypes
import subprocess
import sys
import textwrap

import pytest

from dreambooth_ms.runtime import device
from dreambooth_ms.runtime.device import give_back_freed_memory, keep_arrays_apart, uncompiled

gnu = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not GNU's allocator"
)
BEGINNING = """
from pathlib import Path
import numpy as np
from dreambooth_ms.runtime.device import keep_arrays_apart, set_up_device, uncompiled

def resident():  # MiB of this process
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024

def arrays():
    return [np.ones(1 << 20, np.float32) for _ in range(12)]

set_up_device("CPU", 0)
keep_arrays_apart()
held = arrays()
del held
before = resident()
"""


def grown(program):
    """MiB that a program has more than before, at each of its `resident()`."""
    code = BEGINNING + textwrap.dedent(program) + "\nprint(*(one - before for one in measured))\n"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [float(number) for number in ended.stdout.split()]


@gnu
def test_arrays_go_back_at_once():
    held, left = grown("""
        held = arrays()
        measured = [resident()]
        held.clear()
        measured.append(resident())
    """)
    assert held > 40
    assert left < 10


@gnu
def test_arrays_that_were_kept_go_back_in_the_end():
    kept, left = grown("""
        with uncompiled():
            held = arrays()
            held.clear()
            measured = [resident()]
        measured.append(resident())
    """)
    assert kept > 30
    assert left < 10


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    keep_arrays_apart()
    with uncompiled():
        give_back_freed_memory()

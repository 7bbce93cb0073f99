"""Host memory that is given back goes to the system, with GNU's allocator."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from dreambooth_ms.runtime import device
from dreambooth_ms.runtime.device import give_back_freed_memory, keep_arrays_apart, uncompiled

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not GNU's allocator"
)
MIB = 1 << 20


def resident():
    """MiB of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_arrays_go_back_at_once(device):
    keep_arrays_apart()
    before = resident()
    arrays = [np.ones(MIB, np.float32) for _ in range(12)]
    assert resident() > before + 40
    arrays.clear()
    assert resident() < before + 10


def test_arrays_that_were_kept_go_back_in_the_end(device):
    before = resident()
    with uncompiled():
        arrays = [np.ones(MIB, np.float32) for _ in range(12)]
        arrays.clear()
        kept = resident()
    assert kept > before + 30
    assert resident() < before + 10


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    keep_arrays_apart()
    with uncompiled():
        give_back_freed_memory()

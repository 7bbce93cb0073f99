"""What becomes of host memory that is given back: with GNU's allocator, other systems do as they do.

By itself that allocator soon keeps arrays of up to 32 MiB among small objects, where little of what is given back can
go to the system: after loading SD 1.5 and a step of sampling 5.1 GiB were resident, and 4.7 with arrays apart. Memory
from the system is slower, though: decoding in bands of rows, in a form that was compiled, took 21 s, and 16 with its
arrays kept (measured).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Options of `mallopt`: how much free memory at the end of the heap is kept, and from which size on memory comes from
the system by itself."""

APART, KEPT = 1 << 20, 1 << 25
"""Bytes; the second is the most that the allocator takes."""


def keep_arrays_apart() -> None:
    """From now on, arrays that are given back go to the system at once."""
    _set_threshold(APART)


@contextmanager
def arrays_used_again() -> Iterator[None]:
    """Inside, arrays of a few megabytes that are given back are kept for the next ones; at the end they go."""
    _set_threshold(KEPT)
    try:
        yield
    finally:
        _set_threshold(APART)
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Let what was freed among small objects go to the system, such as what the compiler leaves."""
    _call_allocator("malloc_trim", 0)


def _set_threshold(size: int) -> None:
    _call_allocator("mallopt", _M_MMAP_THRESHOLD, size)
    _call_allocator("mallopt", _M_TRIM_THRESHOLD, 2 * size)


def _call_allocator(name: str, *arguments: int) -> None:
    if (function := getattr(ctypes.CDLL(None), name, None)) is not None:
        function(*arguments)

"""The device: the only place that asks for it, the formulation of the operations that follows from it, and what becomes
of host memory that is given back.

GNU's allocator soon keeps arrays of up to 32 MiB among small objects, where little of what is given back can go to the
system: after loading SD 1.5 and a step of sampling 5.1 GiB were resident, and 4.7 with arrays apart. Memory from the
system is slower, though: decoding in bands of rows took 21 s, and 16 with its arrays kept (measured).
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache
from typing import Literal, TypeAlias

import mindspore as ms

from dreambooth_ms.errors import DeviceError
from dreambooth_ms.runtime.ascend import NO_CARD, find_ascend
from dreambooth_ms.runtime.compile_cache import set_up_compile_cache


class Formulation(Enum):
    """How convolution, norm and attention are written (see the package's docstring)."""

    CPU = "cpu"
    ASCEND = "ascend"


Precision: TypeAlias = Literal["no", "fp16", "bf16", "auto"]

_formulation = Formulation.CPU


def set_up_device(target: str, ms_mode: int, deterministic: bool = True, jit_level: str | None = None) -> str:
    """Choose the device and how it computes, as `DeviceConfig` has it; returns the one in use, "CPU" or "Ascend". Call
    it once, before any cell is built and before processes communicate. Raises DeviceError if Ascend was asked for and
    there is none."""
    global _formulation
    ascend = find_ascend()
    if target == "Ascend" and not ascend.is_usable:
        raise DeviceError(
            f"--device_target Ascend: {ascend.obstacle or NO_CARD}; `dreambooth-ms doctor "
            "--device_target Ascend` tells what to look at; use --device_target CPU or auto to do without"
        )
    device = "Ascend" if target != "CPU" and ascend.is_usable else "CPU"
    ms.set_device(device)
    if device == "CPU":
        # The memory pool grows in large pieces. By itself it grows by single tensors, and much of it lies idle: a LoRA
        # step of two of SD 1.5's finest levels at 512 px took 4.3 GiB, and 3.5 GiB with this (measured).
        _set_once(ms.runtime.set_memory, init_size="1GB", increase_size="1GB")
        keep_arrays_apart()
    elif deterministic:
        # It sets HCCL_DETERMINISTIC, too, which is read when processes connect.
        _set_once(ms.set_deterministic, deterministic=True)
    if jit_level:
        ms.set_context(jit_config={"jit_level": jit_level})
    ms.set_context(mode=ms.PYNATIVE_MODE if ms_mode == 1 else ms.GRAPH_MODE)
    _formulation = Formulation(device.lower())
    # Nothing has been run on an Ascend card, so there the cache is on only if it is asked for.
    set_up_compile_cache(by_default=device == "CPU")
    return device


@cache
def _set_once(setting: Callable[..., None], **values: object) -> None:
    """What MindSpore takes once in a process."""
    setting(**values)


def settled_precision(mixed_precision: Precision | None) -> Precision | None:
    """`--mixed_precision` for this device: auto is fp16 on Ascend, and None on CPU, where fp16 is slower."""
    if mixed_precision != "auto":
        return mixed_precision
    return "fp16" if _formulation is Formulation.ASCEND else None


def compute_dtype(mixed_precision: str | None) -> ms.Type:
    """What a settled `--mixed_precision` lets networks compute in; None is no. Raises DeviceError of bf16 on CPU, where
    MindSpore has no kernels for it (measured)."""
    if mixed_precision == "bf16" and _formulation is Formulation.CPU:
        raise DeviceError(
            "--mixed_precision bf16: the CPU cannot compute in bfloat16; use fp16 there to try mixed precision out, or "
            "no, which is faster"
        )
    return {"fp16": ms.float16, "bf16": ms.bfloat16}.get(mixed_precision or "no", ms.float32)


def formulation() -> Formulation:
    """The formulation that cells built now will have."""
    return _formulation


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of `mallopt`: how much stays free at the heap's end, and from which size on memory is the system's by itself."""

APART, KEPT = 1 << 20, 1 << 25
"""Bytes; the second is the most that the allocator takes."""


def keep_arrays_apart(from_size: int = APART) -> None:
    """From now on, arrays that are given back go to the system at once."""
    _call_allocator("mallopt", _M_MMAP_THRESHOLD, from_size)
    _call_allocator("mallopt", _M_TRIM_THRESHOLD, 2 * from_size)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, cells are computed operation by operation (PyNative), whatever the execution mode is, and arrays of a few
    megabytes that are given back are kept for the next ones; at the end they go."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    keep_arrays_apart(from_size=KEPT)
    try:
        yield
    finally:
        ms.set_context(mode=mode)
        keep_arrays_apart()
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Let what was freed among small objects go to the system, such as what the compiler leaves."""
    _call_allocator("malloc_trim", 0)


def _call_allocator(name: str, *arguments: int) -> None:
    if (function := getattr(ctypes.CDLL(None), name, None)) is not None:
        function(*arguments)

"""The device: the only place that asks for it, and the formulation of the operations that follows from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import mindspore as ms

from dreambooth_ms.errors import DeviceError


class Formulation(Enum):
    """How convolution, norm and attention are written (see the package's docstring)."""

    CPU = "cpu"
    ASCEND = "ascend"


_formulation = Formulation.CPU


def set_up_device(target: str, ms_mode: int) -> str:
    """Choose the device and the execution mode. Call it once, before any cell is built.

    Args:
        target: "CPU", "Ascend", or "auto" for Ascend where there is one.
        ms_mode: 0 for graph mode, 1 for PyNative.

    Returns:
        The device in use: "CPU" or "Ascend".

    Raises:
        DeviceError: Ascend was asked for and there is none.
    """
    global _formulation
    has_ascend = target != "CPU" and _has_ascend()
    if target == "Ascend" and not has_ascend:
        raise DeviceError("--device_target Ascend: no Ascend device was found here; use --device_target CPU or auto")
    device = "Ascend" if has_ascend else "CPU"
    ms.set_device(device)
    ms.set_context(mode=ms.PYNATIVE_MODE if ms_mode == 1 else ms.GRAPH_MODE)
    _formulation = Formulation(device.lower())
    return device


def formulation() -> Formulation:
    """The formulation that cells built now will have."""
    return _formulation


@contextmanager
def use_formulation(chosen: Formulation) -> Iterator[None]:
    """Build cells in another formulation than the device's own: for tests that compare the two on one machine."""
    global _formulation
    before, _formulation = _formulation, chosen
    try:
        yield
    finally:
        _formulation = before


def _has_ascend() -> bool:
    # No device node of the driver, no card; to ask MindSpore would print its loader's errors (measured).
    return Path("/dev/davinci_manager").exists() and ms.hal.is_available("Ascend")

"""Cells in another formulation than the device's own, for those who look at one or compare the two on one machine."""

from collections.abc import Iterator
from contextlib import contextmanager

from dreambooth_ms.runtime import device


@contextmanager
def use_formulation(chosen: device.Formulation) -> Iterator[None]:
    """Inside, cells are built in this formulation."""
    before, device._formulation = device._formulation, chosen
    try:
        yield
    finally:
        device._formulation = before

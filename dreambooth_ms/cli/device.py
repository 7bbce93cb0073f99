"""The device of a command: chosen, and told."""

import os
from dataclasses import replace
from typing import Any

from dreambooth_ms.cli.compilation import show_compilation
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.shared import DeviceConfig
from dreambooth_ms.errors import count_of
from dreambooth_ms.runtime.ascend import card_name, find_ascend
from dreambooth_ms.runtime.compiled_cell import watch_compilations
from dreambooth_ms.runtime.device import Formulation, compute_dtype, formulation, set_up_device, settled_precision


def set_up(wanted: DeviceConfig) -> DeviceConfig:
    """Choose the device and say on what the command computes; returns the settings without what was left open.

    Raises:
        DeviceError: there is no such device, or it cannot compute so.
    """
    device = set_up_device(wanted.device_target, wanted.ms_mode)
    precision: Any = settled_precision(wanted.mixed_precision)
    settled = replace(wanted, mixed_precision=precision)
    compute_dtype(settled.mixed_precision)  # What the device cannot compute in ends here.
    watch_compilations(show_compilation)
    obstacle = find_ascend().obstacle
    if wanted.device_target == "auto" and device == "CPU" and obstacle:
        tell(f"warning: the CPU computes, although this machine seems to have an Ascend card: {obstacle}")
    reason = ""
    if wanted.mixed_precision == "auto" and device == "CPU":
        reason = "; --mixed_precision auto is fp16 on Ascend only: on a CPU that is slower"
    tell(f"computing {described(settled)}{reason}")
    return settled


def described(settled: DeviceConfig) -> str:
    """On what is computed and in which precision, in words."""
    cpu = f"the CPU ({count_of(os.cpu_count() or 1, 'core')})"
    where = cpu if formulation() is Formulation.CPU else f"Ascend {card_name()}"
    return f"on {where}, in {str(compute_dtype(settled.mixed_precision)).lower()}"

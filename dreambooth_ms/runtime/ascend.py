"""What this machine shows of an Ascend card, and what keeps MindSpore from using it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
from mindspore._c_expression import MSContext

NO_CARD = "no Ascend device was found here"
MANAGER = "davinci_manager"
CANN_HOME = "ASCEND_HOME_PATH"
"""What CANN's `set_env.sh` sets."""
SIMULATION = "MS_SIMULATION_LEVEL"
"""What MindSpore reads: above 0 it chooses Ascend's kernels and does not run them, so that all results are zeros."""
CANN_ROOTS = ("/usr/local/Ascend", "~/Ascend")
CANN_FOLDERS = ("cann", "ascend-toolkit")
"""Since CANN 8.5, and before; either holds `set_env.sh` (CANN's documentation)."""


@dataclass(frozen=True)
class Ascend:
    """The signs of a card."""

    devices: tuple[str, ...]
    """The driver's device nodes, such as davinci0."""
    home: str | None
    """CANN's folder in the environment."""
    script: Path | None
    """`set_env.sh` of a CANN that is installed."""
    complaint: str
    """Why MindSpore did not load its part for Ascend; empty if it did."""
    is_simulated: bool = False
    """Whether there shall be no card: see `SIMULATION`."""

    @property
    def is_usable(self) -> bool:
        """Whether MindSpore can use a card here."""
        return (self.is_simulated or MANAGER in self.devices) and not self.complaint

    @property
    def obstacle(self) -> str | None:
        """What keeps MindSpore from using the card, and what to do; None if it can, or without any sign of a card."""
        if self.is_usable or not (self.devices or self.home or self.script):
            return None
        if MANAGER not in self.devices:
            what = f"/dev/{MANAGER} is missing" if self.devices else "CANN is here, but no card (/dev/davinci*)"
            return f"{what}; install the driver, or start the container with the card's devices"
        if not self.home:
            do = f"source {self.script}" if self.script else "install CANN and source its set_env.sh"
            return f"CANN's environment is not set; {do}"
        return f"MindSpore's part for Ascend is not loaded ({self.complaint}); its versions are in docs/ascend.md"


def find_ascend(
    devices: Path = Path("/dev"), environment: Mapping[str, str] = os.environ, roots: Sequence[str] = CANN_ROOTS
) -> Ascend:
    """Look for a card: its device nodes, CANN, and what MindSpore said when it was imported."""
    scripts = [Path(os.path.expanduser(root), folder, "set_env.sh") for root in roots for folder in CANN_FOLDERS]
    handle = MSContext.get_instance()
    # "Load dynamic library: NAME failed. REASON", a line for each.
    complaint = "" if handle.is_pkg_support_device("Ascend") else handle.load_plugin_error() or "no reason is known"
    return Ascend(
        devices=tuple(sorted(path.name for path in devices.glob("davinci*"))),
        home=environment.get(CANN_HOME),
        script=next((script for script in scripts if script.is_file()), None),
        complaint=complaint.splitlines()[0].rpartition("failed. ")[2] if complaint else "",
        is_simulated=is_simulated(environment),
    )


def is_simulated(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether MindSpore simulates its device."""
    return environment.get(SIMULATION, "0") != "0"


def card_name() -> str:
    """What this process's card is called; only to be asked where there is one, or one is simulated."""
    return "(simulated: all results are zeros)" if is_simulated() else str(ms.hal.get_device_name(0))


def card_memory() -> int | None:
    """Bytes of this process's card; None if MindSpore does not tell: in a simulation, or before the card is used."""
    return None if is_simulated() else int(ms.hal.get_device_properties(0).total_memory) or None

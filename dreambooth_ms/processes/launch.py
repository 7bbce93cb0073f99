"""A process's place in a run, as `mpirun` and `msrun` put it into the environment of what they start; and its end."""

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from dreambooth_ms.errors import FAILED_STATUS, DeviceError

SCHEDULER = -1
"""Stands for the rank of MindSpore's scheduler, which has none: it connects the others and trains nothing."""

_MSRUN, _MPIRUN = "MS_ROLE", "OMPI_COMM_WORLD_RANK"
"""What each launcher sets in every process that it starts."""


@dataclass(frozen=True)
class Launch:
    """A process's place in the run, and where rank 0 is reached."""

    launcher: Literal["mpirun", "msrun"]
    rank: int
    """0 … count - 1, or SCHEDULER."""
    count: int
    host: str
    """The machine of rank 0."""
    port: int
    """Where MindSpore's scheduler listens there. The processes' own channel has the port after it."""
    job: str
    """What this run's processes know each other by."""

    @property
    def channel_port(self) -> int:
        """Where rank 0 listens for the others."""
        return self.port + 1

    @property
    def scheduler_environment(self) -> dict[str, str]:
        """MindSpore's variables for this place, with which a process needs no launcher of MindSpore's."""
        of_worker = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(self.rank)}
        place = {"MS_SCHED_HOST": self.host, "MS_SCHED_PORT": str(self.port), "MS_WORKER_NUM": str(self.count)}
        return place | ({"MS_ROLE": "MS_SCHED"} if self.rank == SCHEDULER else of_worker)


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process."""
    return _MSRUN in environment or _MPIRUN in environment


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """The place that the launcher gave this process; None if it was started by itself. DeviceError if the launcher
    leaves open the rank, or the machine of rank 0."""
    if _MSRUN not in environment:
        return _from_mpirun(environment) if _MPIRUN in environment else None
    host, port = environment["MS_SCHED_HOST"], int(environment["MS_SCHED_PORT"])
    if environment[_MSRUN] == "MS_SCHED":
        rank = SCHEDULER
    elif "MS_NODE_ID" in environment:
        rank = int(environment["MS_NODE_ID"])
    else:
        raise DeviceError("msrun: give every machine its --node_rank, 0 on that of --master_addr")
    return Launch("msrun", rank, int(environment["MS_WORKER_NUM"]), host, port, f"{host}:{port}")


def _from_mpirun(environment: Mapping[str, str]) -> Launch:
    """mpirun names no port: one is derived from the job, and MS_SCHED_HOST and MS_SCHED_PORT name another."""
    rank, count = int(environment[_MPIRUN]), int(environment["OMPI_COMM_WORLD_SIZE"])
    job = environment.get("PMIX_NAMESPACE", "")
    on_one_machine = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(count)
    # OpenMPI's `job;tcp://a.b.c.d,e.f.g.h:port;…`: where mpirun runs, and with it rank 0.
    addresses = re.search(r"tcp://([^,:;]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    host = environment.get("MS_SCHED_HOST") or ("127.0.0.1" if on_one_machine else addresses and addresses[1])
    if not host:
        raise DeviceError("mpirun: the machine of rank 0 is not known; name its address with -x MS_SCHED_HOST=…")
    number = int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big")
    # Even ports below those that Linux gives to outgoing connections (32768 and up).
    port = int(environment.get("MS_SCHED_PORT", 20000 + 2 * (number % 6000)))
    return Launch("mpirun", rank, count, host, port, job)


def exit_at_once(status: int) -> NoReturn:
    """End this process now; what was printed is written, or the status is 1 in place of 0.

    MindSpore's clean-up waits for the other processes of a run and the scheduler, and takes a second (both measured).
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # Nobody listens, the disk is full, or it is closed.
            status = status or FAILED_STATUS
    os._exit(status)

"""MindSpore's scheduler, which connects the processes of a run on CPU, as a process of its own.

It blocks all its threads until every worker has ended, and for half a minute more after one that died (measured). So
whoever starts it must be able to end it, and it dies with whoever started it.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dreambooth_ms.processes.launch import Launch

_PR_SET_PDEATHSIG = 1


@contextmanager
def scheduler_process(launch: Launch) -> Iterator[None]:
    """Inside, a scheduler runs for this launch. Without OpenMPI's variables, or it would take itself for a rank."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_"))}
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    process = subprocess.Popen(command, env=kept | launch.scheduler_environment)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _run(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    from mindspore import communication, set_device

    set_device("CPU")
    communication.init()


if __name__ == "__main__":
    _run(int(sys.argv[1]))

"""The end of a process without MindSpore's own clean-up."""

import os
import sys
from typing import NoReturn

from dreambooth_ms.errors import FAILED_STATUS


def exit_at_once(status: int) -> NoReturn:
    """End this process now; what was printed is written, and nothing else is tidied up.

    MindSpore's clean-up waits for the other processes of a run and for the scheduler, and takes a second to give back
    memory that is the system's anyhow (both measured). The status is 1 in place of 0 if what was printed cannot be
    written.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # Nobody listens, the disk is full, or it is closed.
            status = status or FAILED_STATUS
    os._exit(status)

"""The sampling process: holds one model, samples what it is sent, and says how far it is.

    python -m demo.worker FILE_DESCRIPTOR

It ends when the other end of the connection is closed, so that it cannot outlive the page's process.
"""

import os
import queue
import sys
import threading
import traceback
from functools import partial
from multiprocessing.connection import Connection

from demo.messages import Cancel, Finished, Start
from dreambooth_ms.errors import UserError

UNKNOWN = (
    "These pictures failed for a reason that the page does not know. The terminal that it was started from shows it; "
    "other settings may work."
)


class Inbox:
    """What has been asked for, read by a thread of its own: a cancellation is heard while something is sampled."""

    def __init__(self, connection: Connection) -> None:
        self.requests: queue.Queue[Start] = queue.Queue()
        self._cancelled: set[int] = set()
        self._connection = connection
        threading.Thread(target=self._read, daemon=True, name="inbox").start()

    def is_cancelled(self, job: int) -> bool:
        """Whether a job is to end."""
        return job in self._cancelled

    def _read(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, Cancel):
                    self._cancelled.add(message.job)
                else:
                    self.requests.put(message)
        except (EOFError, OSError):
            os._exit(0)


def main(descriptor: int) -> None:
    """Sample until the connection is closed."""
    connection = Connection(descriptor)
    inbox = Inbox(connection)
    from demo.sampler import Sampler  # MindSpore takes seconds to import, in which a cancellation may come.

    sampler = None
    while True:
        asked = inbox.requests.get()
        try:
            sampler = sampler or Sampler(asked.request.model, connection.send, asked.job)
            finished = sampler.sample(asked, connection.send, partial(inbox.is_cancelled, asked.job))
            connection.send(Finished(asked.job, "done" if finished else "cancelled"))
        except UserError as error:
            connection.send(Finished(asked.job, "failed", str(error)))
        except (MemoryError, Exception):  # noqa: BLE001 - whatever it is, the page shows a sentence and goes on.
            traceback.print_exc()
            connection.send(Finished(asked.job, "failed", UNKNOWN))


if __name__ == "__main__":
    main(int(sys.argv[1]))

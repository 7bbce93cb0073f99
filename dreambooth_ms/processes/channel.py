"""Messages between two processes of a run: one line of JSON each, over a TCP connection."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock
from typing import Any

from dreambooth_ms.errors import DeviceError

LONGEST_LINE = 64 * 2**20
SILENT_SECONDS = 30
"""How long a machine may not answer at all, before it counts as gone. The kernel answers, also for a busy process."""


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lines, self._sending = connection, connection.makefile("rb"), Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", (SILENT_SECONDS - 10) // 5)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. One that the other end is gone for is dropped: whoever reads learns of the end."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending, suppress(OSError):
            self._connection.sendall(line)

    def messages(self) -> Iterator[dict[str, Any]]:
        """The other end's messages, until it is gone."""
        try:
            while line := self._lines.readline(LONGEST_LINE):
                yield json.loads(line)
        except (OSError, ValueError):
            return

    def close(self) -> None:
        """End the connection; the other end's `messages` come to their end."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def connect(host: str, port: int, seconds: float) -> Channel:
    """Connect to rank 0, which may not listen yet.

    Raises:
        DeviceError: it did not within that time.
    """
    return Channel(_reach(host, port, seconds, "rank 0"))


def wait_until_listening(host: str, port: int, seconds: float) -> None:
    """Come back when MindSpore's scheduler listens: a worker that comes before it waits a minute more (measured).

    Raises:
        DeviceError: it did not within that time.
    """
    _reach(host, port, seconds, "MindSpore's scheduler").close()


def _reach(host: str, port: int, seconds: float, who: str) -> socket.socket:
    give_up = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            connection.settimeout(None)
            return connection
        except OSError as error:
            if time.monotonic() > give_up:
                reason = error.strerror or error
                raise DeviceError(
                    f"{who} does not answer at {host}:{port} ({reason}); see what became of it"
                ) from error
            time.sleep(0.1)


def listen(host: str, port: int) -> socket.socket:
    """Listen for the other processes.

    Raises:
        DeviceError: the port is taken, or the address is not of this machine.
    """
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise DeviceError(
            f"rank 0 cannot listen at {host}:{port} ({error.strerror}); name an address of its machine and a free "
            "port: msrun --master_addr … --master_port …, or mpirun -x MS_SCHED_HOST=… -x MS_SCHED_PORT=…"
        ) from error


def accept(listener: socket.socket, seconds: float) -> Channel | None:
    """The next connection, or None if there is none within that time."""
    listener.settimeout(max(seconds, 0.001))
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        return None
    connection.settimeout(None)
    return Channel(connection)

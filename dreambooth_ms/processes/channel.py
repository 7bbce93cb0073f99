"""Messages between two processes of a run: JSON over the standard library's connections.

Both ends prove that they are of the same job before either reads anything else, and nothing is ever unpickled.
"""

import json
import os
import socket
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from threading import Lock
from typing import Any

from dreambooth_ms.errors import DeviceError
from dreambooth_ms.processes.launch import Launch

LONGEST_MESSAGE = 64 * 2**20
SILENT_SECONDS = 30
"""How long a machine may not answer at all, before it counts as gone. The kernel answers, also for a busy process."""

_TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": (SILENT_SECONDS - 10) // 5,
    "TCP_USER_TIMEOUT": SILENT_SECONDS * 1000,
}
"""Those that this system has are set."""

_REFUSALS = (AuthenticationError, AssertionError, EOFError, OSError)
"""What the standard library raises where the other end is another program, of another job, or gone."""


class Channel:
    """One end of a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, Lock()
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _TCP_OPTIONS.items():
                if hasattr(socket, option):
                    same.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. One that the other end is gone for is dropped: whoever reads learns of the end."""
        with self._sending, suppress(OSError):
            self._connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any] | None:
        """The other end's next message; None when it is gone."""
        try:
            return json.loads(self._connection.recv_bytes(LONGEST_MESSAGE))
        except (OSError, EOFError, ValueError):
            return None

    def close(self) -> None:
        """End the connection; the other end receives None."""
        self._connection.close()


def connect(launch: Launch, seconds: float) -> Channel:
    """Connect to rank 0 of this run, which may not listen yet.

    Raises:
        DeviceError: it did not within that time, or another run has its port.
    """
    address = launch.host, launch.channel_port
    wait_until_listening(*address, seconds, "rank 0")
    try:
        channel = Channel(Client(address, authkey=_key(launch)))
    except _REFUSALS as error:
        raise _no_answer(*address, "rank 0", error) from error
    channel.send({"rank": launch.rank})
    return channel


def wait_until_listening(host: str, port: int, seconds: float, who: str) -> None:
    """Come back when `who` listens there: who comes to MindSpore's scheduler earlier waits a minute more (measured).

    Raises:
        DeviceError: it did not within that time.
    """
    give_up = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > give_up:
                raise _no_answer(host, port, who, error) from error
            time.sleep(0.1)


def listen(launch: Launch) -> Listener:
    """Listen for the other processes of this run.

    Raises:
        DeviceError: the port is taken, or the address is not of this machine.
    """
    try:
        return Listener((launch.host, launch.channel_port), backlog=1024, authkey=_key(launch))
    except OSError as error:
        raise DeviceError(
            f"rank 0 cannot listen at {launch.host}:{launch.channel_port} ({error.strerror}); name an address of its "
            "machine and a free port: msrun --master_addr … --master_port …, or mpirun -x MS_SCHED_HOST=… "
            "-x MS_SCHED_PORT=…"
        ) from error


def accept(listener: Listener, expected: set[int]) -> tuple[int, Channel] | None:
    """The rank of the next process that connects, and the channel to it; None, after closing it, for a stranger."""
    try:
        channel = Channel(listener.accept())
    except _REFUSALS:
        return None
    hello = channel.receive()
    if isinstance(hello, dict) and hello.get("rank") in expected:
        return hello["rank"], channel
    channel.close()
    return None


def _key(launch: Launch) -> bytes:
    return f"{launch.count} processes of {launch.job}".encode()


def _no_answer(host: str, port: int, who: str, error: BaseException) -> DeviceError:
    reason = getattr(error, "strerror", None) or error
    return DeviceError(f"{who} does not answer at {host}:{port} ({reason}); see what became of it")

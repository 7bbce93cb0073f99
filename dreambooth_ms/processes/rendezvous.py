"""The connections of a run's processes on the host: rank 0 in the middle, a channel to each of the others.

Values are exchanged there, with a time limit, and a thread watches whether the others are alive: a process that waits
in a collective operation for one that is gone would wait for ever, and only `exit_at_once` ends it. Both ends prove
that they are of the same job before either reads anything else; messages are JSON, and nothing is ever unpickled.
"""

import json
import os
import socket
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import Any, NoReturn

from dreambooth_ms.errors import FAILED_STATUS, DeviceError, Tell
from dreambooth_ms.processes.launch import SCHEDULER, Launch, exit_at_once

START_SECONDS = 50
"""How long the processes may take to start one after the other."""
GRACE_SECONDS = 3
"""How long a failure elsewhere waits for this process's own: all of them fail of a mistake in their common flags."""

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
    """Connect to rank 0 of this run, which may not listen yet, or raise DeviceError."""
    address = launch.host, launch.channel_port
    wait_until_listening(*address, seconds, "rank 0")
    try:
        channel = Channel(Client(address, authkey=_key(launch)))
    except _REFUSALS as error:
        raise _no_answer(*address, "rank 0", error) from error
    channel.send({"rank": launch.rank})
    return channel


def wait_until_listening(host: str, port: int, seconds: float, who: str) -> None:
    """Come back when `who` listens there, or raise DeviceError after that time. Who comes to MindSpore's scheduler
    earlier waits a minute more (measured)."""
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
    """Listen for the others, or raise DeviceError: the port is taken, or the address is not of this machine."""
    try:
        return Listener((launch.host, launch.channel_port), backlog=1024, authkey=_key(launch))
    except OSError as error:
        raise DeviceError(
            f"rank 0 cannot listen at {launch.host}:{launch.channel_port} ({error.strerror}); name an address of its "
            "machine and a free port: msrun --master_addr … --master_port …, or mpirun -x MS_SCHED_HOST=… "
            "-x MS_SCHED_PORT=…"
        ) from error


def _key(launch: Launch) -> bytes:
    return f"{launch.count} processes of {launch.job}".encode()


def _no_answer(host: str, port: int, who: str, error: BaseException) -> DeviceError:
    reason = getattr(error, "strerror", None) or error
    return DeviceError(f"{who} does not answer at {host}:{port} ({reason}); see what became of it")


class Rendezvous:
    """One process's connections to the others. Every method must be called by all processes, in the same order."""

    def __init__(self, launch: Launch, exchange_seconds: float, complain: Tell) -> None:
        """Connect to the others, or raise DeviceError; `complain` prints a line for the user."""
        self._rank, self._count = launch.rank, launch.count
        self._exchange_seconds, self._complain = exchange_seconds, complain
        self._ending, self._own_failure, self._finished = Lock(), Event(), False
        self._channels = _channels_to_all(launch) if launch.rank == 0 else {0: connect(launch, START_SECONDS)}
        self._received: dict[int, Queue[Any]] = {rank: Queue() for rank in self._channels}
        for rank, channel in self._channels.items():
            Thread(target=self._watch, args=(rank, channel), daemon=True).start()

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Every process's value, plain JSON, by rank; `what` is for the line that says who did not come to it."""
        if self._rank != 0:
            self._channels[0].send({"what": what, "value": value})
            return self._next(0, what)["values"]
        others = [self._next(rank, what) for rank in range(1, self._count)]
        assert all(one["what"] == what for one in others), f"rank 0 is at {what!r}, others at {others!r}"
        values = [value, *(one["value"] for one in others)]
        for rank in range(1, self._count):
            self._channels[rank].send({"values": values})
        return values

    def finish(self, status: int) -> NoReturn:
        """End this process in good order, once all have come to the end."""
        self.exchange("the end of the run", None)
        self._finished = True
        self._send_to_all({"finished": True})
        exit_at_once(status)

    def fail(self, why: str, status: int) -> NoReturn:
        """End the whole run for a failure of this process, of which rank 0 prints one line."""
        self._own_failure.set()
        if self._rank == 0:
            self._end_run(why, status)
        self._channels[0].send({"failed": why, "status": status})
        time.sleep(2 * GRACE_SECONDS)  # Rank 0 says when; unless it is gone too.
        exit_at_once(status)

    def wait_for_end(self) -> None:
        """For the scheduler: come back when rank 0 has ended."""
        self._received[0].get()

    def _next(self, rank: int, what: str) -> Any:
        try:
            message = self._received[rank].get(timeout=self._exchange_seconds)
        except Empty:
            self.fail(f"rank {rank} did not come to {what} within {self._exchange_seconds:g} s", FAILED_STATUS)
        if message is None:
            Event().wait()  # The watching thread is about to end this process.
        return message

    def _watch(self, rank: int, channel: Channel) -> None:
        """Take another process's messages, and end the run with it."""
        while (message := channel.receive()) is not None:
            if "over" in message:
                exit_at_once(message["status"])
            if "failed" in message:
                if not self._own_failure.wait(GRACE_SECONDS):
                    self._end_run(f"rank {rank}: {message['failed']}", message["status"])
                return
            self._received[rank].put(message)
            if "finished" in message:
                return
        self._received[rank].put(None)
        if not self._finished and not self._own_failure.is_set():
            self._end_run(
                f"{_name(rank)} ended without a word: it was killed, or crashed. The run has ended; "
                "run the same command again to go on from its newest checkpoint",
                FAILED_STATUS,
            )

    def _end_run(self, why: str, status: int) -> NoReturn:
        with self._ending:
            # If rank 0 is gone, the others all see it: one says so.
            if self._rank in (0, 1):
                self._complain(why)
            if self._rank == 0:
                self._send_to_all({"over": True, "status": status})
            exit_at_once(status)

    def _send_to_all(self, message: dict[str, Any]) -> None:
        for channel in self._channels.values():
            channel.send(message)


def _channels_to_all(launch: Launch) -> dict[int, Channel]:
    """For rank 0: by rank, the others and the scheduler of msrun; that of mpirun is started afterwards, as a child."""
    expected = {*range(1, launch.count), *((SCHEDULER,) if launch.launcher == "msrun" else ())}
    channels, listener = dict[int, Channel](), listen(launch)

    def admit() -> None:
        """Strangers are sent away."""
        with listener:
            while missing := expected - channels.keys():
                with suppress(*_REFUSALS):
                    channel = Channel(listener.accept())
                    hello = channel.receive()
                    if isinstance(hello, dict) and hello.get("rank") in missing:
                        channels[hello["rank"]] = channel
                    else:
                        channel.close()

    admission = Thread(target=admit, daemon=True)
    admission.start()
    admission.join(START_SECONDS)
    if missing := expected - channels.keys():
        absent = ", ".join(map(_name, sorted(missing)))
        hint = "see that every machine runs the same command and reaches this one"
        hint = "see its scheduler.log" if missing == {SCHEDULER} else hint
        raise DeviceError(f"{absent}: not started within {START_SECONDS} s; {hint}")
    return channels


def _name(rank: int) -> str:
    return "msrun's scheduler" if rank == SCHEDULER else f"rank {rank}"

"""Where the processes of a run meet: rank 0 in the middle, a channel to each of the others.

Values are exchanged there, with a time limit, and each process watches whether the others are alive: a process that
waits in a collective operation for one that is gone would wait for ever. Only a thread of its own can tell then, and
only leaving at once ends it.
"""

import time
from collections.abc import Callable
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import Any, NoReturn

from dreambooth_ms.errors import FAILED_STATUS, DeviceError
from dreambooth_ms.processes.channel import Channel, accept, connect, listen
from dreambooth_ms.processes.exit import leave_at_once
from dreambooth_ms.processes.launch import SCHEDULER, Launch

START_SECONDS = 50
"""How long the processes may take to start one after the other."""
GRACE_SECONDS = 3
"""How long a failure elsewhere waits for this process's own: all of them fail of a mistake in their common flags."""

_GONE = object()


class Rendezvous:
    """One process's side of the meeting. Every method must be called by all processes, in the same order."""

    def __init__(self, launch: Launch, exchange_seconds: float, complain: Callable[[str], object]) -> None:
        """Meet the others.

        Args:
            launch: this process's place.
            exchange_seconds: how long to wait for another process in an exchange.
            complain: prints a line for the user.

        Raises:
            DeviceError: they do not come, or this process cannot reach them.
        """
        self._rank, self._count = launch.rank, launch.count
        self._exchange_seconds, self._complain = exchange_seconds, complain
        self._received: dict[int, Queue[Any]] = {}
        self._ending, self._own_failure, self._leaving = Lock(), Event(), False
        self._channels = self._meet_all(launch) if launch.rank == 0 else {0: self._meet_first(launch)}
        for rank, channel in self._channels.items():
            self._received[rank] = Queue()
            Thread(target=self._watch, args=(rank, channel), daemon=True).start()

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process.

        Args:
            what: names the exchange, for the line that says who did not come to it.
            value: plain JSON.
        """
        if self._rank != 0:
            self._channels[0].send({"what": what, "value": value})
            return self._next(0, what)["values"]
        values = [value]
        for rank in range(1, self._count):
            message = self._next(rank, what)
            assert message["what"] == what, f"rank {rank} is at {message['what']!r}, rank 0 at {what!r}"
            values.append(message["value"])
        self._tell_all({"values": values}, but=SCHEDULER)
        return values

    def leave(self, status: int) -> NoReturn:
        """End this process in good order, once all have come to the end."""
        self.exchange("the end of the run", None)
        self._leaving = True
        self._tell_all({"bye": True})
        leave_at_once(status)

    def fail(self, why: str, status: int) -> NoReturn:
        """End the whole run for a failure of this process, which is told by one line of rank 0."""
        self._own_failure.set()
        if self._rank == 0:
            self._end_run(why, status)
        self._channels[0].send({"failed": why, "status": status})
        time.sleep(2 * GRACE_SECONDS)  # Rank 0 says when; unless it is gone too.
        leave_at_once(status)

    def wait_for_end(self) -> None:
        """For the scheduler: come back when rank 0 has left."""
        self._received[0].get()

    def _meet_all(self, launch: Launch) -> dict[int, Channel]:
        channels: dict[int, Channel] = {}
        give_up = time.monotonic() + START_SECONDS
        with listen(launch.host, launch.channel_port) as listener:
            while missing := set(range(1, launch.count)) - channels.keys():
                channel = accept(listener, give_up - time.monotonic())
                if channel is None:
                    absent = ", ".join(f"rank {rank}" for rank in sorted(missing))
                    raise DeviceError(
                        f"{absent}: not started within {START_SECONDS} s; "
                        "see that every machine runs the same command and reaches this one"
                    )
                rank = _rank_of_caller(channel, launch)
                if rank is None:
                    channel.close()
                else:
                    channels[rank] = channel
            self._await_scheduler(listener, launch, channels)
        return channels

    def _await_scheduler(self, listener: Any, launch: Launch, channels: dict[int, Channel]) -> None:
        """The scheduler of msrun comes by itself; that of mpirun is started after the meeting, and is a child."""
        give_up = time.monotonic() + START_SECONDS
        while launch.launcher == "msrun" and SCHEDULER not in channels:
            channel = accept(listener, give_up - time.monotonic())
            if channel is None:
                raise DeviceError(f"msrun's scheduler was not started within {START_SECONDS} s; see its scheduler.log")
            if _rank_of_caller(channel, launch) == SCHEDULER:
                channels[SCHEDULER] = channel

    def _meet_first(self, launch: Launch) -> Channel:
        channel = connect(launch.host, launch.channel_port, START_SECONDS)
        channel.send({"rank": launch.rank, "count": launch.count, "job": launch.job})
        return channel

    def _next(self, rank: int, what: str) -> Any:
        try:
            message = self._received[rank].get(timeout=self._exchange_seconds)
        except Empty:
            self.fail(f"rank {rank} did not come to {what} within {self._exchange_seconds:g} s", FAILED_STATUS)
        if message is _GONE:
            Event().wait()  # The watching thread is about to end this process.
        return message

    def _watch(self, rank: int, channel: Channel) -> None:
        """Take what another process says, and end the run with it."""
        for message in channel.messages():
            if "over" in message:
                leave_at_once(message["status"])
            if "failed" in message:
                if not self._own_failure.wait(GRACE_SECONDS):
                    self._end_run(f"rank {rank}: {message['failed']}", message["status"])
                return
            if "bye" in message:
                self._received[rank].put(message)
                return
            self._received[rank].put(message)
        self._received[rank].put(_GONE)
        if not self._leaving and not self._own_failure.is_set():
            who = "msrun's scheduler" if rank == SCHEDULER else f"rank {rank}"
            self._end_run(
                f"{who} ended without a word: it was killed, or crashed. The run has ended; "
                "run the same command again to go on from its newest checkpoint",
                FAILED_STATUS,
            )

    def _end_run(self, why: str, status: int) -> NoReturn:
        with self._ending:
            # If rank 0 is gone, the others all see it: one tells it.
            if self._rank in (0, 1):
                self._complain(why)
            if self._rank == 0:
                self._tell_all({"over": True, "status": status})
            leave_at_once(status)

    def _tell_all(self, message: dict[str, Any], but: int | None = None) -> None:
        for rank, channel in self._channels.items():
            if rank != but:
                channel.send(message)


def _rank_of_caller(channel: Channel, launch: Launch) -> int | None:
    """Who is at the other end; None if it is no process of this run."""
    hello = next(channel.messages(), None)
    if not isinstance(hello, dict) or (hello.get("job"), hello.get("count")) != (launch.job, launch.count):
        return None
    return hello["rank"]

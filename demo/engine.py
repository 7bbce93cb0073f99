"""One request at a time: a queue of jobs, and the process that holds the model.

The model lives in a process of its own. Where another model is asked for, the process is ended and a new one is
started, so that nothing of the old one can stay in memory; and whatever happens in it, the page goes on.
"""

import atexit
import itertools
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, Literal

from demo.messages import Cancel, Finished, ModelChoice, Phase, Picture, PictureRequest, Start, Step
from demo.processes import environment
from dreambooth_ms.errors import UserError

WORKER = (sys.executable, "-m", "demo.worker")
LONGEST_QUEUE = 16
UNWATCHED_SECONDS = 600.0
"""A job whose page has not looked for so long is given up: its window is closed."""

State = Literal["waiting", "working", "done", "cancelled", "failed"]
_ENDED_BY_ITSELF = (
    "The process that generates pictures ended by itself, probably for lack of memory. Choose a smaller size or fewer "
    "pictures, or look into the terminal that this page was started from."
)


class QueueFullError(UserError):
    """More requests are waiting than are worth waiting for."""


class Job:
    """A request on its way. The engine's thread writes it, pages read it."""

    def __init__(self, number: int, request: PictureRequest) -> None:
        self.number, self.request = number, request
        self.state: State = "waiting"
        self.phase = ""
        self.step: Step | None = None
        self.preview: Step | None = None
        """The newest step that came with a picture."""
        self.pictures: list[Picture] = []
        self.sentence = ""
        self.watched = time.monotonic()
        self.cancel_asked = False
        self._first: tuple[float, float] | None = None
        """When the first step was done, and which share of the whole it was."""

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.state in ("done", "cancelled", "failed")

    @property
    def unwatched(self) -> float:
        """For how many seconds no page has looked."""
        return time.monotonic() - self.watched

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the second step on, as the first one is compiled; None before."""
        if self._first is None or self.step is None or self.step.share <= self._first[1]:
            return None
        moment, share = self._first
        return (time.monotonic() - moment) * (1 - self.step.share) / (self.step.share - share)

    def hear(self, message: Phase | Step | Picture | Finished) -> None:
        """Take in what the sampling process says."""
        if isinstance(message, Phase):
            self.phase = message.text
        elif isinstance(message, Step):
            self.phase = ""
            self._first = self._first or (time.monotonic(), message.share)
            self.step = message
            if message.preview is not None:
                self.preview = message
        elif isinstance(message, Picture):
            self.pictures.append(message)
            self.preview = None
        else:
            self.sentence = message.sentence
            self.state = message.outcome


class SamplingProcess:
    """A process that has loaded one model."""

    def __init__(self, command: Sequence[str], model: ModelChoice) -> None:
        self.model = model
        self.has_sampled = False
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment(),
            # Ctrl-C in the terminal is for the server, which ends its processes itself.
            start_new_session=True,
        )
        theirs.close()

    @property
    def connection(self) -> Connection:
        """Raises EOFError or OSError in use once the process has ended."""
        return self._connection

    @property
    def process_id(self) -> int:
        """Of the operating system."""
        return self._process.pid

    def end(self) -> None:
        """End it and wait until its memory is free."""
        self._connection.close()
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Engine:
    """Samples what pages ask for, in the order in which they ask."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = command
        self._numbers = itertools.count(1)
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._current: Job | None = None
        self._process: SamplingProcess | None = None
        self._unload_asked = self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="sampling")
        self._thread.start()
        atexit.register(self.close)

    @property
    def process(self) -> SamplingProcess | None:
        """The process with the model; None if none is loaded."""
        return self._process

    def submit(self, request: PictureRequest) -> Job:
        """Put a request into the queue.

        Raises:
            QueueFullError: there are too many before it.
        """
        with self._changed:
            if len(self._queue) >= LONGEST_QUEUE:
                raise QueueFullError(f"{len(self._queue)} requests are waiting already; try again when some are done")
            job = Job(next(self._numbers), request)
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """How many requests come before this one, the one in work included."""
        with self._changed:
            waiting = list(self._queue)
            return waiting.index(job) + (self._current is not None) if job in waiting else 0

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, otherwise after the step it is in."""
        with self._changed:
            job.cancel_asked = True
            if job in self._queue:
                self._queue.remove(job)
                job.state = "cancelled"
            self._changed.notify_all()

    def unload(self) -> None:
        """Give the model's memory back once nothing is being sampled."""
        with self._changed:
            self._unload_asked = True
            self._changed.notify_all()

    def close(self) -> None:
        """End everything; nothing can be sampled afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=10)
        atexit.unregister(self.close)

    def _serve(self) -> None:
        while not self._closed:
            with self._changed:
                while not (self._queue or self._unload_asked or self._closed):
                    self._changed.wait()
                unload, self._unload_asked = self._unload_asked, False
                self._current = self._queue.popleft() if self._queue and not self._closed else None
            if unload:
                self._end_process()
            if self._current:
                self._sample(self._current)
                self._current = None
        self._end_process()

    def _sample(self, job: Job) -> None:
        job.state = "working"
        try:
            process = self._process_for(job)
            process.connection.send(Start(job.number, job.request))
            self._follow(job, process)
        except (EOFError, OSError):
            self._end_process()
            job.hear(Finished(job.number, "cancelled" if job.cancel_asked else "failed", _ENDED_BY_ITSELF))

    def _process_for(self, job: Job) -> SamplingProcess:
        if self._process is None or not self._process.model.serves(job.request.model):
            self._end_process()
            job.phase = "Loading the model"
            self._process = SamplingProcess(self._command, job.request.model)
        return self._process

    def _follow(self, job: Job, process: SamplingProcess) -> None:
        cancel_sent = False
        while not job.over:
            unwatched = job.unwatched > UNWATCHED_SECONDS
            if (job.cancel_asked or unwatched or self._closed) and not cancel_sent:
                if not process.has_sampled:  # It is still loading, and listens to nobody.
                    self._end_process()
                    job.state = "cancelled"
                    return
                process.connection.send(Cancel(job.number))
                cancel_sent = True
            if process.connection.poll(0.1):
                message: Any = process.connection.recv()
                if message.job == job.number:
                    process.has_sampled |= isinstance(message, Step)
                    job.hear(message)
            if self._closed and cancel_sent:
                return
        if job.state == "failed" and not process.has_sampled:
            self._end_process()

    def _end_process(self) -> None:
        if self._process:
            self._process.end()
            self._process = None

"""Who trains in a run's folder: a lock on a file in it, which the operating system takes away with the process. The
page looks at it too, so nothing heavy is imported."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from dreambooth_ms.errors import ConfigError, Tell

LOCK = "training.lock"
INHERITED = "DREAMBOOTH_MS_LOCK"
"""The environment variable by which a lock is handed over to a training: the number of the open file."""


class Runner(NamedTuple):
    """A process that trains; 0 and no machine if it has not signed yet."""

    process_id: int
    machine: str

    @property
    def is_here(self) -> bool:
        """Whether a signal reaches it."""
        return self.process_id > 0 and self.machine == platform.node()

    def __str__(self) -> str:
        return f"process {self.process_id} on {self.machine}"


def runner_of(folder: Path) -> Runner | None:
    """Who trains in a folder now; None if nobody does."""
    with suppress(OSError), (folder / LOCK).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            number, _, machine = file.read().decode(errors="replace").partition(" ")
            return Runner(int(number) if number.isdecimal() else 0, machine)
    return None


def take_lock(folder: Path) -> IO[bytes]:
    """A folder's lock, for as long as the file is open in this process or in one that inherits it. Raises ConfigError
    if another process has it, and OSError if the folder cannot be written to, or its file system has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(5):
        file = (folder / LOCK).open("a+b", buffering=0)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have removed its file in between.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        file.close()
        time.sleep(0.1)  # Who only looks holds it for a moment.
    raise ConfigError(
        f"{folder}: {runner_of(folder) or 'another process'} is training in it; wait for its end, stop it, or choose "
        "another --output_dir"
    )


def sign(file: IO[bytes], process_id: int) -> None:
    """Write into a lock which process of this machine has it."""
    file.truncate(0)
    file.write(f"{process_id} {platform.node()}".encode())


@contextmanager
def only_run_in(folder: Path, tell: Tell) -> Iterator[None]:
    """Inside, no other training begins in the folder, which can be written to. That it can't be locked is told. Raises
    ConfigError if one has begun."""
    inherited = os.environ.pop(INHERITED, None)
    try:
        file = os.fdopen(int(inherited), "a+b", buffering=0) if inherited else take_lock(folder)
    except OSError as error:
        tell(f"{folder}: its file system has no locks ({error.strerror}); start no second training in it")
        yield
        return
    with file:
        os.set_inheritable(file.fileno(), False)
        sign(file, os.getpid())
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)

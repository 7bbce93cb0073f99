"""Who trains in a run's folder: a lock on a file in it, which the operating system takes away with the process.

It imports nothing heavy, since the page looks at it too.
"""

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dreambooth_ms.atomic import check_writable
from dreambooth_ms.errors import ConfigError

LOCK = "training.lock"
INHERITED = "DREAMBOOTH_MS_LOCK"
"""The environment variable in which who starts a training hands over a lock: the number of the open file."""
_PATIENCE, _PAUSE = 5, 0.1
"""Who looks at a lock holds it for a moment."""


@dataclass(frozen=True)
class Runner:
    """A process that trains."""

    process_id: int
    machine: str

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine, so that a signal comes to it."""
        return self.process_id > 0 and self.machine == platform.node()

    def __str__(self) -> str:
        return f"process {self.process_id} on {self.machine}" if self.machine else "another process"


def runner_of(folder: Path) -> Runner | None:
    """Who trains in a folder now; None if nobody does."""
    try:
        with (folder / LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                number, _, machine = file.read().decode(errors="replace").strip().partition(" ")
                return Runner(int(number) if number.isdecimal() else 0, machine)
    except OSError:
        pass
    return None


def take_lock(folder: Path) -> IO[bytes]:
    """A folder's lock, for as long as the file is open in this process or in one that inherits it.

    Raises:
        ConfigError: another process has it.
        OSError: the folder cannot be written to, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(_PATIENCE):
        file = (folder / LOCK).open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            time.sleep(_PAUSE if attempt < _PATIENCE - 1 else 0)
            continue
        except OSError:
            file.close()
            raise
        # The one before may have removed its file between the two calls.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        file.close()
    raise ConfigError(
        f"{folder}: {runner_of(folder) or 'another process'} is training in it; wait for its end or stop it, or choose "
        "another --output_dir"
    )


def sign(file: IO[bytes], process_id: int) -> None:
    """Write into a lock who holds it."""
    file.truncate(0)
    file.write(f"{process_id} {platform.node()}".encode())


@contextmanager
def only_run_in(folder: Path, tell: Callable[[str], object]) -> Iterator[None]:
    """Inside, no other training can begin in the folder. Where there are no locks, as on some network file systems,
    that is told.

    Raises:
        ConfigError: one has begun.
        WeightError: the folder cannot be written to.
    """
    check_writable(folder)
    try:
        file = _inherited(folder) or take_lock(folder)
    except OSError as error:
        tell(f"{folder}: its file system has no locks ({error.strerror}); start no second training in it")
        yield
        return
    with file:
        sign(file, os.getpid())
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def _inherited(folder: Path) -> IO[bytes] | None:
    """The lock that who started this process took for it."""
    with suppress(KeyError, ValueError, OSError):
        number = int(os.environ[INHERITED])
        if os.path.samestat(os.fstat(number), os.stat(folder / LOCK)):
            os.set_inheritable(number, False)
            return os.fdopen(number, "a+b", buffering=0)
    return None

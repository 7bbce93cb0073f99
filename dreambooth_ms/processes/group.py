"""The processes of a run, seen from one of them; a process that was started by itself is one of one."""

import platform
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dreambooth_ms.errors import FAILED_STATUS, INTERRUPTED_STATUS, USER_ERROR_STATUS, Tell, explain
from dreambooth_ms.processes.launch import Launch
from dreambooth_ms.processes.rendezvous import Rendezvous

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and what it can ask of the others. Methods are called by all of them."""

    rank: int = 0
    count: int = 1
    launch: Launch | None = None
    exchange: Callable[[str, Any], list[Any]] = lambda what, value: [value]
    """This process's value, plain JSON -> the values of all, by rank. The text names the exchange, for the message that
    a process did not come to it."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def wait_for_all(self, what: str) -> None:
        """Come back when all processes have come to this point."""
        self.exchange(what, None)

    def from_first(self, what: str, make: Callable[[], Any]) -> Any:
        """What rank 0 finds, made there alone; plain JSON."""
        return self.exchange(what, make() if self.is_first else None)[0]

    @contextmanager
    def first_goes_ahead(self, what: str) -> Iterator[None]:
        """Inside, rank 0 is alone; then come the others, who find what it left."""
        if not self.is_first:
            self.wait_for_all(what)
        yield
        if self.is_first:
            self.wait_for_all(what)

    def count_on_this_machine(self) -> int:
        """How many of the processes share this machine's memory, this one included."""
        try:
            own = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")  # Containers have it in common.
        except OSError:
            own = platform.node()
        machines = self.exchange("the machines", own)
        return machines.count(machines[self.rank])

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of work that is the same list everywhere: every item is in one part."""
        return items[self.rank :: self.count]


ALONE = Processes()


def run_in_group(
    launch: Launch | None, work: Callable[[Processes], int], complain: Tell, exchange_seconds: float = 3600
) -> int:
    """Do the work of one process of a run, and return its exit status.

    Of several processes none outlives another's failure, and each ends here, with the status of the work or of the
    failure, of which one prints a line by `complain`. One that is alive is waited for `exchange_seconds`. UserError if
    the only process made a mistake, or the processes could not connect.
    """
    if launch is None:
        return work(ALONE)
    rendezvous = Rendezvous(launch, exchange_seconds, complain)
    try:
        status = work(Processes(launch.rank, launch.count, launch, rendezvous.exchange))
    except KeyboardInterrupt:
        rendezvous.fail("interrupted", INTERRUPTED_STATUS)
    except BaseException as error:  # noqa: BLE001  (the others must learn of it, whatever it is)
        if (explanation := explain(error)) is not None:
            rendezvous.fail(explanation, USER_ERROR_STATUS)
        traceback.print_exc()
        rendezvous.fail(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", FAILED_STATUS)
    return rendezvous.finish(status)

"""Several processes that compute as one: MindSpore's collective operations, HCCL on Ascend and its own on CPU."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, communication, nn, ops, set_device
from mindspore.ops import constexpr

from dreambooth_ms.processes.launch import SCHEDULER, Launch
from dreambooth_ms.processes.rendezvous import START_SECONDS, Rendezvous, wait_until_listening
from dreambooth_ms.runtime.device import Formulation, formulation

_PR_SET_PDEATHSIG = 1


@contextmanager
def collective_operations(launch: Launch | None) -> Iterator[None]:
    """Inside, the processes of a launched run compute as one. Enter it when the device is chosen and all are connected.

    On CPU, MindSpore does without OpenMPI's help and needs a scheduler of its own, also under mpirun; rank 0 brings it
    there (measured). On Ascend HCCL connects through mpirun by itself (documented).
    """
    if launch is None:
        yield
        return
    needs_scheduler = launch.launcher == "mpirun" and formulation() is Formulation.CPU
    with scheduler_process(replace(launch, rank=SCHEDULER)) if needs_scheduler and launch.rank == 0 else nullcontext():
        if needs_scheduler:
            os.environ |= launch.scheduler_environment
        if launch.launcher == "msrun" or needs_scheduler:
            wait_until_listening(launch.host, launch.port, START_SECONDS, "MindSpore's scheduler")
        communication.init()
        yield


def serve_as_scheduler(launch: Launch) -> None:
    """Be the scheduler that msrun brings, until the run ends, in good order or not."""
    with scheduler_process(launch):
        Rendezvous(launch, exchange_seconds=0, complain=lambda line: None).wait_for_end()


@contextmanager
def scheduler_process(launch: Launch) -> Iterator[None]:
    """Inside, MindSpore's scheduler runs for this launch, which connects the processes of a run on CPU.

    It blocks all its threads until every worker has ended, and for half a minute more after one that died (measured).
    So it is a process of its own. It does without OpenMPI's variables, or it would take itself for a rank.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_"))}
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    process = subprocess.Popen(command, env=kept | launch.scheduler_environment)
    try:
        yield
    finally:
        process.kill()
        process.wait()


class SumOverProcesses(nn.Cell):
    """Tensors -> their sums over all processes, by one reduction of all of them joined to one."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.all_reduce = ops.AllReduce()
        self.map = ops.HyperMap()

    def construct(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total = self.all_reduce(ops.concat(self.map(_flat, tensors)))
        return self.map(ops.partial(_part, total), starts(self.map(ops.size, tensors)), tensors)


class ShareParts(nn.Cell):
    """Each process's part of the parameters, by rank -> all parameters everywhere, by one gathering of the parts."""

    def __init__(self, parts: Sequence[Sequence[Parameter]], rank: int) -> None:
        super().__init__(auto_prefix=False)
        sizes = [[parameter.size for parameter in part] for part in parts]
        longest = max(map(sum, sizes))
        others = [number for number in range(len(parts)) if number != rank]
        self.own = ParameterTuple(list(parts[rank]))
        self.others = ParameterTuple([parameter for number in others for parameter in parts[number]])
        self.offsets = tuple(number * longest + start for number in others for start in starts(sizes[number]))
        self.filling = longest - sum(sizes[rank])
        self.all_gather = ops.AllGather()
        self.map = ops.HyperMap()

    def construct(self, updated: Any) -> tuple[Tensor, ...]:
        """`updated`: what this process's part is read after."""
        own = self.map(ops.partial(_flat_after, updated), self.own)
        if self.filling > 0:
            own = own + (ops.zeros((self.filling,), own[0].dtype),)
        total = self.all_gather(ops.concat(own))
        return self.map(ops.partial(_set_to_part, total), self.offsets, self.others)


def from_process(rank: int, value: Tensor | None, shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor that the process with this rank has, on all of them; the others give None."""
    sent = Tensor(value.asnumpy()) if value is not None else ops.zeros(shape, getattr(ms, dtype.lower()))
    return ops.Broadcast(rank)((sent,))[0]


def _flat(tensor: Tensor) -> Tensor:
    return ops.reshape(tensor, (-1,))


def _flat_after(updated: Any, tensor: Tensor) -> Tensor:
    return _flat(ops.depend(tensor, updated))


def _part(total: Tensor, offset: int, tensor: Tensor) -> Tensor:
    return ops.reshape(ops.slice(total, (offset,), (ops.size(tensor),)), tensor.shape)


def _set_to_part(total: Tensor, offset: int, tensor: Tensor) -> Tensor:
    return ops.assign(tensor, _part(total, offset, tensor))


@constexpr
def starts(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each of some neighbours of these sizes begins."""
    return tuple(accumulate(sizes[:-1], initial=0))


def _schedule(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        set_device("CPU")
        communication.init()


if __name__ == "__main__":
    _schedule(int(sys.argv[1]))

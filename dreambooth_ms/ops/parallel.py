"""Several processes that compute as one: MindSpore's collective operations, HCCL on Ascend and its own on CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from mindspore import Tensor, communication, nn, ops
from mindspore.ops import constexpr

from dreambooth_ms.ops.backend import Formulation, formulation
from dreambooth_ms.ops.scheduler import scheduler_process
from dreambooth_ms.processes.channel import wait_until_listening
from dreambooth_ms.processes.launch import Launch
from dreambooth_ms.processes.meeting import START_SECONDS, Meeting


@contextmanager
def collective_operations(launch: Launch | None) -> Iterator[None]:
    """Inside, the processes of a launched run compute together. Enter it after the device is chosen and all have met.

    On CPU, MindSpore does without OpenMPI's help and needs a scheduler of its own, also under mpirun; rank 0 brings it
    there (measured). On Ascend HCCL meets through mpirun by itself (documented).
    """
    if launch is None:
        yield
        return
    needs_scheduler = launch.launcher == "mpirun" and formulation() is Formulation.CPU
    with scheduler_process(launch.of_scheduler()) if needs_scheduler and launch.rank == 0 else nullcontext():
        if needs_scheduler:
            os.environ |= launch.scheduler_environment
        if launch.launcher == "msrun" or needs_scheduler:
            wait_until_listening(launch.host, launch.port, START_SECONDS)
        communication.init()
        yield


def serve_as_scheduler(launch: Launch) -> None:
    """Be the scheduler that msrun brings, until the run ends, in good order or not."""
    with scheduler_process(launch):
        Meeting(launch, exchange_seconds=0, complain=lambda line: None).wait_for_end()


class SumOverProcesses(nn.Cell):
    """Tensors -> their sums over all processes, by one reduction of all of them joined to one."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.all_reduce = ops.AllReduce()
        self.map = ops.HyperMap()

    def construct(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total = self.all_reduce(ops.concat(self.map(_flat, tensors)))
        return self.map(ops.partial(_part, total), _offsets(self.map(_size, tensors)), tensors)


_flat = ops.MultitypeFuncGraph("flat")
_size = ops.MultitypeFuncGraph("size")
_part = ops.MultitypeFuncGraph("part")


@_flat.register("Tensor")
def _flat_tensor(tensor):
    return ops.reshape(tensor, (-1,))


@_size.register("Tensor")
def _size_of_tensor(tensor):
    return ops.size(tensor)


@_part.register("Tensor", "Number", "Tensor")
def _part_of_total(total, offset, tensor):
    return ops.reshape(ops.slice(total, (offset,), (ops.size(tensor),)), tensor.shape)


@constexpr
def _offsets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(end - size) for size, end in zip(sizes, np.cumsum(sizes), strict=True))

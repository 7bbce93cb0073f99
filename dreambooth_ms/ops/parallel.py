"""Several processes that train as one: MindSpore's collective operations, HCCL on Ascend and its own on CPU."""

import os
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, communication, nn, ops
from mindspore.ops import constexpr


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1


def join_processes() -> Processes:
    """Join the other processes if `msrun` started this one. Call it after the device is chosen."""
    if "MS_WORKER_NUM" not in os.environ:
        return Processes()
    communication.init()
    return Processes(communication.get_rank(), communication.get_group_size())


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

"""Cells in another formulation than the device's own, for those who look at one or compare the two on one machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from mindspore import Tensor, ops

from dreambooth_ms.ops import ascend
from dreambooth_ms.runtime import device


@contextmanager
def use_formulation(chosen: device.Formulation) -> Iterator[None]:
    """Inside, cells are built in this formulation.

    Those operators of Ascend's that CPU has no kernels for are others with the same result, so that the cells can be
    computed here.
    """
    replaced: dict[str, Any] = {"convolution": _convolution, "layer_norm": _layer_norm, "look_up": _look_up}
    replaced |= {"exclusive_or": ops.bitwise_xor, "bitwise_and": ops.bitwise_and, "widen": _widen, "part": _part}
    before, device._formulation = device._formulation, chosen
    try:
        with mock.patch.multiple(ascend, **replaced):
            yield
    finally:
        device._formulation = before


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: ascend.Padding) -> Tensor:
    out_channels, _, size, _ = weight.shape
    y = ops.Conv2D(out_channels, size, pad_mode="pad", pad=padding, stride=stride)(x, weight)
    return y if bias is None else ops.BiasAdd()(y, bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return ops.LayerNorm(-1, -1, eps)(x, weight, bias)[0]


def _look_up(table: Tensor, ids: Tensor) -> Tensor:
    return ops.gather(table, ids, 0)


def _widen(x: Tensor, width: int) -> Tensor:
    return ops.concat((x, ops.zeros((*x.shape[:-1], width - x.shape[-1]), x.dtype)), -1)


def _part(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    return x.narrow(axis, start, length)

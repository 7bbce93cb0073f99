"""Prior preservation without pictures of the class: a penalty on what was added to the base's weights (Kim et al.,
2026), or the base's own answers as the targets of class prompts (kohya's differential output preservation, 2024)."""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from dreambooth_ms.adapters.lora import AdaptedLayer, LoraConv2d, LoraDense, LoraLayer
from dreambooth_ms.data.batches import Batch
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.ops import look_up, part, total
from dreambooth_ms.ops.graph import after
from dreambooth_ms.ops.linear import batch_times, batch_times_transposed, batch_transposed_times
from dreambooth_ms.runtime.compiled_cell import CompiledCell
from dreambooth_ms.training.methods import Learner
from dreambooth_ms.training.optimisers import state

_map = ops.HyperMap()
_NOTHING: tuple[Any, ...] = ()


class Penalty(nn.Cell):
    """() -> (), a weight times the sum of the squares of all that is added to the base's weights, which are what they
    are when this is made. New words are no such change."""

    def __init__(self, weight: float, learner: Learner) -> None:
        super().__init__(auto_prefix=False)
        words = learner.text_encoders.new_rows().values() if learner.text_encoders else ()
        whole = [one for one in learner.parameters if all(one is not word for word in words)]
        plain = [one for one in learner.layers if type(one) in (LoraDense, LoraConv2d) and not one.has_middle]
        alike = _places([(one.rank, one.alpha) for one in plain])
        squares: list[nn.Cell] = [_LowRank([plain[place] for place in own]) for own in alike]
        squares += [CellMethod(one.squared_change) for one in learner.layers if one not in plain]
        self.squares, self.weight = nn.CellList(squares or [_Difference(whole)], auto_prefix=False), weight

    def construct(self) -> Tensor:
        found = self.squares[0]()
        for square in self.squares[1:]:
            found = found + square()
        return found * self.weight


class _Difference(nn.Cell):
    """() -> (), the sum of the squares of the differences of weights to what they are now."""

    def __init__(self, weights: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.weights, self.square = ParameterTuple(weights), _SquaredDifference()
        self.base = ParameterTuple([state(f"base.{one.name}", one.asnumpy()) for one in weights])

    def construct(self) -> Tensor:
        return total(ops.stack(_map(self.square, self.weights, self.base)))


class _SquaredDifference(nn.Cell):
    """||W - W0||_F^2, (). The backward pass makes the difference anew, or those of all weights were kept for it."""

    def construct(self, weight: Tensor, base: Tensor) -> Tensor:
        difference = weight - base
        return total(difference * difference)

    def bprop(self, weight: Tensor, base: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return (base - weight) * (-2 * dout), ops.zeros_like(base)


class _LowRank(nn.Cell):
    """() -> (), the sum of ||alpha / r * B A||_F^2 of layers of one rank and alpha. Factors of one shape are one
    tensor: on CPU each operation on so small ones costs as much as its arithmetic, and layer by layer the penalty takes
    a quarter of a small UNet's step (measured)."""

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        super().__init__(auto_prefix=False)
        downs, ups = [one.lora_A.weight for one in layers], [one.lora_B.weight for one in layers]
        of_downs, of_ups = _places([one.shape for one in downs]), _places([one.shape for one in ups])
        self.downs = tuple(ParameterTuple([downs[place] for place in own]) for own in of_downs)
        self.ups = tuple(ParameterTuple([ups[place] for place in own]) for own in of_ups)
        self.rank, self.scale = layers[0].rank, layers[0].alpha / layers[0].rank
        self.of_stacks = _SquaredProducts(of_downs, of_ups)

    def construct(self) -> Tensor:
        downs, ups = _NOTHING, _NOTHING
        for own in self.downs:
            downs = downs + (ops.reshape(ops.stack(own), (len(own), self.rank, -1)),)
        for own in self.ups:
            ups = ups + (ops.reshape(ops.stack(own), (len(own), -1, self.rank)),)
        return self.of_stacks(downs, ups) * self.scale**2


class _SquaredProducts(nn.Cell):
    """Of some layers A (N, r, I) and B (M, O, r) in several tensors, each with those of the layers at some places ->
    (), the sum of ||B A||_F^2. That is the sum of the products of A A^T and B^T B, so that B A is never formed."""

    def __init__(self, places_of_downs: Sequence[Sequence[int]], places_of_ups: Sequence[Sequence[int]]) -> None:
        super().__init__(auto_prefix=False)
        downs, ups = np.concatenate(places_of_downs), np.concatenate(places_of_ups)
        self.order_of_downs, self.order_of_ups = (
            Tensor(np.argsort(others)[own].astype(np.int32)) for own, others in ((downs, ups), (ups, downs))
        )

    def construct(self, downs: tuple[Tensor, ...], ups: tuple[Tensor, ...]) -> Tensor:
        of_ups = ops.concat(_map(batch_transposed_times, ups, ups))
        return total(ops.concat(_map(batch_times_transposed, downs, downs)) * look_up(of_ups, self.order_of_downs))

    def bprop(
        self, downs: tuple[Tensor, ...], ups: tuple[Tensor, ...], out: Tensor, dout: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """2 (B^T B) A and 2 B (A A^T)."""
        of_downs = look_up(ops.concat(_map(batch_times_transposed, downs, downs)), self.order_of_ups) * (2 * dout)
        of_ups = look_up(ops.concat(_map(batch_transposed_times, ups, ups)), self.order_of_downs) * (2 * dout)
        ddowns, dups, start = _NOTHING, _NOTHING, 0
        for stack in downs:
            ddowns = ddowns + (batch_times(part(of_ups, start, stack.shape[0]), stack),)
            start = start + stack.shape[0]
        start = 0
        for stack in ups:
            dups = dups + (batch_times(stack, part(of_downs, start, stack.shape[0])),)
            start = start + stack.shape[0]
        return ddowns, dups


def _places(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of each of the keys."""
    found = defaultdict[Hashable, list[int]](list)
    for place, key in enumerate(keys):
        found[key].append(place)
    return list(found.values())


class BaseAnswers(CompiledCell):
    """What a denoiser reads, by its `input_names` -> what it would answer without its layers' updates."""

    title = "the base's answers"

    def __init__(self, denoiser: nn.Cell, layers: Sequence[AdaptedLayer]) -> None:
        super().__init__(auto_prefix=False)
        self.denoiser, self.scales = denoiser, ParameterTuple([one.lora_scale for one in layers])
        self.values = tuple(Tensor(one.asnumpy()) for one in self.scales)

    def construct(self, *inputs: Tensor) -> Tensor:
        off = _map(_turn_off, self.scales)
        prediction = self.denoiser(*_map(ops.partial(_after, off), inputs))
        return ops.depend(prediction, _map(ops.assign, self.scales, _map(ops.partial(_after, prediction), self.values)))

    def as_targets(self, make_batch: Callable[[int], Batch], concepts: Collection[str]) -> Callable[[int], Batch]:
        """The same batches, in which these answers are the targets of the rows of some concepts."""

        def make(number: int) -> Batch:
            batch = make_batch(number)
            rows, target = [at for at, name in enumerate(batch.concepts) if name in concepts], batch.target.copy()
            answers = self(*(Tensor(of_rows[rows]) for of_rows in batch.inputs.values())).asnumpy()
            target[rows] = answers[:, : target.shape[1]]  # A variance behind them is not trained.
            return replace(batch, target=target)

        return make


def _turn_off(scale):
    return ops.assign(scale, scale * 0.0)


def _after(earlier, x):
    return after(x, earlier)

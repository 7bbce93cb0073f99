"""Gradient checkpointing (Chen et al., 2016): the backward pass computes each segment's activations again. It goes from
segment to segment, and each is differentiated alone. MindSpore's `Cell.recompute` takes what a cell's own `bprop`
computes for a part of the forward pass, so that activations stay (measured on CPU)."""

from collections.abc import Sequence
from typing import Any

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from dreambooth_ms.models.unet import Segments
from dreambooth_ms.ops.graph import after, select

_NOTHING: tuple[Any, ...] = ()
"""Where a tuple begins that grows in a compiled loop."""


class RecomputedGradients(nn.Cell):
    """What `ops.value_and_grad` of a loss gives, with one segment's activations in memory at a time. `compare`:
    prediction, target, weights, so many extras -> the loss and what is reported beside it."""

    def __init__(self, compare: nn.Cell, num_extras: int, denoiser: Segments, trainables: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        segments = denoiser.segments
        # A penalty depends on the trainables by another way than the prediction.
        self.penalised, self.compare, self.num_extras = compare.penalty is not None, compare, num_extras
        by = ParameterTuple(trainables) if self.penalised else None
        self.loss_and_gradient = ops.value_and_grad(compare, 0, by, has_aux=True)
        self.segments = nn.CellList([segment.cell for segment in segments], auto_prefix=False)
        self.reads = tuple(segment.reads for segment in segments)
        self.num_results = tuple(segment.num_results or 0 for segment in segments)
        self._plan_backward(denoiser, trainables)
        self.map = ops.HyperMap()

    def _plan_backward(self, denoiser: Segments, trainables: Sequence[Parameter]) -> None:
        """Which segments have gradients, of which values, and where the backward pass finds each: constants of the
        graph, which would cost memory as a table that grows."""
        places = {id(parameter): place for place, parameter in enumerate(trainables)}
        depend_on_trainables: set[int] = set()
        gradients, wanted, results = [], [], []
        next_result = denoiser.num_inputs
        for segment in denoiser.segments:
            own = [p for part in segment.parts for p in part.get_parameters() if id(p) in places]
            wanted.append([value in depend_on_trainables for value in segment.reads])
            results.append(range(next_result, next_result + (segment.num_results or 1)))
            next_result = results[-1].stop
            if own or any(wanted[-1]):
                depend_on_trainables.update(results[-1])
            gradients.append(_SegmentGradient(segment.cell, own, any(wanted[-1])))
        self.gradients = nn.CellList(gradients, auto_prefix=False)
        self.backward = tuple(i for i in reversed(range(len(results))) if results[i][0] in depend_on_trainables)
        readers: dict[int, list[tuple[int, int]]] = {next_result - 1: [(0, 0)]}
        found: dict[int, tuple[int, int]] = {}
        terms = []
        for number, i in enumerate(self.backward, 1):
            terms.append(tuple(tuple(readers[result]) for result in results[i]))
            for position, value in enumerate(denoiser.segments[i].reads):
                if wanted[i][position]:
                    readers.setdefault(value, []).append((number, position))
            found |= {places[id(p)]: (number - 1, position) for position, p in enumerate(gradients[i].weights)}
        assert len(found) == len(trainables), "every trainable belongs to one segment"
        self.terms = tuple(terms)
        """For each segment on the way back and each of its results: (who read it, counted from the loss; as what)."""
        self.segment_of, self.place_in_segment = zip(*(found[place] for place in range(len(trainables))), strict=True)

    def construct(
        self, target_BCHW: Tensor, weight_B: Tensor, *extras_and_inputs: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        extras, values = extras_and_inputs[: self.num_extras], extras_and_inputs[self.num_extras :]
        for i in range(len(self.reads)):
            result = self.segments[i](*select(values, self.reads[i]))
            values = values + (result if self.num_results[i] else (result,))
        loss_and_report, dprediction = self.loss_and_gradient(values[-1], target_BCHW, weight_B, *extras)
        of_penalty = _NOTHING
        if self.penalised:
            dprediction, of_penalty = dprediction
        dinputs, dweights = _NOTHING + ((dprediction,),), _NOTHING
        for number in range(len(self.backward)):
            i = self.backward[number]
            dresults = _sums(dinputs, self.terms[number])
            dresult = dresults if self.num_results[i] else dresults[0]
            inputs_after = _all_after(select(values, self.reads[i]), dresult)
            of_inputs, of_weights = self.gradients[i](dresult, *inputs_after)
            dinputs, dweights = dinputs + (of_inputs,), dweights + (of_weights,)
        gradients = self.map(ops.partial(_pick, dweights), self.segment_of, self.place_in_segment)
        return loss_and_report, self.map(ops.add, gradients, of_penalty) if self.penalised else gradients


class _SegmentGradient(nn.Cell):
    """Gradient of a segment's result, its inputs -> gradients of its inputs, if they are wanted, and of its weights."""

    def __init__(self, segment: nn.Cell, weights: Sequence[Parameter], wants_inputs: bool) -> None:
        super().__init__(auto_prefix=False)
        self.segment, self.weights = segment, ParameterTuple(weights)
        self.has_weights, self.wants_inputs = len(weights) > 0, wants_inputs
        self.differentiate = ops.GradOperation(wants_inputs, self.has_weights, sens_param=True)

    def construct(self, dresult: Tensor, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if not self.has_weights:
            return self.differentiate(self.segment)(*inputs, dresult), ()
        if not self.wants_inputs:
            return (), self.differentiate(self.segment, self.weights)(*inputs, dresult)
        return self.differentiate(self.segment, self.weights)(*inputs, dresult)


# Loops within a loop are functions of their own: the compiler calls what comes after a loop from its last round, each
# round from the one before, and gives up at 1000 calls, which SDXL's segments would reach (measured).


def _all_after(values: tuple[Tensor, ...], earlier: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    later = _NOTHING
    for value in values:
        later = later + (after(value, earlier),)
    return later


def _sums(
    dinputs: tuple[tuple[Tensor, ...], ...], terms_of_results: tuple[tuple[tuple[int, int], ...], ...]
) -> tuple[Tensor, ...]:
    sums = _NOTHING
    for terms in terms_of_results:
        sums = sums + (_sum(dinputs, terms),)
    return sums


def _sum(dinputs: tuple[tuple[Tensor, ...], ...], terms: tuple[tuple[int, int], ...]) -> Tensor:
    total = dinputs[terms[0][0]][terms[0][1]]
    for reader, position in terms[1:]:
        total = total + dinputs[reader][position]
    return total


def _pick(tuples, number, position):
    return tuples[number][position]

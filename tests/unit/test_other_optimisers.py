"""8-bit AdamW, Adafactor and Prodigy do what their papers say, step by step; none changes a bit in a skipped step."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mindspore import Parameter, Tensor, nn, ops
from transformers.optimization import Adafactor as TransformersAdafactor

from dreambooth_ms.training import flat_vectors
from dreambooth_ms.training.checkpoint import open_checkpoint, restore, save_checkpoint
from dreambooth_ms.training.flat_vectors import (
    BLOCK,
    FIRST_ESTIMATE,
    AdamW8bit,
    Prodigy,
    Quantised,
    dynamic_levels,
    group_by_length,
)
from dreambooth_ms.training.optimisers import DECAY_POWER, Adafactor, AdamW, Hyperparameters
from tests.parity.reference import normal, relative_error

# A matrix that is no whole number of blocks, one that is, a vector, a scalar's neighbour, a stored convolution's shape.
SHAPES = {"down": (7, 40), "up": (32, 12), "bias": (5,), "scale": (1,), "conv": (3, 2, 3, 3)}
RATES, DECAYS = (1.0, 1.0, 1.0, 0.3, 0.3), (1.0, 1.0, 0.5, 0.5, 0.5)
STEPS = 12


@pytest.fixture(autouse=True)
def no_dead_cells():
    """A cell that is collected makes the living ones with the same inputs compile once more; so collect them before."""
    gc.collect()


@pytest.fixture(autouse=True)
def short_vectors(monkeypatch):
    """The first two matrices do not fit into one vector."""
    monkeypatch.setattr(flat_vectors, "LENGTH", 400)


def start_values(size=1.0):
    return [np.float32(size) * normal(*shape, seed=3) for shape in SHAPES.values()]


def gradients_at(step):
    """Of very unlike sizes, within a tensor and between them; one is zero at first."""
    sizes = (1.0, 1e-3, 1e-4, 0.0 if step < 3 else 1e-2, 1e-1)
    spread = [np.exp(normal(*shape, seed=7)) for shape in SHAPES.values()]
    return [
        np.float32(size) * wide * normal(*shape, seed=100 + step)
        for size, wide, shape in zip(sizes, spread, SHAPES.values(), strict=True)
    ]


def rate_at(step):
    return 0.01 / (1 + step)


class Update(nn.Cell):
    """The optimiser as a training step with loss scaling calls it."""

    def __init__(self, optimiser):
        super().__init__(auto_prefix=False)
        self.optimiser = optimiser

    def construct(self, proceed, *gradients):
        return ops.depend(proceed, self.optimiser(gradients, proceed))


class Ours:
    """Parameters, an optimiser on them, and the compiled update."""

    def __init__(self, make, start=None):
        values = zip(SHAPES, start or start_values(), strict=True)
        self.parameters = [Parameter(Tensor(value), name=name) for name, value in values]
        self.optimiser = make(self.parameters)
        self.update = Update(self.optimiser)

    def step(self, number, gradients=None, proceed=True, rate=rate_at):
        gradients = gradients_at(number) if gradients is None else gradients
        self.optimiser.prepare(number + 1, rate(number))
        self.update(Tensor(proceed), *map(Tensor, gradients))

    def state(self):
        return [*self.parameters, *self.optimiser.moments()]

    def bits(self):
        return {parameter.name: parameter.asnumpy().tobytes() for parameter in self.state()}


MAKERS = {
    "AdamW": lambda parameters: AdamW(parameters, Hyperparameters(), RATES, DECAYS),
    "8-bit AdamW": lambda parameters: AdamW8bit(parameters, Hyperparameters(), RATES, DECAYS),
    "Adafactor": lambda parameters: Adafactor(parameters, Hyperparameters(), RATES, DECAYS),
    "Prodigy": lambda parameters: Prodigy(parameters, Hyperparameters(), decay_factors=DECAYS),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_skipped_step_changes_no_bit_and_a_resumed_run_is_the_same_to_the_bit(name, tmp_path):
    # Small enough that Prodigy's first steps, of size 1e-8 here, are no rounding.
    ours = Ours(MAKERS[name], start_values(1e-3))
    for number in range(2):
        ours.step(number)
    before = ours.bits()
    for bad in (np.inf, np.nan):
        gradients = gradients_at(2)
        gradients[1] = gradients[1] * 0 + np.float32(bad)
        ours.step(2, gradients, proceed=False)
        assert ours.bits() == before
    path = save_checkpoint(tmp_path, 2, ours.state(), "", lambda folder, step: None)
    ours.step(2)
    after = ours.bits()
    assert all(after[parameter] != before[parameter] for parameter in ("down", "up", "bias"))
    for parameter in ours.state():
        parameter.set_data(Tensor(parameter.asnumpy() * 0))
    restore(open_checkpoint(path), ours.state())
    assert ours.bits() == before
    ours.step(2)
    assert ours.bits() == after
    assert len(ours.update.compile_cache) == 1


class UpdateAlways(nn.Cell):
    """The optimiser as a training step in float32 calls it."""

    def __init__(self, optimiser):
        super().__init__(auto_prefix=False)
        self.optimiser = optimiser

    def construct(self, *gradients):
        return ops.depend(gradients[0], self.optimiser(gradients, None))


@pytest.mark.parametrize("name", MAKERS)
def test_without_loss_scaling_a_step_is_the_same_to_the_bit(name):
    one, other = (Ours(MAKERS[name], start_values(1e-3)) for _ in range(2))
    always = UpdateAlways(other.optimiser)
    for number in range(2):
        one.step(number)
        other.optimiser.prepare(number + 1, rate_at(number))
        always(*map(Tensor, gradients_at(number)))
    assert one.bits() == other.bits()


# --- Adafactor ---


def adafactor_reference(values, hyperparameters):
    """transformers', with a group for each parameter; shapes as ours sees them."""
    parameters = [
        torch.nn.Parameter(torch.tensor(value.reshape(len(value), -1) if value.ndim > 1 else value)) for value in values
    ]
    groups = [
        {"params": [parameter], "weight_decay": hyperparameters.weight_decay * decay, "lr": rate}
        for parameter, rate, decay in zip(parameters, RATES, DECAYS, strict=True)
    ]
    return parameters, TransformersAdafactor(
        groups,
        lr=1.0,
        scale_parameter=hyperparameters.scale_parameter,
        relative_step=False,
        warmup_init=False,
        decay_rate=DECAY_POWER,
    )


@pytest.mark.parametrize("scale_parameter", [False, True])
def test_adafactor_is_that_of_transformers(scale_parameter):
    hyperparameters = Hyperparameters(weight_decay=0.1, scale_parameter=scale_parameter)
    ours = Ours(lambda parameters: Adafactor(parameters, hyperparameters, RATES, DECAYS))
    parameters, reference = adafactor_reference(start_values(), hyperparameters)
    for number in range(STEPS):
        ours.step(number)
        for parameter, gradient in zip(parameters, gradients_at(number), strict=True):
            parameter.grad = torch.tensor(gradient).reshape(parameter.shape)
        for group, rate in zip(reference.param_groups, RATES, strict=True):
            group["lr"] = rate_at(number) * rate
        reference.step()
        for mine, expected in zip(ours.parameters, parameters, strict=True):
            # Float32 sums and roots in another order; measured 4e-7.
            assert relative_error(mine.asnumpy().reshape(expected.shape), expected) < 2e-6, (number, mine.name)


def test_adafactor_keeps_rows_and_columns_alone():
    sizes = {state.name: state.size for state in Ours(MAKERS["Adafactor"]).optimiser.moments()}
    assert (sizes["rows.up"], sizes["columns.up"], sizes["rows.conv"], sizes["columns.conv"]) == (32, 12, 3, 18)
    assert (sizes["rows.bias"], sizes["columns.bias"]) == (1, 5)


# --- Prodigy ---


class ProdigyReference:
    """Algorithm 4 of the paper in float64, with decay, bias correction and safeguard as in its authors' program.

    It agrees with that program, prodigyopt 1.1.2, to about 1e-11 (measured over such steps).
    """

    def __init__(self, values, h):
        self.x, self.h, self.k, self.d, self.r = [value.astype(np.float64) for value in values], h, 0, FIRST_ESTIMATE, 0
        self.x0 = [x.copy() for x in self.x]
        self.m, self.v, self.s = ([np.zeros_like(x) for x in self.x] for _ in range(3))
        self.beta3 = h.beta2**0.5 if h.beta3 is None else h.beta3

    def step(self, gradients, learning_rate):
        h, d, beta3 = self.h, self.d, self.beta3
        decays = [h.weight_decay * factor for factor in DECAYS]
        self.k += 1
        if h.use_bias_correction:
            learning_rate *= (1 - h.beta2**self.k) ** 0.5 / (1 - h.beta1**self.k)
        if not h.decouple:
            gradients = [g + decay * x for g, decay, x in zip(gradients, decays, self.x, strict=True)]
        per_start = d / FIRST_ESTIMATE
        self.r = beta3 * self.r
        for i, g in enumerate(gradients):
            self.m[i] = h.beta1 * self.m[i] + (1 - h.beta1) * d * g
            self.v[i] = h.beta2 * self.v[i] + (1 - h.beta2) * d**2 * g**2
            self.r += per_start * d * learning_rate * (g * (self.x0[i] - self.x[i])).sum()
            self.s[i] = beta3 * self.s[i] + per_start * d * (1 if h.safeguard_warmup else learning_rate) * g
        self.d = max(d, self.r / sum(np.abs(s).sum() for s in self.s))
        for i, decay in enumerate(decays):
            change = self.m[i] / (self.v[i] ** 0.5 + self.d * h.epsilon)
            self.x[i] = self.x[i] - d * learning_rate * (change + (decay * self.x[i] if h.decouple else 0))


# By then the estimate has grown to ten times its start and more.
PRODIGY_STEPS = {"defaults": 70, "all others": 25}
# Float32 sums over all parameters; measured 3e-5 and 4e-5.
PRODIGY_ESTIMATE, PRODIGY_WAY = 2e-4, 2e-4


def prodigy_rate(number):
    return 1 - number / 100


PRODIGY_CASES = {
    "defaults": Hyperparameters(),
    "all others": Hyperparameters(0.8, 0.95, 0.1, 1e-6, 0.9, False, False, False),
}


@pytest.mark.parametrize("name", PRODIGY_CASES)
def test_prodigy_is_the_papers(name):
    """On a slope that points mostly the same way, so that the estimate grows by orders of magnitude."""
    hyperparameters, start = PRODIGY_CASES[name], start_values(1e-3)
    ours = Ours(lambda parameters: Prodigy(parameters, hyperparameters, decay_factors=DECAYS), start)
    reference = ProdigyReference(start, hyperparameters)
    worst = 0.0
    for number in range(PRODIGY_STEPS[name]):
        gradients = [0.3 * g + np.abs(h) for g, h in zip(gradients_at(number), gradients_at(50), strict=True)]
        ours.step(number, gradients, rate=prodigy_rate)
        reference.step([g.astype(np.float64) for g in gradients], prodigy_rate(number))
        estimate = float(ours.optimiser.estimate.asnumpy())
        worst = max(worst, abs(estimate / reference.d - 1))
    print(f"estimate {reference.d:.1e}, off by {worst:.1e}")
    assert reference.d > 10 * FIRST_ESTIMATE
    assert worst < PRODIGY_ESTIMATE
    for mine, expected, first in zip(ours.parameters, reference.x, start, strict=True):
        off = np.abs(mine.asnumpy() - expected).max() / np.abs(expected - first).max()
        print(f"{mine.name} {off:.1e}")
        assert off < PRODIGY_WAY


# --- 8-bit AdamW ---


def test_levels_are_those_of_dynamic_tree_quantisation():
    signed, unsigned = dynamic_levels(True).astype(np.float64), dynamic_levels(False).astype(np.float64)
    assert len(np.unique(signed)) == len(np.unique(unsigned)) == 256
    assert (signed.min(), unsigned.min(), signed.max(), unsigned.max()) == (pytest.approx(-0.9929688), 0, 1, 1)
    for decade in range(7):
        top = 10.0 ** (decade - 6)
        inside = [((levels > top / 10) & (levels < top)).sum() for levels in (signed, -signed, unsigned)]
        assert inside == [2**decade, 2**decade, 2 ** (decade + 1)]
    assert sorted(-signed[signed < 0]) == pytest.approx(sorted(signed[(signed > 0) & (signed < 1)]))


class Stored(nn.Cell):
    def __init__(self, length, signed):
        super().__init__(auto_prefix=False)
        self.quantised = Quantised(length, signed, "stored")

    def construct(self, numbers):
        return self.quantised.read(ops.depend(numbers, self.quantised.write(None, numbers)))


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_is_stored_as_the_nearest_level_of_its_block(signed):
    numbers = np.exp(3 * normal(5, BLOCK)).astype(np.float32) * (normal(5, BLOCK, seed=1) if signed else 1)
    numbers[3] = 0
    stored = Stored(5 * BLOCK, signed)(Tensor(numbers)).asnumpy()
    levels, largest = dynamic_levels(signed).astype(np.float64), np.abs(numbers).max(1, keepdims=True)
    distances = np.abs(numbers[..., None] - largest[..., None] * levels)
    assert np.abs(stored - numbers) == pytest.approx(distances.min(-1), rel=1e-5, abs=1e-7 * largest.max())
    assert (stored[3] == 0).all()


class Adamw8bitReference:
    """AdamW whose moments go through the levels after every step, tensor by tensor, in float64."""

    def __init__(self, values, h):
        self.x, self.h, self.k = [value.astype(np.float64) for value in values], h, 0
        self.m, self.root = ([np.zeros(x.size) for x in self.x] for _ in range(2))

    def step(self, gradients, learning_rate):
        self.k += 1
        h, (c1, c2) = self.h, (1 - self.h.beta1**self.k, 1 - self.h.beta2**self.k)
        for i, (g, rate, decay) in enumerate(zip(gradients, RATES, DECAYS, strict=True)):
            g, x = g.astype(np.float64).ravel(), self.x[i].ravel()
            m = h.beta1 * self.m[i] + (1 - h.beta1) * g
            root = np.sqrt(h.beta2 * self.root[i] ** 2 + (1 - h.beta2) * g**2)
            change = (m / c1) / (root / c2**0.5 + h.epsilon) + h.weight_decay * decay * x
            self.x[i] = (x - learning_rate * rate * change).reshape(self.x[i].shape)
            self.m[i], self.root[i] = stored(m, dynamic_levels(True)), stored(root, dynamic_levels(False))


def stored(numbers, levels):
    blocks = np.pad(numbers, (0, -len(numbers) % BLOCK)).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / np.maximum(largest, 1e-37)[..., None] - levels).argmin(-1)
    return (levels.astype(np.float64)[nearest] * largest).ravel()[: len(numbers)]


def test_8bit_adamw_is_adamw_whose_moments_are_stored_in_levels():
    hyperparameters = Hyperparameters(weight_decay=0.3, epsilon=1e-6)
    ours = Ours(lambda parameters: AdamW8bit(parameters, hyperparameters, RATES, DECAYS))
    reference = Adamw8bitReference(start_values(), hyperparameters)
    for number in range(STEPS):
        ours.step(number)
        reference.step(gradients_at(number), rate_at(number))
    for mine, expected, start in zip(ours.parameters, reference.x, start_values(), strict=True):
        # Float32; where a number is half-way between two levels, rounding may choose the other.
        assert np.abs(mine.asnumpy() - expected).max() < 2e-2 * np.abs(expected - start).max(), mine.name


def test_the_state_of_8bit_adamw_is_a_quarter():
    """Of matrices as a rank-4 LoRA of SD 1.5 has them."""
    shapes = [(4, 320), (320, 4), (4, 768), (1280, 4), (4, 1280)]
    parameters = [Parameter(Tensor(np.zeros(shape, np.float32)), name=f"p{i}") for i, shape in enumerate(shapes)]
    sizes = [
        sum(state.asnumpy().nbytes for state in kind(parameters, Hyperparameters()).moments())
        for kind in (AdamW8bit, AdamW)
    ]
    assert sizes[0] <= 0.27 * sizes[1]


def test_neighbours_of_one_kind_are_joined_up_to_a_length():
    parameters = [SimpleNamespace(size=size) for size in (100, 200, 300, 900, 50, 50)]
    kinds = ["unet"] * 5 + ["text"]
    assert group_by_length(parameters, kinds) == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]


def test_a_mistake_would_show():
    """In the references: of a decay, a rate or a bias correction."""
    expected, other = (
        ProdigyReference(start_values(), h) for h in (Hyperparameters(), Hyperparameters(decouple=False))
    )
    wrong_decay = Adamw8bitReference(start_values(), Hyperparameters(weight_decay=0.3))
    right_decay = Adamw8bitReference(start_values(), replace(Hyperparameters(), weight_decay=0.0))
    for number in range(STEPS):
        for one in (expected, other, wrong_decay, right_decay):
            one.step(gradients_at(number), rate_at(number))
    for one, two in ((expected, other), (wrong_decay, right_decay)):
        moved = np.abs(one.x[0] - start_values()[0]).max()
        assert np.abs(one.x[0] - two.x[0]).max() > 2e-2 * moved

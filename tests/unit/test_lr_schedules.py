"""The learning rate follows diffusers' published schedules, step by step."""

import itertools

import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.train import OptimiserConfig, TrainConfig
from dreambooth_ms.training.optimisers import learning_rate_factor


def factor_at(kind, step, warmup_steps, total_steps, num_cycles, power, base_learning_rate):
    config = OptimiserConfig(lr_scheduler=kind, lr_warmup_steps=warmup_steps, lr_num_cycles=num_cycles, lr_power=power)
    return learning_rate_factor(config, step, total_steps, base_learning_rate)


KINDS = schema_fields(TrainConfig)["lr_scheduler"].kind
LENGTHS = [(0, 10), (1, 10), (4, 10), (9, 10), (12, 10), (0, 1), (500, 37)]


def published(kind, warmup_steps, total_steps, num_cycles, power, base_learning_rate):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_learning_rate)
    (factor,) = get_scheduler(
        kind,
        optimiser,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        num_cycles=num_cycles,
        power=power,
    ).lr_lambdas
    return factor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup_steps", "total_steps"), LENGTHS)
def test_factors_are_the_published_ones(kind, warmup_steps, total_steps):
    for num_cycles, power, rate in itertools.product((1, 2, 3), (0.5, 1.0, 2.0), (5e-4, 2e-7)):
        expected = published(kind, warmup_steps, total_steps, num_cycles, power, rate)
        for step in range(total_steps + 3):
            ours = factor_at(kind, step, warmup_steps, total_steps, num_cycles, power, rate)
            assert ours == pytest.approx(expected(step), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"constant"}))
def test_the_warm_up_rises_in_equal_steps_from_zero(kind):
    assert [factor_at(kind, step, 4, 10, 1, 1.0, 1e-4) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_the_constant_schedule_has_no_warm_up():
    assert [factor_at("constant", step, 4, 10, 1, 1.0, 1e-4) for step in (0, 3, 10)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "end"), [("linear", 0.0), ("cosine", 0.0), ("cosine_with_restarts", 0.0), ("polynomial", 1e-3)]
)
def test_decaying_schedules_end_where_they_should(kind, end):
    assert factor_at(kind, 10, 4, 10, 1, 1.0, 1e-4) == pytest.approx(end)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_all_warm_up_still_has_a_factor_at_its_end(kind):
    """diffusers' polynomial divides by zero here."""
    assert 0.0 <= factor_at(kind, 10, 10, 10, 1, 1.0, 1e-4) <= 1.0


LENGTH = st.integers(1, 2000)
RATE = st.floats(1.1e-7, 1e3)
FALLING = ("linear", "cosine", "polynomial")


@given(
    kind=st.sampled_from(KINDS),
    warmup_steps=st.integers(0, 3000),
    total_steps=LENGTH,
    step=st.integers(0, 2000),
    num_cycles=st.integers(1, 9),
    power=st.floats(0.1, 9),
    rate=RATE,
)
def test_the_rate_is_never_negative_nor_above_the_given_one(
    kind, warmup_steps, total_steps, step, num_cycles, power, rate
):
    factor = factor_at(kind, min(step, total_steps), warmup_steps, total_steps, num_cycles, power, rate)
    assert 0.0 <= factor <= 1.0 + 1e-12


@given(st.sampled_from(sorted(set(KINDS) - {"constant"})), LENGTH, st.data())
def test_the_rate_is_whole_when_the_warm_up_ends_and_rises_before(kind, warmup_steps, data):
    step = data.draw(st.integers(0, warmup_steps - 1))
    before, after, end = (
        factor_at(kind, at, warmup_steps, warmup_steps + 10, 1, 1.0, 1e-4) for at in (step, step + 1, warmup_steps)
    )
    assert before < after <= end == pytest.approx(1.0)


@given(st.sampled_from(FALLING), LENGTH, st.integers(0, 100), st.floats(0.1, 9), RATE, st.data())
def test_the_rate_never_rises_again_after_the_warm_up(kind, length, warmup_steps, power, rate, data):
    total = warmup_steps + length
    step = data.draw(st.integers(warmup_steps, total - 1))
    now, then = (factor_at(kind, at, warmup_steps, total, 1, power, rate) for at in (step, step + 1))
    assert then <= now + 1e-12


@given(st.integers(1, 9), st.integers(1, 50), st.integers(0, 100))
def test_every_restart_begins_at_the_whole_rate(num_cycles, length, warmup_steps):
    total = warmup_steps + num_cycles * length
    for cycle in range(num_cycles):
        factor = factor_at(
            "cosine_with_restarts", warmup_steps + cycle * length, warmup_steps, total, num_cycles, 1.0, 1e-4
        )
        # A quotient such as 3 / 7 * 7 may fall short of its cycle by a rounding, and then is the end of the one before.
        assert min(abs(factor - 1), abs(factor)) < 1e-9

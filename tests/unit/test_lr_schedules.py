"""The learning rate follows diffusers' published schedules, step by step."""

import itertools

import pytest
import torch
from diffusers.optimization import get_scheduler

from dreambooth_ms.config.describe import schema_fields
from dreambooth_ms.config.schema import TrainConfig
from dreambooth_ms.training.lr_schedules import learning_rate_factor

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
            ours = learning_rate_factor(kind, step, warmup_steps, total_steps, num_cycles, power, rate)
            assert ours == pytest.approx(expected(step), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"constant"}))
def test_the_warm_up_rises_in_equal_steps_from_zero(kind):
    assert [learning_rate_factor(kind, step, 4, 10, 1, 1.0, 1e-4) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_the_constant_schedule_has_no_warm_up():
    assert [learning_rate_factor("constant", step, 4, 10, 1, 1.0, 1e-4) for step in (0, 3, 10)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "end"), [("linear", 0.0), ("cosine", 0.0), ("cosine_with_restarts", 0.0), ("polynomial", 1e-3)]
)
def test_decaying_schedules_end_where_they_should(kind, end):
    assert learning_rate_factor(kind, 10, 4, 10, 1, 1.0, 1e-4) == pytest.approx(end)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_all_warm_up_still_has_a_factor_at_its_end(kind):
    """diffusers' polynomial divides by zero here."""
    assert 0.0 <= learning_rate_factor(kind, 10, 10, 10, 1, 1.0, 1e-4) <= 1.0


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="piecewise"):
        learning_rate_factor("piecewise", 0, 0, 1, 1, 1.0, 1e-4)

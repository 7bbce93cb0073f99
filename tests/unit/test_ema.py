"""The running average is diffusers' EMAModel, and it can stand in for the weights for a while."""

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from mindspore import Parameter, Tensor

from dreambooth_ms.training.step import MovingAverage, decay_at
from tests.parity.reference import normal, relative_error

SHAPES = {"down": (4, 6), "bias": (5,), "kernel": (3, 2, 2)}
STEPS = 25


def values_at(step):
    return {name: normal(*shape, seed=step) for name, shape in SHAPES.items()}


def parameters():
    return [Parameter(Tensor(value), name=name) for name, value in values_at(0).items()]


def put(parameters, values):
    for parameter in parameters:
        parameter.set_data(Tensor(values[parameter.name]))


@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.5])
def test_it_is_diffusers_average_after_every_step(decay):
    ours, reference = parameters(), [torch.nn.Parameter(torch.tensor(value)) for value in values_at(0).values()]
    average, expected = MovingAverage(ours, decay), EMAModel(reference, decay=decay)
    for step in range(1, STEPS + 1):
        values = values_at(step)
        put(ours, values)
        with torch.no_grad():
            for parameter, value in zip(reference, values.values(), strict=True):
                parameter.copy_(torch.tensor(value))
        average.update(step)
        expected.step(reference)
        assert decay_at(step, decay) == expected.get_decay(step)
        for one, shadow in zip(average.averages, expected.shadow_params, strict=True):
            assert relative_error(one, shadow) < 1e-6  # two roundings of float32 a step
    assert relative_error(average.averages[0], ours[0]) > 0.1
    assert len(average.compile_cache) == 1


def test_the_first_update_takes_the_weights_and_later_ones_hold_on_longer():
    assert [decay_at(step, 0.9) for step in (1, 2, 3)] == [0.0, 2 / 11, 3 / 12]
    assert decay_at(1000, 0.9) == 0.9
    assert decay_at(1000, 0.9999) == 1000 / 1009


class TestInPlaceOfTheWeights:
    @pytest.fixture
    def averaged(self):
        """Parameters, whose average is of two steps."""
        ours = parameters()
        average = MovingAverage(ours, 0.9)
        for step in (1, 2):
            put(ours, values_at(step))
            average.update(step)
        return ours, average

    def test_the_averages_stand_in_and_the_weights_come_back_to_the_bit(self, averaged):
        ours, average = averaged
        before = [parameter.asnumpy().tobytes() for parameter in ours]
        held = [one.asnumpy().copy() for one in average.averages]
        with average.in_place_of_weights():
            assert all(np.array_equal(p.asnumpy(), value) for p, value in zip(ours, held, strict=True))
        assert [parameter.asnumpy().tobytes() for parameter in ours] == before
        assert all(np.array_equal(one.asnumpy(), value) for one, value in zip(average.averages, held, strict=True))
        assert not any(np.array_equal(p.asnumpy(), value) for p, value in zip(ours, held, strict=True))

    def test_an_error_inside_loses_nothing(self, averaged):
        ours, average = averaged
        before = [parameter.asnumpy().tobytes() for parameter in ours]
        with pytest.raises(ValueError, match="disk full"), average.in_place_of_weights():
            raise ValueError("disk full")
        assert [parameter.asnumpy().tobytes() for parameter in ours] == before

    def test_training_goes_on_from_the_weights(self, averaged):
        """An update after the visit blends what there was before it."""
        ours, average = averaged
        put(ours, values_at(3))
        held = [one.asnumpy().copy() for one in average.averages]
        with average.in_place_of_weights():
            pass
        average.update(3)
        for one, value, weight in zip(average.averages, held, values_at(3).values(), strict=True):
            assert relative_error(one, 0.25 * value + 0.75 * weight) < 1e-6  # roundings of float32


def test_a_name_of_its_own_keeps_an_average_apart_in_a_checkpoint():
    average = MovingAverage(parameters(), 0.9)
    assert [one.name for one in average.averages] == [f"average.{name}" for name in SHAPES]
    assert not any(one.requires_grad for one in average.averages)

"""The optimiser and the clip are torch's, step by step, and nothing is compiled twice."""

import gc

import numpy as np
import pytest
import torch
from mindspore import Parameter, Tensor, nn

from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
from dreambooth_ms.training.step import ClipByGlobalNorm, TrainStep
from tests.parity.reference import normal, relative_error

SHAPES = {"down": (4, 6), "bias": (5,), "up": (3, 2, 2)}
STEPS = 20
LEARNING_RATES = [1e-2 * (step + 1) / 5 if step < 5 else 1e-2 * (STEPS - step) / 15 for step in range(STEPS)]

# Both are float32 and round some ten times a step, by 6e-8 of values of size 1; measured 2e-7.
PARAMETERS = 1e-6
# Sums of up to twenty roundings in another order; measured 3e-7.
FIRST_MOMENTS = 2e-6
# The kernel computes 1 - beta2 in float32, which at 0.999 is off by 1.3e-5 of itself.
SECOND_MOMENTS = 2e-5


@pytest.fixture(autouse=True)
def no_dead_cells():
    """A cell that is collected makes the living ones with the same inputs compile once more; so collect them before."""
    gc.collect()


def start_values():
    return {name: normal(*shape) for name, shape in SHAPES.items()}


def gradients_at(step):
    """Gradients of very unlike sizes; one is zero at first, where only epsilon keeps the update finite."""
    sizes = {"down": 1.0, "bias": 1e-4, "up": 0.0 if step < 3 else 1e-7}
    return {name: sizes[name] * normal(*shape, seed=100 + step) for name, shape in SHAPES.items()}


def torch_adamw(hyperparameters):
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start_values().items()}
    optimiser = torch.optim.AdamW(
        parameters.values(),
        betas=(hyperparameters.beta1, hyperparameters.beta2),
        eps=hyperparameters.epsilon,
        weight_decay=hyperparameters.weight_decay,
        foreach=False,
    )
    return parameters, optimiser


class Update(nn.Cell):
    """The optimiser as the training step calls it, from inside a compiled cell."""

    def __init__(self, adamw):
        super().__init__(auto_prefix=False)
        self.adamw = adamw

    def construct(self, *gradients):
        return self.adamw(gradients, None)


@pytest.mark.parametrize(
    "hyperparameters",
    [Hyperparameters(), Hyperparameters(beta1=0.8, beta2=0.95, weight_decay=0.3, epsilon=1e-6)],
    ids=["defaults", "others"],
)
def test_twenty_steps_of_a_changing_learning_rate_are_torchs(hyperparameters):
    parameters, reference = torch_adamw(hyperparameters)
    ours = {name: Parameter(Tensor(value), name=name) for name, value in start_values().items()}
    adamw = AdamW(list(ours.values()), hyperparameters)
    update = Update(adamw)
    for step, learning_rate in enumerate(LEARNING_RATES):
        gradients = gradients_at(step)
        reference.param_groups[0]["lr"] = learning_rate
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        reference.step()
        adamw.prepare(step + 1, learning_rate)
        update(*map(Tensor, gradients.values()))

        for index, (name, parameter) in enumerate(parameters.items()):
            state = reference.state[parameter]
            assert relative_error(ours[name], parameter) < PARAMETERS, (step, name)
            for moment, expected, tolerance in (
                (adamw.first_moments[index], state["exp_avg"].numpy(), FIRST_MOMENTS),
                (adamw.second_moments[index], state["exp_avg_sq"].numpy(), SECOND_MOMENTS),
            ):
                assert np.abs(moment.asnumpy() - expected).max() <= tolerance * np.abs(expected).max(), (step, name)
    assert len(update.compile_cache) == 1


def test_weight_decay_alone_shrinks_a_parameter_by_the_learning_rate():
    """Decoupled: without gradients, by learning rate times decay exactly, whatever the moments' correction."""
    parameter = Parameter(Tensor(np.ones(3, np.float32)), name="weight")
    adamw = AdamW([parameter], Hyperparameters(weight_decay=0.1))
    update = Update(adamw)
    for step in (1, 2):
        adamw.prepare(step, 0.5)
        update(Tensor(np.zeros(3, np.float32)))
    assert parameter.asnumpy() == pytest.approx(0.95**2, rel=1e-6)  # float32 rounding


class Clip(nn.Cell):
    def __init__(self, max_norm):
        super().__init__()
        self.clip = ClipByGlobalNorm(list(SHAPES.values()), max_norm)

    def construct(self, *gradients):
        return self.clip(gradients)


@pytest.mark.parametrize("max_norm", [0.5, 1e3], ids=["above the limit", "below the limit"])
def test_the_clip_is_torchs(max_norm):
    gradients = [normal(*shape) for shape in SHAPES.values()]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    expected_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=False)

    clipped, norm = Clip(max_norm)(*map(Tensor, gradients))
    assert relative_error(norm, expected_norm) < 1e-6  # rounding of some forty squares
    for ours, parameter in zip(clipped, parameters, strict=True):
        assert relative_error(ours, parameter.grad) < 1e-6


class SquareLoss(nn.Cell):
    """sum of (w x - y)^2 over the rows, and the error of each row."""

    def __init__(self, weight):
        super().__init__(auto_prefix=False)
        self.weight = weight

    def construct(self, x, y):
        errors = (x * self.weight.broadcast_to(x.shape) - y) ** 2
        return errors.sum(), errors.sum(1)


def test_a_training_step_is_torchs_and_is_compiled_once():
    """Five steps with the clip in force, each with its own learning rate."""
    weight = Parameter(Tensor(normal(4)), name="weight")
    adamw = AdamW([weight], Hyperparameters())
    step_cell = TrainStep(SquareLoss(weight), [weight], adamw, max_grad_norm=1.0)
    reference = torch.nn.Parameter(torch.tensor(normal(4)))
    optimiser = torch.optim.AdamW([reference], foreach=False)
    for step in range(5):
        x, y, learning_rate = normal(3, 4, seed=step), normal(3, 4, seed=50 + step), LEARNING_RATES[step]
        expected = ((torch.tensor(x) * reference - torch.tensor(y)) ** 2).sum(1)
        optimiser.zero_grad()
        expected.sum().backward()
        norm = torch.nn.utils.clip_grad_norm_([reference], 1.0)
        optimiser.param_groups[0]["lr"] = learning_rate
        optimiser.step()

        adamw.prepare(step + 1, learning_rate)
        loss, errors, our_norm = step_cell(Tensor(x), Tensor(y))
        assert norm > 1
        # Float32 sums of twelve terms.
        assert relative_error(loss, expected.sum()) < 1e-6
        assert relative_error(errors, expected) < 1e-6
        assert relative_error(our_norm, norm) < 1e-6
        assert relative_error(weight, reference) < PARAMETERS
    assert len(step_cell.compile_cache) == 1


def test_compilations_are_counted_by_the_cache():
    """The count above would rise: a new shape is compiled anew."""
    clip = Clip(1.0)
    for rows in (2, 3):
        clip(*(Tensor(normal(rows)) for _ in SHAPES))
    assert len(clip.compile_cache) == 2

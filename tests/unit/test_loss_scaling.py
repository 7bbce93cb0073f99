"""Scaled losses train as unscaled ones, and a step that overflows is skipped as PyTorch's GradScaler skips it."""

import gc
from itertools import pairwise

import numpy as np
import pytest
import torch
from mindspore import Parameter, Tensor, nn

from dreambooth_ms.config.train import LossScalingConfig
from dreambooth_ms.errors import DataError
from dreambooth_ms.training.checkpoint import open_checkpoint, restore, save_checkpoint
from dreambooth_ms.training.loop import OVERFLOWS, StepReport, check_finite, train
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
from dreambooth_ms.training.step import AccumulatingTrainStep, LossScaler, TrainStep
from tests.parity.reference import normal, relative_error
from tests.unit.test_optimisers import SquareLoss

STEPS = 12
OVERFLOWING = {0: np.inf, 3: np.nan, 4: -np.inf, 10: np.inf}
"""Step -> what is in one of its rows."""
START, WINDOW = 1024.0, 2
SCALING = LossScalingConfig(init_loss_scale=START, loss_scale_factor=4.0, scale_window=WINDOW)


@pytest.fixture(autouse=True)
def no_dead_cells():
    """A cell that is collected makes the living ones with the same inputs compile once more; so collect them before."""
    gc.collect()


class Rows:
    """A batch of the square loss, as the loop takes it."""

    concepts = ("instance",) * 2

    def __init__(self, x, y):
        self.x, self.y = x, y

    def tensors(self):
        return Tensor(self.x), Tensor(self.y)


def batch(number, batches_per_step, overflowing):
    step, part = divmod(number, batches_per_step)
    x, y = normal(2, 4, seed=number), normal(2, 4, seed=50 + number)
    if part == 0 and step in overflowing:
        x[1, 2] = overflowing[step]
    return Rows(x, y)


def rate_at(update):
    return 0.1 / (1 + update)


class Ours:
    """A weight that is trained, from its start."""

    def __init__(self, scaling, batches_per_step=1, sum_gradients=None):
        self.weight = Parameter(Tensor(normal(4)), name="weight")
        self.adamw = AdamW([self.weight], Hyperparameters())
        self.scaler = LossScaler(scaling) if scaling else None
        self.batches_per_step = batches_per_step
        step = TrainStep(SquareLoss(self.weight), [self.weight], self.adamw, 1.0, sum_gradients, self.scaler)
        self.step = step if batches_per_step == 1 else AccumulatingTrainStep(step)

    def run(self, done, stop, overflowing=OVERFLOWING, hook=lambda report: None):
        count, reports = self.batches_per_step, []
        make_batch = lambda number: batch(number, count, overflowing)  # noqa: E731
        train(self.step, make_batch, count, rate_at, range(done, stop), [reports.append, hook])
        return reports

    def state(self):
        return [self.weight, *self.adamw.moments(), *(self.scaler.state() if self.scaler else [])]

    def bits(self):
        return {parameter.name: parameter.asnumpy().tobytes() for parameter in self.state()}


class Theirs:
    """The same with torch's GradScaler; schedules count the steps that it lets through."""

    def __init__(self, batches_per_step):
        self.weight = torch.nn.Parameter(torch.tensor(normal(4)))
        self.optimiser = torch.optim.AdamW([self.weight], foreach=False)
        self.scaler = torch.amp.GradScaler("cpu", START, 4.0, 0.25, WINDOW)
        self.batches_per_step, self.updates = batches_per_step, 0

    def take(self, step):
        self.optimiser.zero_grad()
        for part in range(self.batches_per_step):
            rows = batch(step * self.batches_per_step + part, self.batches_per_step, OVERFLOWING)
            loss = ((torch.tensor(rows.x) * self.weight - torch.tensor(rows.y)) ** 2).sum()
            self.scaler.scale(loss).backward()
        self.optimiser.param_groups[0]["lr"] = rate_at(self.updates)
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_([self.weight], 1.0)
        self.scaler.step(self.optimiser)
        before = self.scaler.get_scale()
        self.scaler.update()
        self.updates += self.scaler.get_scale() >= before


@pytest.mark.parametrize("batches_per_step", [1, 2], ids=["one batch", "accumulated"])
def test_steps_that_overflow_are_skipped_as_torchs_grad_scaler_skips_them(batches_per_step):
    ours, theirs = Ours(SCALING, batches_per_step), Theirs(batches_per_step)
    states, scales = [ours.bits()], []

    def compare(report):
        assert report.loss_scale == theirs.scaler.get_scale()
        theirs.take(report.step - 1)
        assert report.is_skipped == (report.step - 1 in OVERFLOWING)
        assert report.updates == theirs.updates
        # Float32 roundings of twelve terms; see test_optimisers.
        assert relative_error(ours.weight, theirs.weight) < 1e-6
        before, after = states[-1], ours.bits()
        unchanged = {name for name in after if after[name] == before[name]}
        assert ({"weight", *(moment.name for moment in ours.adamw.moments())} <= unchanged) == report.is_skipped
        states.append(after)
        scales.append(report.loss_scale)

    ours.run(0, STEPS, hook=compare)
    assert len(scales) == STEPS
    assert (ours.scaler.skipped_steps, ours.scaler.value) == (len(OVERFLOWING), theirs.scaler.get_scale())
    assert {later / earlier for earlier, later in pairwise(scales)} == {0.25, 1, 4}


@pytest.mark.parametrize("batches_per_step", [1, 2], ids=["one batch", "accumulated"])
def test_a_static_scale_is_taken_out_exactly_once(batches_per_step):
    """A power of two rounds nothing, so that weights, moments and norms are those of the unscaled loss to the bit."""
    static = LossScalingConfig(loss_scaler_type="static", init_loss_scale=4096.0, scale_window=1)
    scaled, plain = (Ours(scaling, batches_per_step) for scaling in (static, None))
    for one, two in zip(scaled.run(0, 5, {}), plain.run(0, 5, {}), strict=True):
        assert (one.loss, one.grad_norm, one.loss_scale, two.loss_scale) == (two.loss, two.grad_norm, 4096.0, None)
        assert one.grad_norm > 1
    assert plain.bits().items() <= scaled.bits().items()


class WithAnother(nn.Cell):
    """The sum with another process's gradients, which are NaN."""

    def construct(self, gradients):
        return (gradients[0] + np.inf,)


def test_a_step_is_skipped_if_another_process_overflows():
    """Whether it is skipped is decided of the sum over processes, or they would go on with different weights."""
    ours = Ours(SCALING, sum_gradients=WithAnother())
    before = ours.bits()["weight"]
    assert [report.is_skipped for report in ours.run(0, 2, {})] == [True, True]
    assert ours.bits()["weight"] == before


def test_a_resumed_run_has_the_scale_and_the_counts_it_was_left_with(tmp_path):
    whole = Ours(SCALING)
    reports = list(whole.run(0, 5))
    path = save_checkpoint(tmp_path, 5, whole.state(), "", lambda folder, step: None)
    reports += whole.run(5, STEPS)
    after = whole.bits()
    resumed = whole
    for parameter in resumed.state():
        parameter.set_data(Tensor(parameter.asnumpy() * 0))
    restore(open_checkpoint(path), resumed.state())
    assert list(map(repr, resumed.run(5, STEPS))) == list(map(repr, reports[5:]))
    assert resumed.bits() == after


def test_a_run_that_overflows_at_any_scale_ends_with_a_message():
    with pytest.raises(
        DataError, match=f"step {OVERFLOWS}: {OVERFLOWS} steps in a row were skipped.*mixed_precision no"
    ):
        list(Ours(SCALING).run(0, 2 * OVERFLOWS, dict.fromkeys(range(2 * OVERFLOWS), np.inf)))


def test_a_loss_that_is_no_number_ends_a_run_in_float32():
    with pytest.raises(DataError, match="step 4: the loss is nan; resume from a checkpoint with a lower"):
        list(Ours(None).run(0, STEPS, {3: np.nan}))


@pytest.mark.parametrize(
    ("step", "skipped", "loss", "scale", "said"),
    [
        (
            1,
            0,
            np.nan,
            None,
            "the loss is nan, before anything was learned: it comes from the base.*; take another base",
        ),
        (
            30,
            30,
            np.inf,
            2.0,
            "before anything was learned.*; start anew with --mixed_precision no or take another base",
        ),
        (2, 0, np.nan, None, "step 2: the loss is nan; resume from a checkpoint with a lower --learning_rate$"),
        (40, 30, np.inf, 2.0, "; resume from a checkpoint with a lower --learning_rate, or start anew with"),
    ],
)
def test_what_the_base_computes_is_not_laid_to_the_learning_rate(step, skipped, loss, scale, said):
    is_skipped = skipped > 0
    report = StepReport(step, loss, {}, 1.0, 1e-4, is_skipped=is_skipped, skipped_steps=skipped, loss_scale=scale)
    with pytest.raises(DataError, match=said):
        check_finite(report, OVERFLOWS if is_skipped else 0)

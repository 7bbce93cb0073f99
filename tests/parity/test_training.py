"""Training is what a plain loop in torch does on the same draws: loss, gradients, and LoRA weights after five steps.

The loop is diffusers' UNet with peft's LoRA, torch's AdamW and clip, and the loss written out group by group.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from mindspore import Tensor
from peft import LoraConfig

from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Record
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, NoiseScheduleSpec
from dreambooth_ms.training.loop import train
from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters
from dreambooth_ms.training.step import DiffusionLoss, TrainStep
from dreambooth_ms.weights.model_folder import open_model_folder
from tests.parity.reference import normal, relative_error
from tests.tiny_model import write_random_model

RANK, ALPHA, TARGETS = 4, 6.0, ["to_q", "to_k", "to_v", "to_out.0"]
# Latents are not square, so that no axis passes for another.
LATENTS, TEXT, SCALING_FACTOR = (4, 8, 12), (7, 24), 0.5
STEPS, LEARNING_RATE, MAX_GRAD_NORM, PRIOR_LOSS_WEIGHT = 5, 1e-3, 0.02, 0.7
HYPERPARAMETERS = AdamWHyperparameters()

# Float32 sums in another order, through the network's thirty layers: measured 1.3e-7.
LOSS = 1e-5
# The same forward and backward, relative to the largest gradient of the matrix: measured 1.2e-5.
GRADIENT = 1e-4
# Adam divides a gradient by its own size, so where it is mostly rounding, so is a whole step. All weights together,
# relative to the way they have gone: measured 1e-4. One weight, as a part of the longest way: measured 4e-3.
ALL_WEIGHTS = 5e-4
ONE_WEIGHT = 2e-2 * LEARNING_RATE * STEPS


@dataclass(frozen=True)
class Case:
    """Pictures of the subject per step, whether as many of the class come with them, and what is predicted."""

    batch_size: int
    prior: bool
    kind: str = "epsilon"

    def __str__(self):
        return f"{self.batch_size}{'+' + str(self.batch_size) if self.prior else ''} rows, {self.kind}"


# Every number of rows is compiled once: 1, 2 (in two of the cases), 3 and 6, and 4 for the velocity.
CASES = [Case(1, False), Case(2, False), Case(1, True), Case(3, False), Case(3, True), Case(2, True, "v_prediction")]


def records(group, count):
    return tuple(
        Record(Path(f"{group}-{i}.png"), f"{group} {i}", (32, 32), f"{group} prompt {i}", group) for i in range(count)
    )


def plan_of(batch_size, prior):
    """Five pictures of the subject and two of the class, each with a prompt of its own."""
    groups = (records(INSTANCE, 5), records(CLASS, 2))
    return Plan(groups if prior else groups[:1], batch_size, Framing(32, True, False), seed=5)


def batches_of(plan, schedule, posterior, embedding):
    """Batches from a posterior and an embedding for each record."""
    known = [record for group in plan.groups for record in group]
    return BatchMaker(
        plan=plan,
        posteriors={view: posterior(known.index(view.record)) for view in plan.views(0, 60)},
        embeddings={record.prompt: embedding(i) for i, record in enumerate(known)},
        schedule=schedule,
        scaling_factor=SCALING_FACTOR,
        group_weights={INSTANCE: 1.0, CLASS: PRIOR_LOSS_WEIGHT},
    )


class Training:
    """Our UNet of a model folder with its compiled step; every run starts anew."""

    def __init__(self, path):
        folder = open_model_folder(path)
        self.path = path
        self.unet = folder.load_unet()
        self.schedule = NoiseSchedule.from_spec(folder.schedule_spec)
        self.trainables = lora_trainables(inject_lora(self.unet, RANK, ALPHA, TARGETS))
        self.optimiser = AdamW(self.trainables, HYPERPARAMETERS)
        loss = DiffusionLoss(self.unet, folder.schedule_spec.prediction_type)
        self.step_cell = TrainStep(loss, self.trainables, self.optimiser, MAX_GRAD_NORM)
        # Both factors away from zero, so that both have gradients.
        self.start = {p.name: 0.2 * normal(*p.shape, seed=i) for i, p in enumerate(self.trainables)}

    def run(self, batches):
        for parameter in self.trainables:
            parameter.set_data(Tensor(self.start[parameter.name]))
        for moment in self.optimiser.moments():
            moment.set_data(Tensor(np.zeros(moment.shape, np.float32)))
        base = self.base()
        steps = train(self.step_cell, batches, lambda step: LEARNING_RATE, 0, STEPS)
        reports = [next(steps)]
        gradients = self.first_gradients()
        reports += steps
        weights = {parameter.name: parameter.asnumpy().copy() for parameter in self.trainables}
        return SimpleNamespace(
            reports=reports, gradients=gradients, weights=weights, base_before=base, base_after=self.base()
        )

    def first_gradients(self):
        """The clipped gradients of the first step: (1 - beta1) times them are its first moments."""
        named = zip(self.trainables, self.optimiser.first_moments, strict=True)
        return {parameter.name: moment.asnumpy() / (1 - HYPERPARAMETERS.beta1) for parameter, moment in named}

    def base(self):
        """The bits of everything that is not trained."""
        trained = {parameter.name for parameter in self.trainables}
        return {p.name: p.asnumpy().tobytes() for p in self.unet.get_parameters() if p.name not in trained}


def run_reference(path, start, batches, case):
    """The same five steps in torch."""
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False))
    scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    trained = {name.replace(".default.", "."): p for name, p in unet.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.tensor(start[name]))
    optimiser = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=HYPERPARAMETERS.weight_decay)
    reports, gradients = [], None
    for step in range(STEPS):
        batch = batches(step)
        latents, noise, text = map(torch.tensor, (batch.latents, batch.noise, batch.text))
        timesteps = torch.tensor(batch.timesteps).long()
        prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        target = noise if case.kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        size = case.batch_size
        losses = {INSTANCE: torch.nn.functional.mse_loss(prediction[:size], target[:size])}
        loss = losses[INSTANCE]
        if case.prior:
            losses[CLASS] = torch.nn.functional.mse_loss(prediction[size:], target[size:])
            loss = loss + PRIOR_LOSS_WEIGHT * losses[CLASS]
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        gradients = gradients or {name: parameter.grad.numpy().copy() for name, parameter in trained.items()}
        optimiser.step()
        groups = {group: value.item() for group, value in losses.items()}
        reports.append(SimpleNamespace(loss=loss.item(), group_losses=groups, grad_norm=norm.item()))
    weights = {name: parameter.detach().numpy() for name, parameter in trained.items()}
    return SimpleNamespace(reports=reports, gradients=gradients, weights=weights)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """A training for each prediction type."""
    return {
        kind: Training(write_random_model(tmp_path_factory.mktemp(kind), prediction_type=kind, sd2=sd2))
        for kind, sd2 in (("epsilon", False), ("v_prediction", True))
    }


@pytest.fixture(scope="module", params=CASES, ids=str)
def compared(request, trainings):
    case = request.param
    training = trainings[case.kind]
    batches = batches_of(
        plan_of(case.batch_size, case.prior),
        training.schedule,
        posterior=lambda i: normal(2, *LATENTS, seed=i),
        embedding=lambda i: normal(*TEXT, seed=20 + i),
    )
    compiled_before = len(training.step_cell.compile_cache)
    ours = training.run(batches)
    return SimpleNamespace(
        case=case,
        training=training,
        compiled=len(training.step_cell.compile_cache) - compiled_before,
        ours=ours,
        reference=run_reference(training.path, training.start, batches, case),
    )


def pairs(compared):
    return zip(compared.ours.reports, compared.reference.reports, strict=True)


def test_the_loss_of_every_step_is_torchs(compared):
    for ours, reference in pairs(compared):
        assert ours.loss == pytest.approx(reference.loss, rel=LOSS)
        assert ours.group_losses == pytest.approx(reference.group_losses, rel=LOSS)
    print(f"loss {max(abs(ours.loss / reference.loss - 1) for ours, reference in pairs(compared)):.1e}")


def test_the_gradients_of_both_factors_are_torchs(compared):
    """After the clip, which is in force in every step."""
    expected = compared.reference.gradients
    worst = max(relative_error(ours, expected[name]) for name, ours in compared.ours.gradients.items())
    print(f"gradients {worst:.1e}")
    assert worst < GRADIENT
    for ours, reference in pairs(compared):
        assert reference.grad_norm > MAX_GRAD_NORM
        assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=LOSS)


def test_the_weights_after_five_steps_are_torchs(compared):
    ours, reference, start = (
        np.concatenate([weights[name].ravel() for name in compared.training.start]).astype(np.float64)
        for weights in (compared.ours.weights, compared.reference.weights, compared.training.start)
    )
    together = np.linalg.norm(ours - reference) / np.linalg.norm(reference - start)
    one = np.abs(ours - reference).max()
    print(f"weights together {together:.1e}, one {one:.1e}")
    assert together < ALL_WEIGHTS
    assert one < ONE_WEIGHT


def test_training_leaves_every_bit_of_the_base_as_it_was(compared):
    assert len(compared.ours.base_before) > 100
    assert compared.ours.base_after == compared.ours.base_before


def test_five_steps_of_one_shape_are_compiled_once(compared):
    assert compared.compiled <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_row_keeps_its_own_picture_prompt_noise_level_and_weight(batch_size):
    """Pictures and prompts are their own numbers here, so that each row says what it is made of."""
    plan = plan_of(batch_size, prior=True)
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec())
    make_batch = batches_of(
        plan,
        schedule,
        # A log-variance of -60 leaves the mean as it is.
        posterior=lambda i: np.stack([np.full(LATENTS, i, np.float32), np.full(LATENTS, -60, np.float32)]),
        embedding=lambda i: np.full(TEXT, 100 + i, np.float32),
    )
    known = [record for group in plan.groups for record in group]
    used, noise = set(), []
    for step in range(10):
        batch = make_batch(step)
        assert batch.groups == (INSTANCE,) * batch_size + (CLASS,) * batch_size
        assert len({len(field) for field in vars(batch).values()}) == 1
        for row, view in enumerate(plan.rows(step)):
            number = known.index(view.record)
            assert (np.abs(batch.latents[row] - number * SCALING_FACTOR) < 1e-6).all()
            assert (batch.text[row] == 100 + number).all()
            assert batch.groups[row] == view.record.group
            assert batch.coefficients[row] == np.float32((1.0 if number < 5 else PRIOR_LOSS_WEIGHT) / batch_size)
            alpha = schedule.alphas_cumprod[batch.timesteps[row]]
            assert (batch.signal[row] ** 2, batch.sigma[row] ** 2) == pytest.approx((alpha, 1 - alpha), rel=1e-5)
            used.add(number)
            noise.append(batch.noise[row].tobytes())
    assert used == set(range(7))
    assert len(set(noise)) == len(noise)

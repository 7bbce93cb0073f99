"""Prior preservation without class pictures is what a plain loop in torch does: a penalty on the change of the base's
weights, and the answers of the network without its adapters as the targets of class prompts."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE
from dreambooth_ms.diffusion import NoiseScheduleSpec, draw_columns
from dreambooth_ms.training.preservation import BaseAnswers, Penalty
from tests.parity.reference import normal, relative_error, worst_gradient_error
from tests.parity.test_training import (
    ALL_TARGETS,
    ALL_WEIGHTS,
    ALPHA,
    CUSTOM,
    GRADIENT,
    LATENTS,
    LORA_TEXT,
    LOSS,
    MAX_GRAD_NORM,
    ONE_WEIGHT,
    PRIOR_LOSS_WEIGHT,
    RANK,
    Case,
    Reference,
    Trained,
    Training,
    batches_of,
    concept,
    differences,
    in_one_batch,
    run_reference,
)
from tests.tiny_model import write_random_model

LOW_RANK_WEIGHT, DIFFERENCE_WEIGHT = 1e-3, 1e4
"""With which a penalty is of the size of the other losses, and its gradients too."""


@dataclass(frozen=True)
class OfMostLayers(Trained):
    """Linear layers and convolutions, as far as a network of one level has them."""

    @property
    def targets(self):
        return [name for name in ALL_TARGETS if name != "conv"]


class Penalised(Training):
    weight = 0.0

    def penalty_of_a_batch(self, batches_per_step):
        return Penalty(self.weight / batches_per_step, self.learner) if self.weight else None


class Answered(Training):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.answers = BaseAnswers(self.learner.denoiser, self.learner.layers)

    def as_trained(self, batches):
        return self.answers.as_targets(batches, {CLASS})

    def batches(self, case):
        return batches_of(
            plan_of_base_output(case.batch_size, case.batches_per_step),
            draw_columns(self.spec),
            posterior=lambda i: normal(2, *LATENTS, seed=i % 5),
            text=self.token_ids,
        )


def plan_of_base_output(batch_size, batches_per_step=1):
    """Five pictures, which rows of the class see as well, under one prompt."""
    subject = concept(INSTANCE, 5)
    records = tuple(replace(one, captions=("a photo of a class",)) for one in subject.records)
    of_class = replace(subject, name=CLASS, records=records, weight=PRIOR_LOSS_WEIGHT, drawn_as=INSTANCE)
    return Plan((subject, of_class), batch_size, Framing(((32, 32),), False, True), 5, batches_per_step)


class BesideItsBase(Reference):
    """Rows of the second half are compared with what the networks answer without their adapters."""

    def row_errors(self, batch):
        latents, noise = map(torch.tensor, (batch.inputs["sample"], batch.target))
        timesteps, networks = torch.tensor(batch.inputs["timestep"]).long(), [self.unet, *self.text_encoders.values()]
        noisy, target = self.scheduler.add_noise(latents, noise, timesteps), noise.clone()
        half = len(noise) // 2
        for network in networks:
            network.disable_adapters()
        with torch.no_grad():
            target[half:] = self.unet(noisy, timesteps, self.conditioning(batch)[0]).sample[half:]
        for network in networks:
            network.enable_adapters()
        prediction = self.unet(noisy, timesteps, self.conditioning(batch)[0]).sample
        return ((prediction - target) ** 2).mean((1, 2, 3))


def change_by_factors(trained):
    """Of the products themselves, which ours never forms."""
    downs = {name: value for name, value in trained.items() if "lora_A" in name}
    products = (trained[name.replace("lora_A", "lora_B")].flatten(1) @ down.flatten(1) for name, down in downs.items())
    return LOW_RANK_WEIGHT * sum(((ALPHA / RANK * product) ** 2).sum() for product in products)


def change_of_weights(start):
    """Of all but new words."""

    def change(trained):
        whole = {name: value for name, value in trained.items() if "token_embedding" not in name}
        return DIFFERENCE_WEIGHT * sum(
            ((value - torch.tensor(start[name])) ** 2).sum() for name, value in whole.items()
        )

    return change


@pytest.fixture(scope="module")
def training_of(tmp_path_factory):
    path = write_random_model(tmp_path_factory.mktemp("model"), levels=0)
    return cache(lambda kind, trained: kind(path, trained))


def check(ours, reference, start, method="lora"):
    """Loss, gradients and weights of five steps."""
    for one, expected in zip(ours.reports, reference.reports, strict=True):
        assert one.loss == pytest.approx(expected.loss, rel=LOSS)
        assert one.concept_losses == pytest.approx(expected.concept_losses, rel=LOSS)
        assert one.grad_norm == pytest.approx(expected.grad_norm, rel=LOSS)
        assert expected.grad_norm > MAX_GRAD_NORM
    if method == "lora":
        worst = max(relative_error(gradient, reference.gradients[name]) for name, gradient in ours.gradients.items())
    else:
        worst, _ = worst_gradient_error(ours.gradients, reference.gradients)
    all_weights, one = differences(ours.weights, reference.weights, start)
    print(f"gradients {worst:.1e}, all weights {all_weights:.1e}, one {one:.1e}")
    assert worst < GRADIENT
    assert all_weights < ALL_WEIGHTS
    assert one < ONE_WEIGHT


@pytest.mark.parametrize("trained", [OfMostLayers(), CUSTOM], ids=str)
def test_a_penalty_counts_once_in_a_step_of_two_batches(training_of, trained):
    training, case = training_of(Penalised, trained), Case(trained, 1, False, batches_per_step=2)
    of_factors = trained.method == "lora"
    training.weight = LOW_RANK_WEIGHT if of_factors else DIFFERENCE_WEIGHT
    penalty = change_by_factors if of_factors else change_of_weights(training.start)
    ours, whole = training.run(training.batches(case)), in_one_batch(case)
    batches = training.batches(whole)
    check(ours, run_reference(training, batches, whole, penalty=penalty), training.start, trained.method)
    without = run_reference(training, batches, whole)
    assert abs(without.reports[-1].loss / ours.reports[-1].loss - 1) > 100 * LOSS
    assert differences(without.weights, ours.weights, training.start)[0] > 10 * ALL_WEIGHTS


def test_the_bases_answers_are_those_of_the_networks_without_adapters(training_of):
    training, case = training_of(Answered, LORA_TEXT), Case(LORA_TEXT, 2, True)
    batches = training.batches(case)
    scales = [layer.lora_scale.asnumpy() for layer in training.learner.layers]
    ours = training.run(batches)
    check(ours, run_reference(training, batches, case, kind=BesideItsBase), training.start)
    assert ours.base_after == ours.base_before
    assert [layer.lora_scale.asnumpy() for layer in training.learner.layers] == scales
    noise = run_reference(training, batches, case, steps=1).reports[0]
    assert noise.concept_losses[CLASS] != pytest.approx(ours.reports[0].concept_losses[CLASS], rel=1e-2)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_rows_of_the_class_are_those_of_the_subject_under_another_prompt(batch_size):
    make_batch = batches_of(
        plan_of_base_output(batch_size),
        draw_columns(NoiseScheduleSpec()),
        posterior=lambda i: normal(2, *LATENTS, seed=i % 5),
        text=lambda i: (np.full((7, 24), i % 5 if i < 5 else 9, np.float32),),
    )
    for step in range(4):
        batch, half = make_batch(step), batch_size
        assert batch.concepts == (INSTANCE,) * half + (CLASS,) * half
        for name in ("sample", "timestep"):
            assert np.array_equal(batch.inputs[name][:half], batch.inputs[name][half:])
        assert (batch.inputs["encoder_hidden_states"][half:] == 9).all()
        assert (batch.inputs["encoder_hidden_states"][:half] < 5).all()
        assert batch.weight[half:] == pytest.approx(PRIOR_LOSS_WEIGHT * batch.weight[:half])

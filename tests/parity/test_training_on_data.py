"""Training on captions, pictures of two sizes, several concepts and masks is what a plain loop in torch does with them.

The loop says what each row is worth by itself; draws, pictures and embeddings are the same.
"""

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.captions import Wording
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.masks import find_mask
from dreambooth_ms.data.pictures import resize_and_crop
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record
from dreambooth_ms.diffusion import draw_columns
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.training.step import DiffusionLoss
from tests.parity.reference import as_drawn, normal, relative_error
from tests.parity.test_training import (
    ALL_WEIGHTS,
    CUSTOM,
    GRADIENT,
    LORA,
    LOSS,
    MAX_GRAD_NORM,
    ONE_WEIGHT,
    PRIOR_LOSS_WEIGHT,
    SCALING_FACTOR,
    STEPS,
    TEXT,
    Reference,
    Training,
    differences,
    optimiser_of,
)
from tests.tiny_model import write_random_model

SQUARE, WIDE, PIXELS_PER_LATENT = (32, 32), (48, 32), 4
UNMASKED_WEIGHT = 0.25
SUBJECTS = {
    "dog": ((40, 40), (60, 40), (61, 41)),
    "cat": ((50, 50), (66, 44)),
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Two subjects that share the rows of a group, one of them twice as often, and a class without masks."""
    folder = tmp_path_factory.mktemp("pictures")

    def record(name, number, size, masked):
        path = folder / f"{name}-{number}.png"
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).ellipse((5, 3 + number, size[0] - 9, size[1] - 4), fill=255 - 60 * number)
        mask.save(path)
        captions = tuple(f"{name}, {i}, picture {number}, grass" for i in range(1 + number % 2))
        return Record(path, path.name, size, captions, find_mask(path, folder, size) if masked else None)

    def concept(name, sizes, masked=True, **settings):
        records = tuple(record(name, number, size, masked) for number, size in enumerate(sizes))
        return Concept(name, records, **settings)

    wording = Wording(dropout=0.2, shuffles=True, kept=1)
    dog = concept("dog", SUBJECTS["dog"], group=INSTANCE, repeats=Fraction(2), wording=wording)
    cat = concept("cat", SUBJECTS["cat"], group=INSTANCE)
    of_class = concept(CLASS, ((64, 64), (70, 48)), masked=False, weight=PRIOR_LOSS_WEIGHT)
    framing = Framing((SQUARE, WIDE), center_crop=False, random_flip=True)
    return Plan((dog, cat, of_class), batch_size=2, framing=framing, seed=3)


@pytest.fixture(scope="module", params=[LORA, CUSTOM], ids=str)
def compared(request, plan, tmp_path_factory):
    """Our run and torch's."""
    trained = request.param
    training = Training(write_random_model(tmp_path_factory.mktemp("model"), levels=0), trained)
    training.loss = DiffusionLoss(training.learner.denoiser, ("mask",))
    known = [record for concept in plan.concepts for record in concept.records]

    def posterior(view):
        width, height = (side // PIXELS_PER_LATENT for side in view.frame.size)
        return normal(2, 4, height, width, seed=10 * known.index(view.record) + view.flip)

    batches = BatchMaker(
        plan=plan,
        posteriors=posterior,
        texts=lambda prompt: PromptText(
            *(training.token_ids if trained.encodes_text else embedding)(number_of(prompt))
        ),
        objective=draw_columns(training.spec),
        scaled=VaeSpec(scaling_factor=SCALING_FACTOR).scaled,
        masked=True,
        unmasked_weight=UNMASKED_WEIGHT,
    )
    ours = training.run(batches)
    return SimpleNamespace(training=training, batches=batches, ours=ours, reference=run_reference(training, batches))


def number_of(prompt):
    return crc32(prompt.encode()) % 10**6


def embedding(number):
    return (normal(*TEXT, seed=number),)


def run_reference(training, batches, mask_of=None):
    """The same steps in torch."""
    mask_of, plan = mask_of or counted, batches.plan
    reference = Reference(training.path, training.trained, training.start)
    optimiser = optimiser_of(reference, training.trained)
    drawn = replace(batches, objective=as_drawn(batches.objective))
    reports, gradients = [], None
    for step in range(STEPS):
        batch, loss, losses = drawn(step), 0.0, {}
        latents, noise = map(torch.tensor, (batch.inputs["sample"], batch.target))
        timesteps = torch.tensor(batch.inputs["timestep"]).long()
        text = torch.stack([torch.tensor(batches.texts(row.view.prompt).text) for row in plan.rows(step)])
        text, _ = reference.encoded(text)
        noisy = reference.scheduler.add_noise(latents, noise, timesteps)
        squares = (reference.unet(noisy, timesteps, text).sample - noise) ** 2
        for row, of_row in zip(plan.rows(step), squares, strict=True):
            mask = mask_of(row.view).expand_as(of_row)
            error = (mask * of_row).sum() / mask.sum()
            # A mean over the rows of the subjects, and one over those of the class.
            loss = loss + (PRIOR_LOSS_WEIGHT if row.concept.name == CLASS else 1.0) * error / plan.batch_size
            losses.setdefault(row.concept.name, []).append(error.item())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters.values(), MAX_GRAD_NORM)
        gradients = gradients or {name: one.grad.numpy().copy() for name, one in reference.parameters.items()}
        optimiser.step()
        means = {name: float(np.mean(values)) for name, values in losses.items()}
        reports.append(SimpleNamespace(loss=loss.item(), concept_losses=means))
    weights = {name: parameter.detach().numpy() for name, parameter in reference.parameters.items()}
    return SimpleNamespace(reports=reports, gradients=gradients, weights=weights)


def counted(view):
    """How much each latent counts: the mask's part of its area, and a quarter for what is not in it."""
    if view.record.mask is None:
        return torch.ones(1)
    with Image.open(view.record.mask.path) as picture:
        crop = torch.tensor(np.asarray(resize_and_crop(picture, view.frame, "bilinear", view.flip), np.float32))
    shares = torch.nn.functional.avg_pool2d(crop[None] / 255, PIXELS_PER_LATENT)
    return shares + UNMASKED_WEIGHT * (1 - shares)


def test_the_steps_have_both_sizes_and_all_that_varies(compared, plan):
    rows = [row for step in range(STEPS) for row in plan.rows(step)]
    assert {row.view.frame.size for row in rows} == {SQUARE, WIDE}
    assert {row.concept.name for row in rows} == {"dog", "cat", CLASS}
    assert {row.view.flip for row in rows} == {False, True}
    prompts = {row.view.prompt for row in rows if row.concept.name == "dog"}
    assert any(not prompt.startswith("dog, 0, picture") for prompt in prompts)


def test_one_graph_is_compiled_for_each_size(compared):
    assert len(compared.training.step_cell(1).compile_cache) == 2


def test_losses_are_torchs(compared):
    for ours, expected in zip(compared.ours.reports, compared.reference.reports, strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=LOSS)
        assert ours.concept_losses == pytest.approx(expected.concept_losses, rel=LOSS)


def test_gradients_are_torchs(compared):
    expected = compared.reference.gradients
    assert max(relative_error(one, expected[name]) for name, one in compared.ours.gradients.items()) < GRADIENT


def test_weights_after_five_steps_are_torchs(compared):
    all_weights, one = differences(compared.ours.weights, compared.reference.weights, compared.training.start)
    print(f"all weights {all_weights:.1e}, one {one:.1e}")
    assert all_weights < ALL_WEIGHTS
    assert one < ONE_WEIGHT


def test_a_mistake_in_masks_would_show(compared):
    other = run_reference(compared.training, compared.batches, lambda view: torch.ones(1))
    pairs = zip(other.reports, compared.reference.reports, strict=True)
    assert max(abs(one.loss / expected.loss - 1) for one, expected in pairs) > 10 * LOSS

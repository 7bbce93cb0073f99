"""DeepFloyd IF's stages are trained as diffusers' scripts train them, or as IF was, in a plain loop in torch.

The rules are written out here: three of six channels are compared, a second stage reads its noisy picture twice, or a
small one that has noise of a level of its own.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.second_stage import small_ones, twice
from dreambooth_ms.diffusion import draw_columns
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import normal, relative_error, worst_gradient_error
from tests.parity.test_training import (
    ALL_WEIGHTS,
    GRADIENT,
    LOSS,
    ONE_WEIGHT,
    STEPS,
    Case,
    Reference,
    Trained,
    Training,
    differences,
    known_records,
    plan_of,
    run_reference,
)
from tests.tiny_model import write_random_if

PIXELS, TEXT = (3, 16, 8), (7, 24)


@dataclass(frozen=True)
class OfIf(Trained):
    """What is trained of a stage."""

    second: bool = False
    low_res: bool = False

    @property
    def targets(self):
        return ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]


FIRST, FIRST_FULL, SECOND = OfIf(), OfIf("full"), OfIf(second=True)
CASES = {
    "first, LoRA, 1+1 rows": Case(FIRST, 1, True),
    "first, full, 2 rows": Case(FIRST_FULL, 2, False),
    "second, LoRA, 1 row, 2 batches a step": Case(SECOND, 1, False, batches_per_step=2),
    "second, LoRA on small pictures, 1+1 rows": Case(OfIf(second=True, low_res=True), 1, True),
}


class InTorch(Reference):
    """The same stage in torch."""

    def row_errors(self, batch):
        read = {name: torch.tensor(rows) for name, rows in batch.inputs.items()}
        clean, beside = read["sample"][:, :3], read["sample"][:, 3:]
        noise, timesteps = torch.tensor(batch.target), read["timestep"].long()
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        labels = None
        if beside.shape[1]:
            # As it was drawn, without noise, the picture stands beside itself.
            is_itself = torch.equal(beside, clean)
            beside, labels = (noisy, timesteps) if is_itself else (beside, read["class_labels"])
            noisy = torch.cat([noisy, beside], dim=1)
        text = read["encoder_hidden_states"]
        prediction = self.unet(noisy, timesteps, text, class_labels=labels).sample
        return ((prediction.chunk(2, 1)[0] - noise) ** 2).mean((1, 2, 3))


@pytest.fixture(scope="module", params=CASES)
def compared(request, tmp_path_factory):
    case = CASES[request.param]
    trained = case.trained
    folder = write_random_if(tmp_path_factory.mktemp("model"), second=trained.second, levels=0)
    training, bundle = Training(folder, trained), open_bundle(folder)
    plan = plan_of(case.batch_size, case.prior, case.batches_per_step)
    known = known_records(plan)
    texts = {caption: PromptText(normal(*TEXT, seed=20 + i)) for i, one in enumerate(known) for caption in one.captions}
    beside = small_ones(bundle.noise_of_small) if trained.low_res else twice
    batches = BatchMaker(
        plan=plan,
        posteriors=lambda view: np.stack([normal(*PIXELS, seed=known.index(view.record)), np.full(PIXELS, -400.0)]),
        texts=texts.__getitem__,
        objective=draw_columns(training.spec),
        scaled=bundle.codec.spec.scaled,
        second_stage=beside if trained.second else None,
    )
    ours = training.run(batches)
    # All rows of a step in one batch.
    rows = case.batch_size * case.batches_per_step
    whole = replace(batches, plan=replace(plan, batch_size=rows, batches_per_step=1))
    reference = run_reference(training, whole, replace(case, batch_size=rows), kind=InTorch)
    return SimpleNamespace(training=training, ours=ours, reference=reference, batches=whole, folder=folder, case=case)


def test_losses_gradients_and_weights_are_torchs(compared):
    pairs = list(zip(compared.ours.reports, compared.reference.reports, strict=True))
    print(f"loss {max(abs(ours.loss / expected.loss - 1) for ours, expected in pairs):.1e}")
    assert len(pairs) == STEPS
    for ours, expected in pairs:
        assert ours.loss == pytest.approx(expected.loss, rel=LOSS)
        assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=LOSS)
    ours, expected = compared.ours.gradients, compared.reference.gradients
    assert any("add_k_proj" in name for name in ours)
    if compared.case.trained.method == "lora":
        worst = max(relative_error(one, expected[name]) for name, one in ours.items())
    else:
        worst, _ = worst_gradient_error(ours, expected)
        # The variance is not trained.
        assert not ours["unet.conv_out.weight"][3:].any()
        assert ours["unet.conv_out.weight"][:3].any()
    all_weights, one = differences(compared.ours.weights, compared.reference.weights, compared.training.start)
    print(f"gradients {worst:.1e}, all weights {all_weights:.1e}, one {one:.1e}")
    assert worst < GRADIENT
    assert all_weights < ALL_WEIGHTS
    assert one < ONE_WEIGHT
    assert compared.ours.base_before == compared.ours.base_after


def test_small_pictures_have_noise_of_their_own(compared):
    """As torch makes them; and no row is that of another batch."""
    if not compared.case.trained.low_res:
        return
    scheduler = diffusers.DDPMScheduler.from_pretrained(compared.folder, subfolder="image_noising_scheduler")
    plan, seen = compared.batches.plan, set()
    for step in range(3):
        batch = compared.batches(step)
        for at, row in enumerate(plan.rows(step)):
            draws = plan.draws(row.concept, row.number)
            level = int(draws("level of the small picture").integers(1000))
            noise = draws("noise of the small picture").standard_normal(PIXELS, np.float32)
            clean = torch.tensor(normal(*PIXELS, seed=known_records(plan).index(row.view.record)))[None]
            small = torch.nn.functional.avg_pool2d(clean, 4)
            large = torch.nn.functional.interpolate(small, PIXELS[1:], mode="bilinear", align_corners=True)
            expected = scheduler.add_noise(large, torch.tensor(noise)[None], torch.tensor([level]))
            assert batch.inputs["class_labels"][at] == level
            assert relative_error(batch.inputs["sample"][at, 3:], expected[0]) < 1e-5
            seen.add(level)
    assert len(seen) > 3

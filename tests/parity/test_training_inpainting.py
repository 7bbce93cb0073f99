"""Inpainting bases are trained as diffusers' script `dreambooth_inpaint` trains them, in a plain loop in torch.

The script's rules are written out here: mask, masked picture, both encoded, nine channels. Draws are ours.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from mindspore import Tensor
from PIL import Image, ImageDraw

from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.cache import ContentCache, posterior_lookup
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.pictures import digest, resize_and_crop
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record
from dreambooth_ms.diffusion import draw_columns
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import as_drawn, normal, relative_error, worst_gradient_error
from tests.parity.test_training import (
    ALL_WEIGHTS,
    FULL,
    GRADIENT,
    LORA,
    LOSS,
    MAX_GRAD_NORM,
    ONE_WEIGHT,
    PRIOR_LOSS_WEIGHT,
    STEPS,
    TEXT,
    Reference,
    Training,
    differences,
    optimiser_of,
)
from tests.tiny_model import write_random_model

CASES = {
    "LoRA, 1+1 rows, 2 batches a step": (LORA, 1, True, 2),
    "LoRA, 3 rows": (LORA, 3, False, 1),
    "full, 2+2 rows": (FULL, 2, True, 1),
}
SIZE = (48, 32)


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")

    def record(name, number, size):
        path = folder / f"{name}-{number}.png"
        pixels = np.random.default_rng([len(name), number]).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return Record(path, digest(path), size, (f"{name} {number}",))

    subject = [record(INSTANCE, i, size) for i, size in enumerate([(40, 40), (44, 41), (60, 40)])]
    others = [record(CLASS, i, size) for i, size in enumerate([(32, 32), (50, 34)])]
    return Concept(INSTANCE, tuple(subject)), Concept(CLASS, tuple(others), PRIOR_LOSS_WEIGHT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), levels=0, in_channels=9)


@pytest.fixture(scope="module")
def training_of(base):
    known = {}

    def build(trained):
        if trained not in known:
            known[trained] = Training(base, trained)
        return known[trained]

    return build


@pytest.fixture(scope="module", params=CASES)
def compared(request, training_of, concepts, base, tmp_path_factory):
    """Our run and torch's, which has all rows of a step in one batch."""
    trained, rows, prior, parts = CASES[request.param]
    training, bundle = training_of(trained), open_bundle(base)
    encoder = CellMethod(bundle.codec.load(decodes=False).encode)
    posteriors = posterior_lookup(
        ContentCache(tmp_path_factory.mktemp("cache")),
        "the encoder",
        "lanczos",
        lambda: lambda pictures: np.concatenate([one.asnumpy() for one in encoder(Tensor(pictures))]),
        lambda views: views,
    )
    texts = {caption: i for i, of in enumerate(concepts) for one in of.records for caption in one.captions}
    framing = Framing((SIZE,), center_crop=False, random_flip=True, inpaints=True)
    plan = Plan(concepts if prior else concepts[:1], rows, framing, 5, parts)
    batches = BatchMaker(
        plan=plan,
        posteriors=posteriors,
        texts=lambda prompt: PromptText(normal(*TEXT, seed=texts[prompt])),
        objective=draw_columns(training.spec),
        scaled=bundle.codec.spec.scaled,
    )
    whole = replace(batches, plan=replace(plan, batch_size=rows * parts, batches_per_step=1))
    ours = training.run(batches)
    return SimpleNamespace(
        training=training, ours=ours, batches=whole, reference=run_reference(training, whole, hole_of=drawn)
    )


def drawn(view):
    """The row's mask (H, W), 0 or 255: a rectangle or an ellipse, by the pixels at its ends."""
    image = Image.new("L", view.frame.size, 0)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if view.hole.is_ellipse else pen.rectangle)(view.hole.box, fill=255)
    return np.asarray(image)


def encoded(vae, pictures, draws):
    """Latents of pictures (B, 3, H, W) by diffusers' autoencoder, from these draws of its posterior."""
    posterior = vae.encode(torch.cat(pictures)).latent_dist
    return (posterior.mean + posterior.std * torch.tensor(np.stack(draws))) * vae.config.scaling_factor


def read_by_the_unet(vae, rows, seed, hole_of):
    """Clean latents (B, 4, h, w), and what stands behind the noisy ones (B, 5, h, w)."""
    masks, pictures, left = [], [], []
    for _, _, view in rows:
        with Image.open(view.record.path) as image:
            crop = np.asarray(resize_and_crop(image.convert("RGB"), view.frame, "lanczos", view.flip), np.float32)
        mask = torch.tensor(hole_of(view) / np.float32(255))[None, None]
        mask = (mask >= 0.5).float()
        pictures.append(torch.tensor(crop).permute(2, 0, 1)[None] / 127.5 - 1)
        left.append(pictures[-1] * (mask < 0.5))
        masks.append(mask)
    shape = 4, *(side // 2 for side in pictures[0].shape[2:])
    draws = {
        end: [standard_normal(shape, seed, f"{row.concept.name} posterior{end}", row.number) for row in rows]
        for end in ("", " of the rest")
    }
    small = torch.nn.functional.interpolate(torch.cat(masks), size=shape[1:])
    beside = torch.cat([small, encoded(vae, left, draws[" of the rest"])], dim=1)
    return encoded(vae, pictures, draws[""]), beside


def run_reference(training, batches, hole_of, steps=STEPS):
    """The same steps in torch."""
    plan, vae = batches.plan, AutoencoderKL.from_pretrained(training.path, subfolder="vae")
    reference = Reference(training.path, training.trained, training.start)
    optimiser = optimiser_of(reference, training.trained)
    columns = replace(batches, objective=as_drawn(batches.objective))
    reports, gradients = [], None
    for step in range(steps):
        rows, batch = plan.rows(step), columns(step)
        with torch.no_grad():
            clean, beside = read_by_the_unet(vae, rows, plan.seed, hole_of)
        noise = torch.tensor(batch.target)
        timesteps = torch.tensor(batch.inputs["timestep"]).long()
        noisy = reference.scheduler.add_noise(clean, noise, timesteps)
        text = torch.tensor(batch.inputs["encoder_hidden_states"])
        prediction = reference.unet(torch.cat([noisy, beside], dim=1), timesteps, text).sample
        errors = ((prediction - noise) ** 2).mean((1, 2, 3))
        size = plan.batch_size
        loss = errors[:size].mean()
        if len(errors) > size:
            loss = loss + PRIOR_LOSS_WEIGHT * errors[size:].mean()
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters.values(), MAX_GRAD_NORM)
        gradients = gradients or {name: one.grad.numpy().copy() for name, one in reference.parameters.items()}
        optimiser.step()
        reports.append(SimpleNamespace(loss=loss.item(), grad_norm=norm.item()))
    weights = {name: parameter.detach().numpy() for name, parameter in reference.parameters.items()}
    return SimpleNamespace(reports=reports, gradients=gradients, weights=weights)


def test_losses_are_torchs(compared):
    pairs = list(zip(compared.ours.reports, compared.reference.reports, strict=True))
    print(f"loss {max(abs(ours.loss / expected.loss - 1) for ours, expected in pairs):.1e}")
    for ours, expected in pairs:
        assert ours.loss == pytest.approx(expected.loss, rel=LOSS)
        assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=LOSS)


def test_gradients_are_torchs(compared):
    ours, expected = compared.ours.gradients, compared.reference.gradients
    if compared.training.trained is LORA:
        worst = max(relative_error(one, expected[name]) for name, one in ours.items())
    else:
        worst, _ = worst_gradient_error(ours, expected)
        assert ours["unet.conv_in.weight"].shape[1] == 9
    print(f"gradients {worst:.1e}")
    assert worst < GRADIENT


def test_weights_after_five_steps_are_torchs(compared):
    all_weights, one = differences(compared.ours.weights, compared.reference.weights, compared.training.start)
    print(f"all weights {all_weights:.1e}, one {one:.1e}")
    assert all_weights < ALL_WEIGHTS
    assert one < ONE_WEIGHT


def test_another_hole_or_none_would_show(compared):
    """The hole of another row, and a picture of which nothing is left."""
    rows = compared.batches.plan.rows(0)
    size = rows[0].view.frame.size
    holes = dict(zip([row.view for row in rows], [row.view.hole for row in compared.batches.plan.rows(1)], strict=True))
    of_another = lambda view: drawn(replace(view, hole=holes[view]))  # noqa: E731
    for hole_of in (of_another, lambda view: np.full(size[::-1], 255)):
        other = run_reference(compared.training, compared.batches, hole_of, steps=1)
        assert abs(other.reports[0].loss / compared.reference.reports[0].loss - 1) > 10 * LOSS


def test_the_plan_has_both_kinds_of_holes(compared):
    views = [row.view for step in range(STEPS) for row in compared.batches.plan.rows(step)]
    assert {view.hole.is_ellipse for view in views} == {True, False}
    assert {view.flip for view in views} == {True, False}

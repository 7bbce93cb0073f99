"""Training by other objectives is what a plain loop in torch does on the same draws: loss, gradients, five steps.

The loop says them as the published scripts do: EDM by the denoised picture, the others by diffusers' schedulers.
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth_ms.config.train import LossConfig
from dreambooth_ms.diffusion import EdmSpec, NoiseScheduleSpec, draw_columns
from dreambooth_ms.training.step import DiffusionLoss
from tests.parity.reference import as_drawn, normal, relative_error
from tests.parity.test_training import (
    ALL_WEIGHTS,
    GRADIENT,
    LATENTS,
    LOSS,
    MAX_GRAD_NORM,
    ONE_WEIGHT,
    PRIOR_LOSS_WEIGHT,
    SDXL,
    STEPS,
    Reference,
    Training,
    batches_of,
    differences,
    optimiser_of,
    plan_of,
)
from tests.tiny_model import write_random_sdxl

BATCH_SIZE = 2
NOISE, VELOCITY = NoiseScheduleSpec(), NoiseScheduleSpec(prediction_type="v_prediction")


@dataclass(frozen=True)
class Case:
    """What a base was trained for, and what the loss is made of."""

    name: str
    spec: NoiseScheduleSpec | EdmSpec
    settings: dict = field(default_factory=dict)

    def __str__(self):
        return self.name

    @property
    def loss(self):
        return LossConfig(**self.settings)


# All with the squared error are one compiled step, all others another one.
CASES = [
    Case("EDM", EdmSpec()),
    Case("EDM of the paper", EdmSpec(), {"edm_sampling": "lognormal", "edm_weighting": "edm"}),
    Case("EDM, velocity", EdmSpec(prediction_type="v_prediction")),
    Case("Euler", NOISE, {"do_edm_style_training": True}),
    Case("Euler, velocity", VELOCITY, {"do_edm_style_training": True}),
    Case("zero SNR", replace(VELOCITY, rescale_betas_zero_snr=True), {"min_timestep": 990, "snr_gamma": 5.0}),
    Case(
        "debiased, with other noise",
        NOISE,
        {"debiased_estimation_loss": True, "multires_noise_iterations": 6, "ip_noise_gamma": 0.1},
    ),
    Case("huber", NOISE, {"loss_type": "huber", "timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0}),
    Case("smooth L1", VELOCITY, {"loss_type": "smooth_l1", "huber_schedule": "exponential", "huber_c": 0.2}),
    Case("EDM, huber", EdmSpec(), {"loss_type": "huber"}),
]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """By whether differences are squared."""
    path, made = write_random_sdxl(tmp_path_factory.mktemp("sdxl"), levels=0), {True: None, False: None}
    for squared in made:
        made[squared] = Training(path, SDXL)
        made[squared].loss = DiffusionLoss(made[squared].learner.denoiser, () if squared else ("huber_c",))
    return made


@pytest.fixture(scope="module", params=CASES, ids=str)
def compared(request, trainings):
    case, training = request.param, trainings[request.param.loss.loss_type == "l2"]
    batches = replace(
        batches_of(
            plan_of(BATCH_SIZE, prior=True),
            draw_columns(case.spec, case.loss),
            posterior=lambda i: normal(2, *LATENTS, seed=i),
            text=training.embedding,
            num_add_time_ids=training.num_add_time_ids,
        ),
        loss=case.loss,
    )
    ours = training.run(batches)
    return SimpleNamespace(case=case, training=training, batches=batches, ours=ours)


class Rows:
    """Rows as they were drawn: latents, noise, the noise that is read, and what tells their level."""

    def __init__(self, batches, step):
        drawn = replace(batches, objective=as_drawn(batches.objective))(step)
        read = replace(batches, objective=as_read(batches.objective))(step)
        self.latents, self.noise, self.read_noise = (
            torch.tensor(values, dtype=torch.float64)
            for values in (drawn.inputs["sample"], drawn.target, read.inputs["sample"])
        )
        self.time, self.batch = torch.tensor(drawn.inputs["timestep"], dtype=torch.float64), drawn


def as_read(objective):
    """The same draws with the noise as what the network reads."""

    def columns_of(generators):
        columns = as_drawn(objective)(generators)
        return replace(columns, in_x=columns.in_n, in_n=columns.in_x)

    return columns_of


def row_losses(case, rows, predict):
    """The loss of each row, in float64 but for the network."""
    of_edm = isinstance(case.spec, EdmSpec)
    if case.settings.get("loss_type"):
        return huber(case, rows, predict)
    if of_edm or case.settings.get("do_edm_style_training"):
        denoised, sigma = (denoised_by_edm if of_edm else denoised_by_euler)(case.spec, rows, predict)
        errors = ((denoised - rows.latents) ** 2).mean((1, 2, 3))
        if not of_edm:
            return errors * sigma**-2
        return errors * ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 if case.settings.get("edm_weighting") == "edm" else 1)
    scheduler = ddpm(case.spec)
    timesteps = rows.time.long()
    noisy = scheduler.add_noise(rows.latents, rows.read_noise, timesteps)
    velocity = case.spec.prediction_type == "v_prediction"
    target = scheduler.get_velocity(rows.latents, rows.noise, timesteps) if velocity else rows.noise
    alphas = scheduler.alphas_cumprod[timesteps].double()
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=5.0) / (snr + 1) if velocity else snr.clamp(max=1000) ** -0.5
    return weight * ((predict(noisy, rows.time) - target) ** 2).mean((1, 2, 3))


def denoised_by_edm(spec, rows, predict):
    """diffusers' branch for schedulers of EDM, with the factors of its scheduler."""
    sigma = torch.exp(4 * rows.time)
    s, data = sigma.view(-1, 1, 1, 1), 0.5
    noisy, sign = rows.latents + s * rows.noise, -1 if spec.prediction_type == "v_prediction" else 1
    answer = predict(noisy / torch.sqrt(s**2 + data**2), rows.time)
    c_skip, c_out = data**2 / (s**2 + data**2), sign * s * data / torch.sqrt(s**2 + data**2)
    return c_skip * noisy + c_out * answer, sigma


def denoised_by_euler(spec, rows, predict):
    """diffusers' branch for other schedulers."""
    alphas = ddpm(spec).alphas_cumprod[rows.time.long()].double()
    sigma = torch.sqrt((1 - alphas) / alphas)
    s = sigma.view(-1, 1, 1, 1)
    noisy = rows.latents + s * rows.noise
    answer = predict(noisy / torch.sqrt(s**2 + 1), rows.time)
    if spec.prediction_type == "epsilon":
        return noisy - s * answer, sigma
    return noisy / (s**2 + 1) - s * answer / torch.sqrt(s**2 + 1), sigma


def huber(case, rows, predict):
    """As kohya's scripts have it, of what the network predicts; for EDM of its F."""
    if isinstance(case.spec, EdmSpec):
        sigma = torch.exp(4 * rows.time).view(-1, 1, 1, 1)
        noisy, data = rows.latents + sigma * rows.noise, 0.5
        c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / torch.sqrt(sigma**2 + data**2)
        answer = predict(noisy / torch.sqrt(sigma**2 + data**2), rows.time)
        target, weight = (rows.latents - c_skip * noisy) / c_out, c_out.view(-1) ** 2
    else:
        scheduler, timesteps, weight = ddpm(case.spec), rows.time.long(), 1.0
        noisy = scheduler.add_noise(rows.latents, rows.noise, timesteps)
        velocity = case.spec.prediction_type == "v_prediction"
        target = scheduler.get_velocity(rows.latents, rows.noise, timesteps) if velocity else rows.noise
        answer, alphas = predict(noisy, rows.time), scheduler.alphas_cumprod[timesteps].double()
        sigma = torch.sqrt((1 - alphas) / alphas).view(-1, 1, 1, 1)
    c0 = case.loss.huber_c
    by_time = torch.exp(rows.time / 1000 * np.log(c0)).view(-1, 1, 1, 1)
    c = by_time if case.loss.huber_schedule == "exponential" else (1 - c0) / (1 + sigma) ** 2 + c0
    counted = 2 * (torch.sqrt((answer - target) ** 2 + c**2) - c) * (c if case.loss.loss_type == "huber" else 1)
    return weight * counted.mean((1, 2, 3))


def ddpm(spec):
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=spec.rescale_betas_zero_snr,
        clip_sample=False,
    )


def run_reference(compared, case, steps=STEPS):
    """The same steps in torch."""
    training = compared.training
    reference = Reference(training.path, SDXL, training.start)
    trained, optimiser = reference.parameters, optimiser_of(reference, SDXL)
    reports, gradients = [], None
    for step in range(steps):
        rows = Rows(compared.batches, step)
        text, added = reference.conditioning(rows.batch)

        def predict(read, time, text=text, added=added):
            return reference.unet(read.float(), time.float(), text, added_cond_kwargs=added).sample.double()

        losses = row_losses(case, rows, predict)
        loss = losses[:BATCH_SIZE].mean() + PRIOR_LOSS_WEIGHT * losses[BATCH_SIZE:].mean()
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        gradients = gradients or {name: parameter.grad.numpy().copy() for name, parameter in trained.items()}
        optimiser.step()
        reports.append(SimpleNamespace(loss=loss.item(), grad_norm=norm.item()))
    weights = {name: parameter.detach().numpy() for name, parameter in trained.items()}
    return SimpleNamespace(reports=reports, gradients=gradients, weights=weights)


def test_loss_gradients_and_five_steps_are_torchs(compared):
    expected = run_reference(compared, compared.case)
    for ours, reference in zip(compared.ours.reports, expected.reports, strict=True):
        assert ours.loss == pytest.approx(reference.loss, rel=LOSS)
        assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=LOSS)
    worst = max(relative_error(one, expected.gradients[name]) for name, one in compared.ours.gradients.items())
    all_weights, one = differences(compared.ours.weights, expected.weights, compared.training.start)
    print(f"{compared.case}: gradients {worst:.1e}, all weights {all_weights:.1e}, one {one:.1e}")
    assert worst < GRADIENT
    assert all_weights < ALL_WEIGHTS
    assert one < ONE_WEIGHT


def test_another_objective_would_show(compared):
    others = [case for case in CASES if type(case.spec) is type(compared.case.spec) and case is not compared.case]
    other = run_reference(compared, next(case for case in others if case.name != "Euler"), steps=2)
    pairs = zip(other.reports, compared.ours.reports, strict=False)
    assert max(abs(one.loss / ours.loss - 1) for one, ours in pairs) > 10 * LOSS


def test_one_graph_is_compiled_for_all_that_are_squared_and_one_for_the_others(trainings, compared):
    for training in trainings.values():
        assert len(training.step_cell(1).compile_cache) <= 1

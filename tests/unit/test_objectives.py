"""What a loss is made of: levels of noise, formulations, weights, comparisons and noise are the published formulas."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler
from mindspore import Tensor

from dreambooth_ms.config.train import LossConfig
from dreambooth_ms.data.batches import Batch
from dreambooth_ms.diffusion import (
    HUBER_SCHEDULES,
    EdmSpec,
    NoiseSchedule,
    NoiseScheduleSpec,
    debiased,
    draw_columns,
    edm_at,
    epsilon_at,
    perturbed,
    pseudo_huber,
    pyramid_noise,
    velocity_at,
    weighed_as_clean,
)
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.model_config import EDM_SCHEDULER
from dreambooth_ms.randomness import generator
from dreambooth_ms.sampling.schedulers import SCHEDULERS
from dreambooth_ms.training.step import WeightedError
from dreambooth_ms.weights.bundle import Schedule
from tests.parity.reference import normal, relative_error
from tests.parity.test_training import batches_of, plan_of

SCHEDULE = NoiseSchedule.from_spec(NoiseScheduleSpec())
VELOCITY = NoiseScheduleSpec(prediction_type="v_prediction")
ZERO_SNR = NoiseSchedule.from_spec(replace(VELOCITY, rescale_betas_zero_snr=True))
EDM, EDM_V = EdmSpec(), EdmSpec(prediction_type="v_prediction")
SIGMAS = np.array([80, 17.5, 2.515219, 0.5, 0.002])
# Float64 rounding, where nothing is subtracted from its like.
EXACT = partial(pytest.approx, rel=1e-12)


def generators(count=1000):
    return [generator(3, "timestep", row) for row in range(count)]


def drawn(spec, count=1000, **settings):
    return draw_columns(spec, LossConfig(**settings))(generators(count))


def answers(columns, seed=0):
    """Clean latents, noise and an answer of a network (B, 2, 3, 4) float64; the input and the target of the columns."""
    clean, noise, answer = np.random.default_rng(seed).standard_normal((3, len(columns.time), 2, 3, 4))
    by_row = {name: values[:, None, None, None] for name, values in vars(columns).items() if values is not None}
    target = by_row["out_x"] * clean + by_row["out_n"] * noise
    return clean, noise, answer, by_row["in_x"] * clean + by_row["in_n"] * noise, target


def errors(difference):
    return (difference**2).mean((1, 2, 3))


def rows(values):
    return values[:, None, None, None]


# The eight identities of EDM's two branches.


def euler_branch(schedule, timesteps, answer, clean, noise, predicts_velocity):
    """The denoised picture D of diffusers' Euler branch, and 1 / sigma^2 (D - x0)^2 of each row."""
    sigma = rows(schedule.noise(timesteps) / schedule.signal(timesteps))
    noisy = clean + sigma * noise
    denoised = noisy / (sigma**2 + 1) - sigma / np.sqrt(sigma**2 + 1) * answer if predicts_velocity else None
    denoised = noisy - sigma * answer if denoised is None else denoised
    return noisy / np.sqrt(sigma**2 + 1), errors(denoised - clean) / sigma[:, 0, 0, 0] ** 2


@pytest.mark.parametrize("predicts_velocity", [False, True])
def test_the_euler_branch_is_plain_training_with_the_weight_of_the_signal(predicts_velocity):
    """1 and 2: by alpha-bar where the velocity is predicted, and not at all where the noise is."""
    timesteps = np.arange(0, 1000, 37)
    columns = (velocity_at if predicts_velocity else epsilon_at)(SCHEDULE, timesteps)
    clean, noise, answer, read, target = answers(columns)
    seen, expected = euler_branch(SCHEDULE, timesteps, answer, clean, noise, predicts_velocity)
    assert read == EXACT(seen)
    weight = weighed_as_clean(columns, columns.snr).weight
    assert weight == EXACT(SCHEDULE.alphas_cumprod[timesteps] if predicts_velocity else np.ones(len(timesteps)))
    # At the least noise the denoised picture is the clean one but for a 30th, and 1 / sigma^2 is 1000.
    assert weight * errors(answer - target) == pytest.approx(expected, rel=1e-10)


def test_with_the_flag_a_base_that_predicts_noise_is_trained_bit_for_bit_as_without():
    """6: columns are all that differs."""
    plain, flagged = drawn(NoiseScheduleSpec()), drawn(NoiseScheduleSpec(), do_edm_style_training=True)
    assert [np.array_equal(vars(plain)[name], vars(flagged)[name]) for name in vars(plain)] == [True] * 7


def test_with_the_flag_a_base_that_predicts_velocity_weighs_rows_by_the_signal():
    columns = drawn(VELOCITY, do_edm_style_training=True)
    assert columns.weight == EXACT(SCHEDULE.alphas_cumprod[columns.time.astype(int)])
    assert np.isfinite(drawn(replace(VELOCITY, rescale_betas_zero_snr=True), do_edm_style_training=True).weight).all()


def edm_factors(sigmas, data=0.5, sign=1):
    """c_skip and c_out of Karras et al., table 1."""
    return data**2 / (sigmas**2 + data**2), sign * sigmas * data / np.sqrt(sigmas**2 + data**2)


@pytest.mark.parametrize(("spec", "sign"), [(EDM, 1), (EDM_V, -1), (EdmSpec(sigma_data=1.0), 1)])
def test_errors_of_edms_answer_are_those_of_the_denoised_picture(spec, sign):
    """3 and 5: |D - x0|^2 = c_out^2 |F - F*|^2, and D (F*) = x0."""
    columns = edm_at(spec, SIGMAS)
    clean, noise, answer, read, target = answers(columns)
    skip, out = map(rows, edm_factors(SIGMAS, spec.sigma_data, sign))
    noisy = clean + rows(SIGMAS) * noise
    assert read == EXACT(noisy / np.sqrt(rows(SIGMAS) ** 2 + spec.sigma_data**2))
    # c_out F* is the difference of two numbers, of which at the most noise little is left.
    assert skip * noisy + out * target == pytest.approx(clean, rel=1e-9, abs=1e-12)
    of_clean = weighed_as_clean(columns, 1.0)
    expected = errors(skip * noisy + out * answer - clean)
    assert of_clean.weight * errors(answer - target) == pytest.approx(expected, rel=1e-9)
    assert of_clean.weight == EXACT(out[:, 0, 0, 0] ** 2)
    assert columns.weight * errors(answer - target) == pytest.approx(expected / out[:, 0, 0, 0] ** 2, rel=1e-9)
    assert columns.time == EXACT(np.log(SIGMAS) / 4)


def test_edms_target_has_variance_1_where_the_latents_have_their_deviation():
    """4, of 0.5 as of 1; and so has the input."""
    for data in (0.5, 1.0):
        columns = edm_at(EdmSpec(sigma_data=data), SIGMAS)
        assert (data * columns.out_x) ** 2 + columns.out_n**2 == EXACT(1)
        assert (data * columns.in_x) ** 2 + columns.in_n**2 == EXACT(1)


def test_without_an_answer_the_denoised_picture_is_a_share_of_the_noisy_one():
    """5, second half: with F = 0, D - x0 = c_skip noisy - x0, which is c_out times the target but for its sign."""
    columns = edm_at(EDM, SIGMAS)
    clean, noise, _, _, target = answers(columns)
    skip, out = map(rows, edm_factors(SIGMAS))
    assert -out * target == pytest.approx(skip * (clean + rows(SIGMAS) * noise) - clean, rel=1e-9, abs=1e-12)


def test_pictures_of_edm_start_from_noise_of_its_strength():
    """7: of sqrt(80^2 + 1)."""
    for name in ("edm_euler", "edm_dpm++_2m"):
        assert float(SCHEDULERS[name].create(EDM_SCHEDULER).init_noise_sigma) == pytest.approx(80.00625, rel=1e-6)


def test_the_exact_denoiser_of_a_point_ends_at_the_point():
    """8: what the columns ask for is what the sampler makes of it."""
    point, latents = normal(1, 4, 2, 3), Tensor(80 * normal(1, 4, 2, 3, seed=1))
    scheduler = SCHEDULERS["edm_euler"].create(EDM_SCHEDULER)
    scheduler.set_timesteps(2)
    for timestep in scheduler.timesteps:
        sigma = np.exp(4 * float(timestep))
        columns = edm_at(EDM, np.array([sigma]))
        read = scheduler.scale_model_input(latents, timestep).asnumpy()
        assert read == pytest.approx(columns.in_x[0] * latents.asnumpy(), rel=1e-4)
        noise = (latents.asnumpy() - point) / sigma
        latents = scheduler.step(Tensor(columns.target(point, noise)), timestep, latents)[0]
    assert latents.asnumpy() == pytest.approx(point, rel=1e-4, abs=1e-4)


# Against diffusers' own schedulers.


@pytest.mark.parametrize("spec", [EDM, EDM_V, EdmSpec(sigma_schedule="exponential"), EdmSpec(sigma_max=120.0, rho=5.0)])
def test_levels_and_factors_are_those_of_diffusers_scheduler(spec):
    scheduler = EDMEulerScheduler(**vars(spec))
    # Two are not drawn: the last of its levels, and the 0 behind it.
    sigmas = scheduler.sigmas.numpy()[:-2][::-1]
    assert spec.sigmas == pytest.approx(sigmas, rel=1e-6)  # float32
    columns = edm_at(spec, spec.sigmas)
    noisy, output = torch.tensor(normal(1000, 2)), torch.tensor(normal(1000, 2, seed=1))
    of_scheduler = torch.tensor(sigmas.copy())[:, None]
    # Per row: D of noisy latents and an answer, which is x0 where the answer is the target.
    expected = scheduler.precondition_outputs(noisy, output, of_scheduler)
    skip, out = edm_factors(spec.sigmas, spec.sigma_data, -1 if spec is EDM_V else 1)
    assert relative_error(skip[:, None] * noisy.numpy() + out[:, None] * output.numpy(), expected) < 1e-6
    assert 1 / columns.weight == pytest.approx(np.ones(1000))
    assert columns.in_x[:, None] * noisy.numpy() == pytest.approx(
        scheduler.precondition_inputs(noisy, of_scheduler).numpy(), rel=1e-5
    )
    assert columns.time == pytest.approx(scheduler.precondition_noise(of_scheduler)[:, 0].numpy(), rel=1e-5, abs=1e-6)


def test_published_values_of_the_grid():
    at = {0: 80, 100: 45.313736, 250: 17.527832, 500: 2.5152190, 750: 0.1697528}
    assert [EDM.sigmas[999 - index] for index in at] == pytest.approx([*at.values()], rel=1e-6)
    assert EDM.sigmas[0] == pytest.approx(0.00205015, abs=5e-9)  # as many digits as there are
    assert edm_at(EDM, EDM.sigmas[[999, 499, 0]]).time == pytest.approx([1.0955067, 0.2305899, -1.5474610], rel=1e-6)


def test_the_euler_branch_has_the_levels_of_diffusers_scheduler():
    sigmas = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").sigmas.numpy()
    ours = SCHEDULE.noise(np.arange(1000)) / SCHEDULE.signal(np.arange(1000))
    # diffusers multiplies in float32, see test_noise_schedule.
    assert ours[::-1] == pytest.approx(sigmas[:-1], rel=1e-4)


# Levels.


def test_karras_levels_are_drawn_evenly_and_lognormal_ones_by_the_paper():
    karras, lognormal = (np.exp(4 * drawn(EDM, edm_sampling=name).time) for name in ("karras", "lognormal"))
    assert np.isin(np.round(karras, 9), np.round(EDM.sigmas, 9)).all()
    # 1000 draws: quartiles of the facts, within three deviations of theirs.
    assert np.quantile(karras, [0.25, 0.5, 0.75]) == pytest.approx([0.170, 2.52, 17.5], rel=0.25)
    assert np.log(lognormal).mean() == pytest.approx(-1.2, abs=3 * 1.2 / 1000**0.5)
    assert np.log(lognormal).std() == pytest.approx(1.2, rel=0.07)
    assert len({*lognormal}) == 1000


@pytest.mark.parametrize(
    ("weighting", "of_f"), [("none", lambda sigma: edm_factors(sigma)[1] ** 2), ("edm", np.ones_like)]
)
def test_the_weight_of_edms_rows(weighting, of_f):
    columns = drawn(EDM, edm_weighting=weighting)
    assert columns.weight == EXACT(of_f(np.exp(4 * columns.time)))


def test_a_range_of_timesteps_holds_them_all_and_no_other():
    for spec in (NoiseScheduleSpec(), EDM):
        columns = drawn(spec, count=3000, min_timestep=10, max_timestep=14)
        levels = columns.time if spec is not EDM else np.searchsorted(EDM.sigmas, np.exp(4 * columns.time) * (1 - 1e-9))
        assert {*levels.astype(int)} == {10, 11, 12, 13}


SHARES = {
    ("earlier", 4.0): lambda t: t < 250,
    ("later", 4.0): lambda t: t >= 750,
    ("later", 0.5): lambda t: t >= 750,
    ("range", 4.0): lambda t: (t >= 200) & (t < 500),
}


@pytest.mark.parametrize(("strategy", "multiplier"), SHARES)
def test_a_bias_draws_these_timesteps_so_many_times_as_often(strategy, multiplier):
    """As diffusers' text-to-image script: weights of 1 and the multiplier, for torch.multinomial."""
    settings = {"timestep_bias_strategy": strategy, "timestep_bias_multiplier": multiplier}
    settings |= {"timestep_bias_begin": 200, "timestep_bias_end": 500} if strategy == "range" else {}
    times = drawn(NoiseScheduleSpec(), count=10000, **settings).time
    preferred = SHARES[strategy, multiplier](np.arange(1000))
    share = multiplier * preferred.sum() / (multiplier * preferred.sum() + (~preferred).sum())
    assert preferred[times.astype(int)].mean() == pytest.approx(share, abs=3 * 0.5 / 10000**0.5)
    within = drawn(NoiseScheduleSpec(), **settings, min_timestep=400, max_timestep=800).time
    assert 400 <= within.min() < 410
    assert 790 < within.max() < 800


# Weights.


def test_debiased_weights_are_those_of_kohyas_scripts():
    timesteps = np.arange(1000)
    snr = np.minimum(SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod), 1000)
    assert snr.max() == 1000
    assert debiased(epsilon_at(SCHEDULE, timesteps)).weight == EXACT(1 / np.sqrt(snr))
    assert debiased(velocity_at(SCHEDULE, timesteps)).weight == EXACT(1 / (snr + 1))
    assert debiased(velocity_at(ZERO_SNR, timesteps)).weight[-1] == 1
    plain, both = (
        drawn(NoiseScheduleSpec(), snr_gamma=5.0),
        drawn(NoiseScheduleSpec(), snr_gamma=5.0, debiased_estimation_loss=True),
    )
    assert both.weight == EXACT(plain.weight * debiased(replace(plain, weight=1 + 0 * plain.weight)).weight)


# Comparisons.


def test_c_of_huber_follows_kohyas_schedules():
    timesteps, c = np.array([0, 1, 250, 999]), 0.1
    columns = epsilon_at(SCHEDULE, timesteps)
    sigma = SCHEDULE.noise(timesteps) / SCHEDULE.signal(timesteps)
    found = {name: schedule(columns, c, 1000) for name, schedule in HUBER_SCHEDULES.items()}
    assert found["constant"].tolist() == [c] * 4
    assert found["exponential"] == EXACT(np.exp(timesteps * np.log(c) / 1000))
    assert found["snr"] == EXACT((1 - c) / (1 + sigma) ** 2 + c)
    assert HUBER_SCHEDULES["snr"](velocity_at(ZERO_SNR, np.array([999])), c, 1000) == c
    edm = edm_at(EDM, SIGMAS)
    assert HUBER_SCHEDULES["snr"](edm, c, 1000) == EXACT((1 - c) / (1 + SIGMAS) ** 2 + c)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_huber_and_smooth_l1_is_torchs(kind, masked, pynative):
    """The formulas of kohya's scripts, with their gradient."""
    columns = pseudo_huber(epsilon_at(SCHEDULE, np.array([5, 500, 990])), kind, np.array([0.9, 0.3, 0.1]))
    columns = replace(columns, weight=columns.weight * [0.5, 1, 2])
    batch = Batch.of(columns, normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1), {}, ["dog"] * 3)
    mask = np.random.default_rng(0).random((3, 4, 2, 5), np.float32)
    batch = replace(batch, extras={**({"mask": mask} if masked else {}), **batch.extras})
    answer = 3 * normal(3, 4, 2, 5, seed=2)
    target, weight, *extras = batch.tensors()[: 2 + len(batch.extras)]
    loss, found = WeightedError(tuple(batch.extras))(Tensor(answer), target, weight, *extras)

    difference = torch.tensor(answer) - torch.tensor(batch.target)
    c = torch.tensor([0.9, 0.3, 0.1]).view(-1, 1, 1, 1)
    huber = 2 * c * (torch.sqrt(difference**2 + c**2) - c)
    of_kind = huber if kind == "huber" else 2 * (torch.sqrt(difference**2 + c**2) - c)
    counted = torch.tensor(mask) if masked else 1.0
    expected = ((of_kind * counted).mean((1, 2, 3)) * torch.tensor([0.5, 1, 2])).sum()
    # Float32, of 40 terms.
    assert float(loss.asnumpy()) == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(found, (huber * counted).mean((1, 2, 3))) < 1e-6


def test_small_errors_of_huber_are_squared_and_not_lost_to_rounding(pynative):
    small = np.full((1, 1, 1, 1), 1e-4, np.float32)
    loss, _ = WeightedError(("huber_c",))(
        *map(Tensor, (small, 0 * small, np.ones(1, np.float32), np.ones(1, np.float32)))
    )
    assert float(loss.asnumpy()) == pytest.approx(1e-8, rel=1e-5)


# Noise.


def pyramid_of_torch(noise, rng, rounds, discount):
    """The same draws through torch's upsampling."""
    channels, height, width = noise.shape
    total = torch.tensor(noise, dtype=torch.float64)
    enlarge = torch.nn.Upsample(size=(height, width), mode="bilinear")
    for number in range(rounds):
        factor = (rng.random() * 2 + 2) ** number
        size = max(1, int(height / factor)), max(1, int(width / factor))
        total = total + enlarge(torch.tensor(rng.standard_normal((channels, *size)))[None])[0] * discount**number
        if 1 in size:
            break
    return (total / total.std()).numpy()


@pytest.mark.parametrize("shape", [(4, 8, 12), (4, 24, 16)])
def test_multi_resolution_noise_is_that_of_torch_and_has_deviation_1(shape):
    noise = normal(*shape)
    for rounds, discount in ((1, 0.3), (6, 0.4), (10, 0.8)):
        found = pyramid_noise(noise, np.random.default_rng(1), rounds, discount)
        assert found.dtype == np.float32
        assert found.std(ddof=1) == pytest.approx(1, rel=1e-5)
        assert relative_error(found, pyramid_of_torch(noise, np.random.default_rng(1), rounds, discount)) < 1e-6
    assert pyramid_noise(noise, np.random.default_rng(1), 0, 0.3) is noise


def test_perturbed_noise_is_read_and_the_noise_stays_the_target():
    columns, clean = epsilon_at(SCHEDULE, np.array([10, 900])), normal(2, 4, 2, 3)
    noise = normal(2, 4, 2, 3, seed=1)
    more = np.stack([perturbed(own, np.random.default_rng(row), 0.1) for row, own in enumerate(noise)])
    drawn_again = np.stack([np.random.default_rng(row).standard_normal((4, 2, 3), np.float32) for row in range(2)])
    assert more == pytest.approx(noise + 0.1 * drawn_again, rel=1e-5, abs=1e-6)
    batch = Batch.of(columns, clean, noise, {}, ["dog"] * 2, more)
    assert np.array_equal(batch.target, noise)
    assert batch.inputs["sample"] == pytest.approx(
        columns.network_input(clean, noise + 0.1 * drawn_again), rel=1e-5, abs=1e-6
    )
    assert perturbed(noise, np.random.default_rng(0), 0.0) is noise


@pytest.mark.parametrize("settings", [{"loss_type": "huber"}, {"edm_sampling": "lognormal", "edm_weighting": "edm"}])
def test_rows_are_the_same_however_they_are_cut(settings):
    """One batch of four rows, or four of one, as processes and accumulation have them."""

    def made(batch_size, batches):
        spec = EDM if "edm_sampling" in settings else NoiseScheduleSpec()
        make = batches_of(
            plan_of(batch_size, prior=False, batches_per_step=batches),
            draw_columns(spec, LossConfig(**settings)),
            posterior=lambda i: normal(2, 4, 8, 12, seed=i),
            text=lambda i: (normal(7, 24, seed=i),),
        )
        more = {"multires_noise_iterations": 6, "multires_noise_discount": 0.4, "ip_noise_gamma": 0.2}
        make = replace(make, loss=LossConfig(noise_offset=0.1, **more))
        rows_of = [make(number) for number in range(batches)]
        per_row = [(one.target, one.weight, *one.inputs.values(), *one.extras.values()) for one in rows_of]
        return [np.concatenate(values) for values in zip(*per_row, strict=True)]

    whole, cut = made(4, 1), made(1, 4)
    assert len(whole) == 5 + ("loss_type" in settings)
    assert all(np.array_equal(one, other) for one, other in zip(whole, cut, strict=True))
    assert len({one.tobytes() for one in whole[0]}) == 4


# How a model is denoised.

SD, PLAYGROUND = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}, dict(EDM_SCHEDULER)
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def test_a_schedule_with_zero_terminal_snr_is_of_a_class_that_knows_it():
    schedule = Schedule(Path("base"), SD).changed(ZERO)
    assert schedule.trained() == NoiseScheduleSpec(beta_start=1e-4, beta_end=0.02, **ZERO)
    assert schedule.config["_class_name"] == "DDIMScheduler"
    assert schedule.config["timestep_spacing"] == "trailing"
    assert (
        Schedule(Path("base"), SD).changed(ZERO | {"timestep_spacing": "linspace"}).config["timestep_spacing"]
        == "linspace"
    )
    assert Schedule(Path("base"), SD).trained(LossConfig(**ZERO)) == schedule.trained()


def test_an_adapter_says_how_it_was_trained_and_flags_count_more():
    own, path = Schedule(Path("base"), SD), Path("dog")
    marks = own.changed(ZERO).marks
    assert own.marks == {}
    changes, notes = own.as_marked(marks, path)
    assert changes == ZERO
    assert notes[0] == "dog: was trained with prediction_type v_prediction, and is sampled so"
    changes, _ = own.changed({"prediction_type": "v_prediction"}).as_marked(marks, path)
    assert changes == {"rescale_betas_zero_snr": True}
    assert own.as_marked({"dreambooth_ms.schedule.beta_end": "0.5", "other": "x"}, path) == ({}, [])
    said = ["dog: was trained with variance_type fixed_small, and is sampled so"]
    of_if = Schedule(Path("base"), SD | {"variance_type": "learned_range"})
    assert of_if.as_marked({}, path) == ({"variance_type": "fixed_small"}, said)


def test_adapters_of_edm_and_of_ddpm_are_told_apart():
    edm, path = Schedule(Path("playground"), PLAYGROUND), Path("dog")
    assert edm.as_marked(edm.marks, path) == ({}, [])
    assert edm.as_marked({}, path)[1] == [
        "dog: does not say that its base was trained in EDM's formulation; SDXL's give noise"
    ]
    with pytest.raises(WeightError, match=r"dog: was trained in EDM's formulation, and base was not; use the base"):
        Schedule(Path("base"), SD).as_marked(edm.marks, path)
    assert edm.changed({"prediction_type": "v_prediction"}).trained() == EDM_V
    with pytest.raises(ConfigError, match=r"--timestep_spacing: playground was trained in EDM's formulation; leave it"):
        edm.changed({"timestep_spacing": "trailing"})

"""The forward process and the network's targets are diffusers', and both kinds of target mean the same latents."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from mindspore import Tensor

from dreambooth_ms.config.train import LossConfig
from dreambooth_ms.diffusion import (
    OBJECTIVES,
    NoiseSchedule,
    NoiseScheduleSpec,
    draw_columns,
    epsilon_at,
    min_snr,
    velocity_at,
)
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.randomness import generator
from dreambooth_ms.training.step import WeightedError
from tests.parity.reference import normal, relative_error

SPECS = {
    "stable diffusion": NoiseScheduleSpec(),
    "linear": NoiseScheduleSpec(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    "cosine": NoiseScheduleSpec(beta_schedule="squaredcos_cap_v2"),
    "short": NoiseScheduleSpec(num_train_timesteps=50),
    "trained betas": NoiseScheduleSpec(trained_betas=tuple(0.001 + 1e-5 * number for number in range(1000))),
}
ZERO_SNR = NoiseScheduleSpec(rescale_betas_zero_snr=True, prediction_type="v_prediction")
TIMESTEPS = np.array([0, 1, 500, 999])


def diffusers_scheduler(spec):
    return DDPMScheduler(
        num_train_timesteps=spec.num_train_timesteps,
        beta_start=spec.beta_start,
        beta_end=spec.beta_end,
        beta_schedule=spec.beta_schedule,
        trained_betas=spec.trained_betas,
        rescale_betas_zero_snr=spec.rescale_betas_zero_snr,
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_schedule_is_diffusers(spec):
    ours = NoiseSchedule.from_spec(spec)
    expected = diffusers_scheduler(spec).alphas_cumprod.numpy()
    assert len(ours.alphas_cumprod) == spec.num_train_timesteps == len(expected)
    # diffusers multiplies in float32: up to a thousand roundings of 6e-8, of random sign; measured 8e-6.
    assert np.abs(ours.alphas_cumprod / expected - 1).max() < 3e-5


def test_zero_terminal_snr_is_diffusers():
    ours, expected = NoiseSchedule.from_spec(ZERO_SNR), diffusers_scheduler(ZERO_SNR).alphas_cumprod.numpy()
    assert ours.alphas_cumprod[-1] == expected[-1] == 0
    assert ours.alphas_cumprod[0] == pytest.approx(NoiseSchedule.from_spec(NoiseScheduleSpec()).alphas_cumprod[0])
    # The rounding of diffusers' roots, as above, is that of the differences from the last.
    assert np.abs(np.sqrt(ours.alphas_cumprod) - np.sqrt(expected)).max() < 1e-5


@pytest.mark.parametrize("spec", [*SPECS.values(), ZERO_SNR], ids=[*SPECS, "zero snr"])
def test_the_betas_of_a_schedule_make_it_again(spec):
    schedule = NoiseSchedule.from_spec(spec)
    assert np.cumprod(1 - schedule.betas()) == pytest.approx(schedule.alphas_cumprod, rel=1e-9, abs=1e-15)
    assert np.cumprod(1 - schedule.betas(2**-24))[-1] == pytest.approx(max(schedule.alphas_cumprod[-1], 2**-24))


@pytest.mark.parametrize(
    "changes",
    [
        {"trained_betas": (0.1, 0.2)},
        {"trained_betas": (0.1,) * 999 + (1.5,)},
        {"trained_betas": (0.1,) * 998 + (1.0, 1.0)},
        {"trained_betas": (0.0,) + (0.1,) * 999},
        {"trained_betas": (float("nan"),) * 1000},
        {"beta_start": -0.1},
        {"beta_end": 2.0},
        {"num_train_timesteps": 1},
    ],
)
def test_betas_that_are_none_are_refused(changes):
    with pytest.raises(ConfigError, match=r"betas: expected one above 0 and below 1 for each of \d+ timesteps"):
        NoiseSchedule.from_spec(NoiseScheduleSpec(**changes))


@pytest.mark.parametrize("more", [{"rescale_betas_zero_snr": True}, {"trained_betas": (0.1,) * 999 + (1.0,)}])
def test_noise_is_not_predicted_where_there_is_nothing_else(more):
    with pytest.raises(
        ConfigError, match=r"prediction_type epsilon with zero terminal SNR .*--prediction_type v_prediction"
    ):
        NoiseSchedule.from_spec(NoiseScheduleSpec(**more))


def test_min_snr_does_not_divide_by_a_signal_of_zero():
    """min(SNR, gamma) / (SNR + 1), as diffusers' script has it: nothing is weighed where there is only noise."""
    weight = min_snr(velocity_at(NoiseSchedule.from_spec(ZERO_SNR), np.arange(1000)), 5.0).weight
    assert weight[-1] == 0
    assert np.isfinite(weight).all()


def test_signal_and_noise_keep_the_variance():
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec())
    timesteps = np.arange(1000)
    signal, noise = schedule.signal(timesteps), schedule.noise(timesteps)
    assert signal.dtype == noise.dtype == np.float64
    assert np.abs(signal**2 + noise**2 - 1).max() < 1e-15  # float64 rounding
    assert (np.diff(signal) < 0).all()
    assert (np.diff(noise) > 0).all()
    assert 0.99 < signal[0] < 1
    assert 0 < signal[-1] < 0.1


def test_an_unknown_schedule_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"sigmoid.*scaled_linear, linear or squaredcos_cap_v2"):
        NoiseSchedule.from_spec(NoiseScheduleSpec(beta_schedule="sigmoid"))


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("columns_at", [epsilon_at, velocity_at])
def test_min_snr_weights_are_those_of_diffusers_ratios(columns_at, gamma):
    spec, timesteps = NoiseScheduleSpec(), np.arange(1000)
    snr = compute_snr(diffusers_scheduler(spec), torch.tensor(timesteps)).numpy().astype(np.float64)
    expected = np.minimum(snr, gamma) / (snr if columns_at is epsilon_at else snr + 1)
    weights = min_snr(columns_at(NoiseSchedule.from_spec(spec), timesteps), gamma).weight
    # diffusers' alphas, as above; at the first timestep 1 - alpha has lost three digits. Measured 2.6e-5.
    assert np.abs(weights / expected - 1).max() < 1e-4
    assert (weights <= 1).all()
    assert {(snr > gamma).any(), (snr < gamma).any()} == {True}


def test_min_snr_weighs_the_same_error_of_the_clean_latents_for_both_kinds():
    """An error d of the latents is one of d signal / sigma of the noise, and of d / sigma of the velocity."""
    schedule, timesteps = NoiseSchedule.from_spec(NoiseScheduleSpec()), np.arange(1000)
    signal, sigma = schedule.signal(timesteps), schedule.noise(timesteps)
    of_noise = min_snr(epsilon_at(schedule, timesteps), 5.0).weight * (signal / sigma) ** 2
    of_velocity = min_snr(velocity_at(schedule, timesteps), 5.0).weight / sigma**2
    assert of_noise == pytest.approx(np.minimum((signal / sigma) ** 2, 5.0), rel=1e-12)  # float64 rounding
    assert of_velocity == pytest.approx(of_noise, rel=1e-12)


def test_min_snr_multiplies_the_weights_that_there_are_and_knows_clean_latents_as_a_target():
    """The error of the clean latents themselves weighs min(SNR, gamma)."""
    schedule, timesteps = NoiseSchedule.from_spec(NoiseScheduleSpec()), np.arange(1000)
    columns = epsilon_at(schedule, timesteps)
    clean = replace(columns, out_x=columns.out_n, out_n=columns.out_x, weight=3 * columns.weight)
    snr = (columns.in_x / columns.in_n) ** 2
    assert min_snr(clean, 5.0).weight == pytest.approx(3 * np.minimum(snr, 5.0), rel=1e-12)  # float64 rounding


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_row_draws_its_timestep_from_its_own_generator(name):
    spec = NoiseScheduleSpec(prediction_type=name)
    generators = lambda: [generator(7, "timestep", row) for row in range(50)]  # noqa: E731
    plain, weighted = (draw_columns(spec, LossConfig(snr_gamma=gamma))(generators()) for gamma in (None, 5.0))
    assert plain.time.tolist() == [int(rng.integers(1000)) for rng in generators()]
    assert weighted.time.tolist() == plain.time.tolist()
    assert (plain.weight == 1).all()
    assert (weighted.weight < 1).any()
    assert all(
        column.shape == (50,) and column.dtype == np.float64 for column in vars(weighted).values() if column is not None
    )


@pytest.fixture
def rows():
    """Latents and noise, with the columns of both kinds of target at one timestep per row."""
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec())
    clean_and_noise = normal(4, 4, 3, 5), normal(4, 4, 3, 5, seed=1)
    return clean_and_noise, epsilon_at(schedule, TIMESTEPS), velocity_at(schedule, TIMESTEPS)


def test_noisy_latents_and_velocity_are_diffusers(rows):
    scheduler = diffusers_scheduler(NoiseScheduleSpec())
    clean_and_noise, of_noise, of_velocity = rows
    latents, noise = map(torch.tensor, clean_and_noise)
    timesteps = torch.tensor(TIMESTEPS)
    noisy = of_noise.network_input(*clean_and_noise)
    assert noisy.dtype == np.float32
    assert np.array_equal(of_velocity.network_input(*clean_and_noise), noisy)
    # The factors differ as above, by half of it.
    assert relative_error(noisy, scheduler.add_noise(latents, noise, timesteps)) < 1e-5
    velocity = of_velocity.target(*clean_and_noise)
    assert relative_error(velocity, scheduler.get_velocity(latents, noise, timesteps)) < 1e-5


def test_predicting_noise_means_the_noise_itself(rows):
    clean_and_noise, of_noise, _ = rows
    assert np.array_equal(of_noise.target(*clean_and_noise), clean_and_noise[1])


def test_both_predictions_lead_back_to_the_same_latents(rows):
    clean_and_noise, of_noise, of_velocity = rows
    signal, sigma = (column.reshape(-1, 1, 1, 1) for column in (of_noise.in_x, of_noise.in_n))
    noisy = of_noise.network_input(*clean_and_noise)
    from_noise = (noisy - sigma * of_noise.target(*clean_and_noise)) / signal
    from_velocity = signal * noisy - sigma * of_velocity.target(*clean_and_noise)
    # Rounding of float32; the division by the signal enlarges it up to fifteen times.
    assert relative_error(from_noise, clean_and_noise[0]) < 5e-6
    assert relative_error(from_velocity, clean_and_noise[0]) < 1e-6


def test_the_error_is_a_mean_over_each_row(pynative):
    prediction, target = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1)
    target[1] = prediction[1]
    weight = np.array([0.5, 1, 2], np.float32)
    loss, errors = WeightedError()(*map(Tensor, (prediction, target, weight)))
    assert errors.shape == (3,)
    assert errors.asnumpy()[1] == 0
    expected = ((prediction - target) ** 2).mean((1, 2, 3))
    assert relative_error(errors, expected) < 1e-6  # rounding of 40 terms
    assert float(loss.asnumpy()) == pytest.approx((weight * expected).sum(), rel=1e-6)


def test_with_a_mask_the_error_is_a_weighted_mean_over_each_row(pynative):
    prediction, target, weight = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1), np.ones(3, np.float32)
    mask = np.broadcast_to(np.random.default_rng(0).random((3, 1, 2, 5), np.float32), target.shape)
    expected = (mask * (prediction - target) ** 2).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    of_mean_1 = mask / mask.mean((1, 2, 3), keepdims=True)
    loss, errors = WeightedError(("mask",))(*map(Tensor, (prediction, target, weight, of_mean_1)))
    assert relative_error(errors, expected) < 1e-6  # rounding of 40 terms
    assert float(loss.asnumpy()) == pytest.approx(expected.sum(), rel=1e-6)

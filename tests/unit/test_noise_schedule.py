"""The forward process and the network's targets are diffusers', and both kinds of target mean the same latents."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from mindspore import Tensor

from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, NoiseScheduleSpec, PredictionType
from dreambooth_ms.diffusion.objective import diffusion_target, mean_squared_error, noisy_latents, per_row
from dreambooth_ms.errors import ConfigError
from tests.parity.reference import normal, relative_error

SPECS = {
    "stable diffusion": NoiseScheduleSpec(),
    "linear": NoiseScheduleSpec(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    "short": NoiseScheduleSpec(num_train_timesteps=50),
}
TIMESTEPS = np.array([0, 1, 500, 999])


def diffusers_scheduler(spec):
    return DDPMScheduler(
        num_train_timesteps=spec.num_train_timesteps,
        beta_start=spec.beta_start,
        beta_end=spec.beta_end,
        beta_schedule=spec.beta_schedule,
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_schedule_is_diffusers(spec):
    ours = NoiseSchedule.from_spec(spec)
    expected = diffusers_scheduler(spec).alphas_cumprod.numpy()
    assert ours.num_train_timesteps == spec.num_train_timesteps == len(expected)
    # diffusers multiplies in float32: up to a thousand roundings of 6e-8, of random sign; measured 8e-6.
    assert np.abs(ours.alphas_cumprod / expected - 1).max() < 3e-5


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
    with pytest.raises(ConfigError, match=r"squaredcos_cap_v2.*scaled_linear"):
        NoiseSchedule.from_spec(NoiseScheduleSpec(beta_schedule="squaredcos_cap_v2"))


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("kind", PredictionType)
def test_min_snr_weights_are_those_of_diffusers_ratios(kind, gamma):
    spec, timesteps = NoiseScheduleSpec(), np.arange(1000)
    snr = compute_snr(diffusers_scheduler(spec), torch.tensor(timesteps)).numpy().astype(np.float64)
    expected = np.minimum(snr, gamma) / (snr if kind is PredictionType.EPSILON else snr + 1)
    weights = NoiseSchedule.from_spec(spec).min_snr_weights(timesteps, gamma, kind)
    # diffusers' alphas, as above; at the first timestep 1 - alpha has lost three digits. Measured 2.6e-5.
    assert np.abs(weights / expected - 1).max() < 1e-4
    assert (weights <= 1).all()
    assert {(snr > gamma).any(), (snr < gamma).any()} == {True}


def test_min_snr_weighs_the_same_error_of_the_clean_latents_for_both_kinds():
    """An error d of the latents is one of d signal / sigma of the noise, and of d / sigma of the velocity."""
    schedule, timesteps = NoiseSchedule.from_spec(NoiseScheduleSpec()), np.arange(1000)
    signal, sigma = schedule.signal(timesteps), schedule.noise(timesteps)
    of_noise = schedule.min_snr_weights(timesteps, 5.0, PredictionType.EPSILON) * (signal / sigma) ** 2
    of_velocity = schedule.min_snr_weights(timesteps, 5.0, PredictionType.V_PREDICTION) / sigma**2
    assert of_noise == pytest.approx(np.minimum((signal / sigma) ** 2, 5.0), rel=1e-12)  # float64 rounding
    assert of_velocity == pytest.approx(of_noise, rel=1e-12)


@pytest.fixture
def rows(pynative):
    """Latents, noise, and both factors at every element, one timestep per row."""
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec())
    latents, noise = normal(4, 4, 3, 5), normal(4, 4, 3, 5, seed=1)
    factors = (
        per_row(Tensor(factor(TIMESTEPS).astype(np.float32)), latents.shape)
        for factor in (schedule.signal, schedule.noise)
    )
    return Tensor(latents), Tensor(noise), *factors


def test_noisy_latents_and_velocity_are_diffusers(rows):
    scheduler = diffusers_scheduler(NoiseScheduleSpec())
    latents, noise = (torch.tensor(values.asnumpy()) for values in rows[:2])
    timesteps = torch.tensor(TIMESTEPS)
    velocity = diffusion_target(PredictionType.V_PREDICTION, *rows)
    # The factors differ as above, by half of it.
    assert relative_error(noisy_latents(*rows), scheduler.add_noise(latents, noise, timesteps)) < 1e-5
    assert relative_error(velocity, scheduler.get_velocity(latents, noise, timesteps)) < 1e-5


def test_predicting_noise_means_the_noise_itself(rows):
    assert np.array_equal(diffusion_target(PredictionType.EPSILON, *rows).asnumpy(), rows[1].asnumpy())


def test_both_predictions_lead_back_to_the_same_latents(rows):
    latents, _, signal, sigma = (values.asnumpy().astype(np.float64) for values in rows)
    noisy = noisy_latents(*rows).asnumpy()
    from_noise = (noisy - sigma * diffusion_target(PredictionType.EPSILON, *rows).asnumpy()) / signal
    from_velocity = signal * noisy - sigma * diffusion_target(PredictionType.V_PREDICTION, *rows).asnumpy()
    # Rounding of float32; the division by the signal enlarges it up to fifteen times.
    assert relative_error(from_noise, latents) < 5e-6
    assert relative_error(from_velocity, latents) < 1e-6


def test_the_error_is_a_mean_over_each_row(pynative):
    prediction, target = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1)
    target[1] = prediction[1]
    errors = mean_squared_error(Tensor(prediction), Tensor(target))
    assert errors.shape == (3,)
    assert errors.asnumpy()[1] == 0
    assert relative_error(errors, ((prediction - target) ** 2).mean((1, 2, 3))) < 1e-6  # rounding of 40 terms

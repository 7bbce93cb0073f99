"""Every scheduler of ours goes the way of diffusers', and whole pictures are those of diffusers' pipeline."""

import inspect
import sys
from dataclasses import replace
from itertools import count

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from mindspore import Tensor

from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.sampling.model import Rows, SamplingModel
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.sampling.schedulers import SCHEDULERS, RowNoise, Trajectory, check_scheduler
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import normal, relative_error
from tests.tiny_model import write_random_model

STEPS = 10

# What `scheduler_config.json` of the published models says; the names beyond the first class's own are passed over.
PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

# Diffusers' classes by our names, as its documentation has them, and the tolerance. Both libraries hold their tables in
# float32 (measured up to 9e-7); the DPM++ solvers take differences of their logarithms (measured 1e-5).
SINGLESTEP_SDE = {"algorithm_type": "sde-dpmsolver++"}
REFERENCES = {
    "ddim": ("DDIMScheduler", {}, 1e-5),
    "ddpm": ("DDPMScheduler", {}, 1e-5),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, 1e-5),
    "lms": ("LMSDiscreteScheduler", {}, 1e-5),
    "euler": ("EulerDiscreteScheduler", {}, 1e-5),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, 1e-5),
    "heun": ("HeunDiscreteScheduler", {}, 1e-5),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}, 1e-4),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 1e-4),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {}, 1e-4),
    "dpm++_sde": ("DPMSolverSinglestepScheduler", SINGLESTEP_SDE, 1e-4),
    "unipc": ("UniPCMultistepScheduler", {}, 1e-5),
    "deis": ("DEISMultistepScheduler", {}, 1e-5),
    "lcm": ("LCMScheduler", {}, 1e-5),
    "edm_euler": ("EDMEulerScheduler", {}, 1e-5),
    "edm_dpm++_2m": ("EDMDPMSolverMultistepScheduler", {}, 1e-4),
}
STOCHASTIC = {"ddpm", "euler_a", "dpm++_sde", "lcm"}
SEED = 5


def request(scheduler, steps, seed=SEED, **more):
    return SampleRequest(prompts=("",), scheduler=scheduler, num_inference_steps=steps, seed=seed, **more)


def test_every_scheduler_is_compared():
    assert REFERENCES.keys() == SCHEDULERS.keys()
    assert {name for name, kind in SCHEDULERS.items() if kind.draws_noise} == STOCHASTIC


def config_for(name, config=PUBLISHED):
    """What a model says that this scheduler is for: those of EDM's formulation are refused with others."""
    return {**config, "_class_name": REFERENCES[name][0]} if SCHEDULERS[name].edm else dict(config)


def reference_scheduler(name, config, monkeypatch, seed=SEED):
    """Diffusers' scheduler; the noise that its steps draw is ours, for rows 0, 1, 2 …"""
    class_name, options, _ = REFERENCES[name]
    scheduler = getattr(diffusers, class_name).from_config(config, **options)
    index, take = count(getattr(scheduler, "begin_index", None) or 0), scheduler.step

    def step(*arguments, **keywords):
        number = next(index)

        def draw(shape, **_):
            return torch.tensor(RowNoise(seed, number, range(shape[0])).standard_normal(shape))

        if name in STOCHASTIC:
            monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw)
        return take(*arguments, **keywords)

    monkeypatch.setattr(scheduler, "step", step)
    return scheduler


def largest_error(name, config, reference, steps):
    """Of the latents after each step, with a model that is a formula: a tenth of its input and a constant field.

    Timesteps that are looked up for a noise level are cut to whole ones by some schedulers, in both libraries: where a
    level is a timestep's own, the last bit of its logarithm decides between that and the one below.
    """
    start, field = normal(2, 4, 6, 8), 0.1 * normal(2, 4, 6, 8, seed=1)
    reference.set_timesteps(steps)
    expected, expected_states = torch.tensor(start) * reference.init_noise_sigma, []
    for timestep in reference.timesteps:
        prediction = 0.1 * reference.scale_model_input(expected, timestep) + torch.tensor(field)
        expected = reference.step(prediction, timestep, expected).prev_sample
        expected_states.append(expected.numpy())
    assert np.isfinite(expected_states[-1]).all()

    trajectory = Trajectory(request(name, steps), config, [0, 1])
    timesteps = [float(timestep) for timestep in trajectory.timesteps]
    looked_up = any(config.get(key) for key in ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"))
    expected_timesteps = [float(timestep) for timestep in reference.timesteps]
    assert timesteps == pytest.approx(expected_timesteps, rel=1e-5, abs=1 if looked_up else 1e-5)
    latents, errors = trajectory.begin(start, None), []
    for index, state in enumerate(expected_states):
        prediction = trajectory.inputs(latents, trajectory.timesteps[index]) * 0.1 + Tensor(field)
        latents = trajectory.step(index, prediction, latents)
        errors.append(relative_error(latents, state))
    return max(errors)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", REFERENCES)
def test_ten_steps_are_diffusers(name, prediction_type, monkeypatch):
    config = config_for(name) | {"prediction_type": prediction_type}
    error = largest_error(name, config, reference_scheduler(name, config, monkeypatch), STEPS)
    print(f"{name}, {prediction_type}: {error:.1e}")
    assert error < REFERENCES[name][2]


TRAINED_BETAS = [0.001 + 1e-5 * number for number in range(1000)]
SPACED = {spacing: {"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")}
SIGMAS = {f"{kind} sigmas": {f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")}
SETTINGS = {
    **SPACED,
    **SIGMAS,
    "trained betas": {"trained_betas": TRAINED_BETAS},
    "linear betas": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"},
    "cosine, to the last timestep": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    "no offset": {"steps_offset": 0},
    "alpha to one": {"set_alpha_to_one": True},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.5},
    "thresholds": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    "last sigma": {"final_sigmas_type": "sigma_min"},
    "range of sigmas": {"sigma_min": 0.1, "sigma_max": 5.0, "use_karras_sigmas": True},
    "logarithmic": {"interpolation_type": "log_linear"},
    "large variance": {"variance_type": "fixed_large"},
    "logarithm of the variance": {"variance_type": "fixed_small_log"},
    "third order": {"solver_order": 3},
    "Heun": {"solver_type": "heun"},
    # With a last sigma of 0 diffusers' UniPC gives NaN for these.
    "B(h) = h": {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "B(h) = h, third order": {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    "noise": {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    "noise, third order": {"predict_x0": False, "solver_order": 3, "final_sigmas_type": "sigma_min"},
    "not corrected": {"disable_corrector": [0, 2]},
    "Euler at the end": {"euler_at_final": True},
    "Lu": {"use_lu_lambdas": True},
    "left at its default": {"clip_sample": True, "_use_default_values": ["clip_sample", "timestep_spacing"]},
    "exponential, EDM": {"sigma_schedule": "exponential"},
    "range of sigmas, EDM": {"sigma_min": 0.01, "sigma_max": 20.0, "rho": 5.0},
}
NAMED = {
    "dpm++_2m": ("solver_order",),
    "dpm++_2m_karras": ("solver_order", "use_exponential_sigmas", "use_beta_sigmas"),
}
"""What a name says itself, whatever the configuration does."""
NAMED |= {"dpm++_2s": ("solver_order",)}


def knows(name, settings):
    """Whether diffusers' class has any of these settings, and the name leaves them open."""
    known = inspect.signature(getattr(diffusers, REFERENCES[name][0]).__init__).parameters
    if ("rho" in settings or "sigma_schedule" in settings) and not SCHEDULERS[name].edm:
        return False
    return any(key in known for key in settings) and not any(key in NAMED.get(name, ()) for key in settings)


@pytest.mark.parametrize(
    ("name", "said"), [(name, said) for name in REFERENCES for said in SETTINGS if knows(name, SETTINGS[said])]
)
def test_a_setting_of_the_model_is_followed_as_in_diffusers(name, said, monkeypatch):
    config = config_for(name) | SETTINGS[said]
    error = largest_error(name, config, reference_scheduler(name, config, monkeypatch), 5)
    print(f"{name}, {said}: {error:.1e}")
    assert error < REFERENCES[name][2]


def zero_snr_betas(least):
    """Algorithm 1 of Lin et al. (2024) on Stable Diffusion's betas, written again; alpha-bar ends at `least`."""
    roots = np.cumprod(np.sqrt(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    products = np.square((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1])))
    products[-1] = least
    return (1 - products / np.concatenate([[1], products[:-1]])).tolist()


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("name", [name for name in REFERENCES if not SCHEDULERS[name].edm])
def test_zero_terminal_snr_is_followed_by_every_scheduler(name, spacing, monkeypatch):
    """Also by those that diffusers did not teach it: they begin at its least alpha-bar, as its others do."""
    asked = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": spacing}
    config, told = PUBLISHED | asked, PUBLISHED | asked
    if "rescale_betas_zero_snr" not in inspect.signature(getattr(diffusers, REFERENCES[name][0]).__init__).parameters:
        told |= {"trained_betas": zero_snr_betas(2**-24), "rescale_betas_zero_snr": False}
    reference = reference_scheduler(name, told, monkeypatch)
    trajectory = Trajectory(request(name, 5), config, [0])
    products = trajectory._scheduler.alphas_cumprod.asnumpy()
    assert products[-1] == pytest.approx(float(reference.alphas_cumprod[-1]), rel=1e-4, abs=1e-12)
    error = largest_error(name, config, reference, 5)
    print(f"{name}, {spacing}: {error:.1e}")
    # From 2^-24 steps begin at 2^12 times the latents, of which a few float32 roundings stay. Measured 2.2e-3 (heun).
    rounding = 10 * 2**12 * 2**-24 if spacing == "trailing" and SCHEDULERS[name].least else 0
    assert error < max(REFERENCES[name][2], rounding)


@pytest.mark.parametrize("name", [name for name in REFERENCES if not SCHEDULERS[name].edm])
def test_a_picture_may_be_noised_to_where_nothing_of_it_is_left(name):
    config = PUBLISHED | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    trajectory = Trajectory(
        request(name, 5, strength=1.0), config | {"timestep_spacing": "trailing"}, [0], from_picture=True
    )
    begun = trajectory.begin(normal(1, 4, 6, 8), normal(1, 4, 6, 8, seed=1)).asnumpy()
    assert np.isfinite(begun).all()


@pytest.mark.parametrize(
    ("name", "said", "reason"),
    [
        ("ddim", {"num_train_timesteps": 4, "beta_end": 0.5}, "cannot be larger than"),
        ("edm_euler", {}, "is for models trained in EDM's formulation, and this one is not"),
        ("ddim", {"_class_name": "EDMEulerScheduler"}, "use edm_dpm"),
    ],
)
def test_what_a_scheduler_cannot_do_is_told_before_the_work(name, said, reason):
    with pytest.raises(ConfigError, match=rf"--scheduler {name}.*{reason}"):
        check_scheduler(name, PUBLISHED | said, 5)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_picture_is_noised_to_the_step_it_starts_from_as_in_diffusers(name):
    """By half the steps, as `strength` 0.5 asks for."""
    reference = getattr(diffusers, REFERENCES[name][0]).from_config(PUBLISHED, **REFERENCES[name][1])
    reference.set_timesteps(STEPS)
    first = STEPS // 2 * reference.order
    timesteps = reference.timesteps[first:]
    if hasattr(reference, "set_begin_index"):
        reference.set_begin_index(first)
    picture, noise = normal(2, 4, 6, 8), normal(2, 4, 6, 8, seed=1)
    expected = reference.add_noise(torch.tensor(picture), torch.tensor(noise), timesteps[:1].repeat(2))
    trajectory = Trajectory(request(name, STEPS, strength=0.5), config_for(name), [0, 1], from_picture=True)
    assert len(trajectory.timesteps) == len(timesteps)
    assert float(trajectory.timesteps[0]) == pytest.approx(float(timesteps[0]), rel=1e-5)
    assert relative_error(trajectory.begin(noise, picture), expected) < 1e-5


@pytest.mark.parametrize("name", REFERENCES)
def test_a_second_trajectory_is_not_disturbed_by_the_first(name):
    """Some schedulers keep the last predictions, so each batch has one of its own."""

    def last(start):
        trajectory = Trajectory(request(name, 4), config_for(name), [0])
        latents = trajectory.begin(start, None)
        for index, timestep in enumerate(trajectory.timesteps):
            prediction = trajectory.inputs(latents, timestep) * 0.1
            latents = trajectory.step(index, prediction, latents)
        return latents.asnumpy()

    first = last(normal(1, 4, 4, 4))
    assert not np.array_equal(last(normal(1, 4, 4, 4, seed=1)), first)
    assert np.array_equal(last(normal(1, 4, 4, 4)), first)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_the_noise_of_a_row_does_not_depend_on_its_batch(name):
    start = normal(3, 4, 4, 4)

    def drawn(rows, seed=SEED):
        trajectory = Trajectory(request(name, 3, seed=seed), PUBLISHED, rows)
        latents = trajectory.begin(start[rows], None)
        for index, timestep in enumerate(trajectory.timesteps):
            latents = trajectory.step(index, trajectory.inputs(latents, timestep) * 0.1, latents)
        return latents.asnumpy()

    all_rows = drawn([0, 1, 2])
    assert np.array_equal(drawn([2, 1]), all_rows[[2, 1]])
    assert not np.array_equal(drawn([0], seed=SEED + 1)[0], all_rows[0])


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.mark.parametrize("said", [{}, ZERO_SNR, {"clip_sample": True, "clip_sample_range": 0.5}])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_adds_noise_as_diffusers_does_with_eta(eta, said, monkeypatch):
    """The noise is ours, handed to diffusers' step as its own."""
    config, start, field = PUBLISHED | said, normal(2, 4, 6, 8), 0.1 * normal(2, 4, 6, 8, seed=1)
    reference = diffusers.DDIMScheduler.from_config(config)
    reference.set_timesteps(STEPS)
    trajectory = Trajectory(request("ddim", STEPS, eta=eta), config, [0, 1])
    expected, latents = torch.tensor(start), trajectory.begin(start, None)
    for index, timestep in enumerate(reference.timesteps):
        noise = torch.tensor(RowNoise(SEED, index, [0, 1]).standard_normal(start.shape))
        prediction = 0.1 * expected + torch.tensor(field)
        # At a whole 1, diffusers' own first step from nothing is NaN on some processors (seen on an Intel Xeon).
        below = min(eta, 1 - 2.0**-22)
        expected = reference.step(prediction, timestep, expected, eta=below, variance_noise=noise).prev_sample
        latents = trajectory.step(index, latents * 0.1 + Tensor(field), latents)
        assert np.isfinite(expected.numpy()).all()
        # The first step from nothing takes the root of a difference of equal numbers: of float32's last bits.
        assert relative_error(latents, expected) < (1e-3 if said is ZERO_SNR and eta == 1 else 1e-5)


def test_the_noise_of_eta_is_a_function_of_seed_picture_and_step():
    start = normal(3, 4, 4, 4)

    def drawn(rows, seed=SEED, **more):
        trajectory = Trajectory(request("ddim", 3, seed=seed, **more), PUBLISHED, rows, "strength" in more)
        latents = trajectory.begin(start[rows], start[rows] if "strength" in more else None)
        for index in range(len(trajectory.timesteps)):
            latents = trajectory.step(index, latents * 0.1, latents)
        return latents.asnumpy()

    plain, noisy = drawn([0, 1, 2]), drawn([0, 1, 2], eta=0.5)
    assert np.array_equal(drawn([0, 1, 2], eta=0.0), plain)
    assert not np.array_equal(noisy[0], plain[0])
    assert np.array_equal(drawn([2, 1], eta=0.5), noisy[[2, 1]])
    assert not np.array_equal(drawn([0], seed=SEED + 1, eta=0.5)[0], noisy[0])
    # From the second step on: the numbers are those of the second step.
    assert not np.array_equal(drawn([0], eta=0.5, strength=0.67)[0], drawn([0], eta=0.0, strength=0.67)[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), levels=0)


@pytest.fixture(scope="module")
def sampler(model):
    """Compiled once for all schedulers."""
    return SamplingModel(open_bundle(model))


@pytest.mark.parametrize("name", REFERENCES)
def test_pictures_are_those_that_diffusers_pipeline_samples(name, model, sampler, monkeypatch):
    """Same weights, latents and texts, four steps: the sampler's whole way from noise to pixels.

    There are three pictures, two at a time, so the second batch is filled up, and what fills it must not be seen.
    """
    noise, text, negative = normal(3, 4, 16, 16), normal(3, 77, 24), normal(77, 24, seed=1)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.scheduler = reference_scheduler(name, pipeline.scheduler.config, monkeypatch, seed=0)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=torch.tensor(text),
        negative_prompt_embeds=torch.tensor(negative).expand(3, -1, -1),
        latents=torch.tensor(noise),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images

    schedule = replace(sampler.bundle.schedule, config=config_for(name, sampler.bundle.schedule.config))
    bundle = replace(sampler.bundle, schedule=schedule)
    monkeypatch.setattr(sampler, "bundle", bundle)
    asked = request(name, 4, seed=0, num_images_per_prompt=3, batch_size=2, guidance_scale=3.0)
    rows = Rows(noise, [PromptText(row) for row in text], PromptText(negative))
    pictures = [sampler.picture(latents, number) for number, latents in sampler.latents(asked, rows)]
    assert len(pictures) == 3
    assert min(picture.std() for picture in expected) > 0.1, "a flat picture shows no difference"
    differences = np.abs(np.stack(pictures).astype(int) - np.rint(expected * 255))
    print(f"{name}: {(differences > 0).mean():.1e} of the values are one level off")
    # Of 255 levels: a value between two of them may be rounded either way, which is seldom.
    assert differences.max() <= 1
    assert (differences > 0).mean() < 1e-3

"""Every scheduler of ours goes the way of diffusers', and whole pictures are those of diffusers' pipeline."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from mindspore import Tensor

from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings
from dreambooth_ms.sampling.schedulers import SCHEDULERS, create_scheduler
from dreambooth_ms.weights.model_folder import open_model_folder
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
# float32 (measured 9e-7); the multistep solver takes differences of their logarithms (measured 9e-6).
REFERENCES = {
    "ddim": ("DDIMScheduler", {}, 1e-5),
    "euler": ("EulerDiscreteScheduler", {}, 1e-5),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}, 1e-4),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 1e-4),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, 1e-5),
}


def test_every_scheduler_is_compared():
    assert REFERENCES.keys() == SCHEDULERS.keys()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", REFERENCES)
def test_ten_steps_are_diffusers(name, prediction_type):
    """With a model that is a formula: a tenth of its input and a constant field."""
    class_name, options, tolerance = REFERENCES[name]
    config = PUBLISHED | {"prediction_type": prediction_type}
    start, field = normal(2, 4, 6, 8), 0.1 * normal(2, 4, 6, 8, seed=1)

    reference = getattr(diffusers, class_name).from_config(config, **options)
    reference.set_timesteps(STEPS)
    expected, expected_states = torch.tensor(start) * reference.init_noise_sigma, []
    for timestep in reference.timesteps:
        prediction = 0.1 * reference.scale_model_input(expected, timestep) + torch.tensor(field)
        expected = reference.step(prediction, timestep, expected).prev_sample
        expected_states.append(expected.numpy())

    scheduler = create_scheduler(name, config, STEPS)
    timesteps = [float(timestep) for timestep in scheduler.timesteps]
    assert timesteps == pytest.approx([float(timestep) for timestep in reference.timesteps], rel=1e-6)
    latents = Tensor(start) * float(scheduler.init_noise_sigma)
    errors = []
    for timestep, state in zip(scheduler.timesteps, expected_states, strict=True):
        prediction = scheduler.scale_model_input(latents, timestep) * 0.1 + Tensor(field)
        latents = scheduler.step(prediction, timestep, latents)[0]
        errors.append(relative_error(latents, state))
    print(f"{name}, {prediction_type}: {max(errors):.1e}")
    assert max(errors) < tolerance


@pytest.mark.parametrize("name", REFERENCES)
def test_a_second_trajectory_is_not_disturbed_by_the_first(name):
    """Some schedulers keep the last predictions, so each batch has one of its own."""

    def last(start):
        scheduler = create_scheduler(name, PUBLISHED, 4)
        latents = Tensor(start) * float(scheduler.init_noise_sigma)
        for timestep in scheduler.timesteps:
            prediction = scheduler.scale_model_input(latents, timestep) * 0.1
            latents = scheduler.step(prediction, timestep, latents)[0]
        return latents.asnumpy()

    first = last(normal(1, 4, 4, 4))
    assert not np.array_equal(last(normal(1, 4, 4, 4, seed=1)), first)
    assert np.array_equal(last(normal(1, 4, 4, 4)), first)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sampler(model):
    """Two pictures at a time; compiled once for all schedulers."""
    folder = open_model_folder(model)
    settings = SamplingSettings("ddim", 4, guidance_scale=3.0, batch_size=2)
    return Sampler(folder.load_unet(), folder.load_vae(), folder.scheduler_config, settings)


@pytest.mark.parametrize("name", REFERENCES)
def test_pictures_are_those_that_diffusers_pipeline_draws(name, model, sampler):
    """Same weights, latents and texts, four steps: the sampler's whole way from noise to pixels.

    There are three pictures, so the second batch is filled up, and what fills it must not be seen.
    """
    noise, text, negative = normal(3, 4, 16, 16), normal(3, 77, 24), normal(77, 24, seed=1)
    class_name, options, _ = REFERENCES[name]
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=torch.tensor(text),
        negative_prompt_embeds=torch.tensor(negative).expand(3, -1, -1),
        latents=torch.tensor(noise),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images

    sampler.settings = replace(sampler.settings, scheduler=name)
    pictures = list(sampler.pictures(noise, [PromptText(row) for row in text], PromptText(negative)))
    assert len(pictures) == 3
    assert min(picture.std() for picture in expected) > 0.1, "a flat picture shows no difference"
    differences = np.abs(np.stack(pictures).astype(int) - np.rint(expected * 255))
    print(f"{name}: {(differences > 0).mean():.1e} of the values are one level off")
    # Of 255 levels: a value between two of them may be rounded either way, which is seldom.
    assert differences.max() <= 1
    assert (differences > 0).mean() < 1e-3

"""Models that predict the variance of a step too, and dynamic thresholds: what DeepFloyd IF is sampled with, compared
with diffusers' schedulers."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn, ops

from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.model_config import read_scheduler_config, write_scheduler_config
from dreambooth_ms.sampling.model import Rows, SamplingModel
from dreambooth_ms.sampling.schedulers import SCHEDULERS, Denoiser, Trajectory, check_scheduler
from dreambooth_ms.weights.bundle import Codec, ModelBundle, Role, Schedule
from tests.parity.reference import normal, relative_error
from tests.parity.test_schedulers import REFERENCES, reference_scheduler, request
from tests.tiny_model import IF_SCHEDULER
from tests.unit.test_bundle_roles import READER, UNET_OF_PIXELS, PixelSpec

FIXED = {"variance_type": "fixed_small"}
OPEN = {"sample_max_value": 50.0}
"""No quantile is cut, so that each row has its own."""
STEPS = 12

# The second row is further from a picture. The variance of each pixel is another one, from v = -1 to 1 and beyond.
FIELD = 0.1 * normal(2, 3, 6, 8, seed=1) * np.array([1, 4], np.float32)[:, None, None, None]
VARIANCE = normal(2, 3, 6, 8, seed=2)


def trajectories(name, config, monkeypatch, told=None, rows=(0, 1), variance=VARIANCE):
    """The latents after each step, ours and diffusers', of a model that is a formula. Diffusers' scheduler sees the
    variance if it reads one."""
    reference = reference_scheduler(name, config if told is None else told, monkeypatch)
    reference.set_timesteps(STEPS)
    expected, theirs = torch.tensor(normal(2, 3, 6, 8)) * reference.init_noise_sigma, []
    for timestep in reference.timesteps:
        prediction = 0.1 * reference.scale_model_input(expected, timestep) + torch.tensor(FIELD)
        if name == "ddpm" and reference.config.variance_type == "learned_range":
            prediction = torch.cat((prediction, torch.tensor(VARIANCE)), 1)
        expected = reference.step(prediction, timestep, expected).prev_sample
        theirs.append(expected.numpy())

    rows = list(rows)
    trajectory, ours = Trajectory(request(name, STEPS), config, rows), []
    latents = trajectory.begin(normal(2, 3, 6, 8)[rows], None)
    for index, timestep in enumerate(trajectory.timesteps):
        prediction = (trajectory.inputs(latents, timestep) * 0.1).asnumpy() + FIELD[rows]
        latents = trajectory.step(index, Tensor(np.concatenate((prediction, variance[rows]), 1)), latents)
        ours.append(latents.asnumpy())
    return np.stack(ours), np.stack(theirs)


def largest_error(ours, theirs):
    """Of all steps."""
    return max(map(relative_error, ours, theirs))


@pytest.mark.parametrize("variance", [{}, FIXED], ids=["learned", "fixed"])
@pytest.mark.parametrize("limit", [1.0, 1.5, 50.0])
def test_ancestral_steps_are_diffusers(limit, variance, monkeypatch):
    ours, theirs = trajectories("ddpm", IF_SCHEDULER | variance | {"sample_max_value": limit}, monkeypatch)
    print(f"{limit}, {variance}: {largest_error(ours, theirs):.1e}")
    assert largest_error(ours, theirs) < 1e-5


def test_the_variance_and_the_thresholds_are_seen(monkeypatch):
    """What the test above compares would differ without them, and the quantile is another one in each row."""
    learned, _ = trajectories("ddpm", IF_SCHEDULER | OPEN, monkeypatch)
    for other in (FIXED, {"thresholding": False}, {"dynamic_thresholding_ratio": 0.5}, {"sample_max_value": 1.5}):
        assert relative_error(trajectories("ddpm", IF_SCHEDULER | OPEN | other, monkeypatch)[0], learned) > 0.01, other
    swapped, _ = trajectories("ddpm", IF_SCHEDULER | OPEN, monkeypatch, variance=VARIANCE[::-1].copy())
    assert relative_error(swapped, learned) > 0.01
    alone, _ = trajectories("ddpm", IF_SCHEDULER | OPEN, monkeypatch, rows=(1,))
    assert np.array_equal(alone[:, 0], learned[:, 1])


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "ddpm" and not SCHEDULERS[name].edm])
def test_other_schedulers_drop_the_variance(name, monkeypatch):
    """They threshold where diffusers' do: its other ones pass over what the configuration says of it."""
    ours, theirs = trajectories(name, IF_SCHEDULER, monkeypatch)
    print(f"{name}: {largest_error(ours, theirs):.1e}")
    assert largest_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "name", ["ddim", "dpm++_2m", "dpm++_2m_karras", "dpm++_2s", "dpm++_sde", "unipc", "deis", "lcm"]
)
def test_each_row_is_thresholded_by_itself(name, monkeypatch):
    ours, theirs = trajectories(name, IF_SCHEDULER | OPEN, monkeypatch)
    print(f"{name}: {largest_error(ours, theirs):.1e}")
    assert largest_error(ours, theirs) < 1e-5
    plain, _ = trajectories(name, IF_SCHEDULER | {"thresholding": False, "clip_sample": False}, monkeypatch)
    assert relative_error(plain, ours) > 0.01


class Text(nn.Cell):
    """Stands for a UNet: its prediction is its text."""

    def construct(self, latents, timesteps_B, text):
        return text


@pytest.mark.parametrize("rescaled", [False, True])
def test_guidance_keeps_the_variance_of_the_text(rescaled):
    negative, positive = normal(2, 6, 4, 5), normal(2, 6, 4, 5, seed=1) + 1
    inputs = Tensor(negative[:, :3]), Tensor(np.zeros(2, np.float32)), Tensor([7.0, 0.7], ms.float32)
    text = Tensor(np.concatenate([negative, positive]))
    ours = Denoiser(Text(), guided=True, rescaled=rescaled, variance=True)(*inputs, text).asnumpy()
    assert np.array_equal(ours[:, 3:], positive[:, 3:])
    expected = negative[:, :3] + 7 * (positive[:, :3] - negative[:, :3])
    if rescaled:
        deviations = [picture.std((1, 2, 3), keepdims=True) for picture in (positive[:, :3], expected)]
        expected = 0.7 * expected * deviations[0] / deviations[1] + 0.3 * expected
    assert relative_error(ours[:, :3], expected) < 1e-6
    unguided = Denoiser(Text(), guided=False, variance=True)(*inputs, Tensor(positive)).asnumpy()
    assert np.array_equal(unguided, positive)


def test_a_model_without_a_variance_is_told_before_the_work():
    with pytest.raises(ConfigError, match=r"ddpm: variance_type learned_range, .* predicts no variance; write fixed_"):
        check_scheduler("ddpm", IF_SCHEDULER, 5)
    check_scheduler("ddpm", IF_SCHEDULER, 5, predicts_variance=True)
    check_scheduler("ddpm", IF_SCHEDULER | FIXED, 5)
    for name in REFERENCES:
        if name != "ddpm" and not SCHEDULERS[name].edm:
            check_scheduler(name, IF_SCHEDULER, 5)


def test_the_cosine_is_written_and_read_again():
    spec = read_scheduler_config(IF_SCHEDULER)
    assert spec.beta_schedule == "squaredcos_cap_v2"
    assert read_scheduler_config(write_scheduler_config(spec)) == spec


class Pixels(nn.Cell):
    """Stands for a UNet that predicts noise and variance of pictures, by their text."""

    def construct(self, latents, timesteps_B, text):
        text = text.reshape(latents.shape)
        return ops.concat((latents * 0.1 + text * 0.1, text), 1)


@pytest.mark.parametrize("variance", [{}, FIXED], ids=["learned", "fixed"])
def test_a_model_samples_with_the_variance_that_it_predicts(variance, tmp_path, monkeypatch):
    """Guided, from a bundle whose denoiser has twice the channels of its pictures."""
    config = IF_SCHEDULER | variance
    bundle = ModelBundle(
        path=tmp_path,
        denoiser=Role(replace(UNET_OF_PIXELS, out_channels=6), None, None),
        codec=Codec(PixelSpec(), None, None),
        text=(READER,),
        schedule=Schedule(tmp_path, config),
    )
    noise, text, negative = normal(2, 3, 6, 4), normal(2, 6, 12, seed=1), normal(6, 12, seed=2)
    rows = Rows(noise, [PromptText(row) for row in text], PromptText(negative))
    asked = request("ddpm", 4, num_images_per_prompt=2, batch_size=2, guidance_scale=7.0)
    ours = np.stack([latents for _, latents in SamplingModel(bundle, denoiser=Pixels()).latents(asked, rows)])

    reference = reference_scheduler("ddpm", config, monkeypatch)
    reference.set_timesteps(4)
    expected, text, negative = map(torch.tensor, (noise, text.reshape(noise.shape), negative.reshape(noise[0].shape)))
    for timestep in reference.timesteps:
        prediction = 0.1 * expected + 0.1 * (negative + 7 * (text - negative))
        told = prediction if variance else torch.cat((prediction, text), 1)
        expected = reference.step(told, timestep, expected).prev_sample
    assert relative_error(ours, expected) < 1e-5

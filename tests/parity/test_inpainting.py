"""Inpainting bases draw what diffusers' pipelines draw, from the same noise and the same draws of the posteriors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import vae as diffusers_vae
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_inpaint as xl_inpaint
from PIL import Image, ImageDraw

from dreambooth_ms.errors import ConfigError
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.sampling import autoencoder
from dreambooth_ms.sampling.model import REST, SamplingModel
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import relative_error
from tests.parity.test_sampling_model import (
    HEIGHT,
    LATENT_SHAPE,
    SEED,
    WIDTH,
    assert_close,
    latents,
    noise,
    pipeline_of,
    request,
    settings_of_pipeline,
)
from tests.tiny_model import write_random_model, write_random_sdxl


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {
        "sd1": write_random_model(home / "sd1", levels=0, in_channels=9),
        "sdxl": write_random_sdxl(home / "sdxl", levels=0, in_channels=9),
    }


@pytest.fixture(scope="module")
def models(folders):
    return {name: SamplingModel(open_bundle(folder), keep_text_encoders=True) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


@pytest.fixture(scope="module")
def mask():
    """Off the grid of the latents, and grey on both sides of the half."""
    image = Image.new("L", (WIDTH, HEIGHT), 127)
    ImageDraw.Draw(image).ellipse((5, 9, 21, 40), fill=128)
    return image


def give_noise(monkeypatch, module, strength):
    """Diffusers draws the noise that we draw: of the picture's posterior, of the masked one's, of the first step."""
    purposes = iter([autoencoder.PURPOSE, REST] if strength < 1 else [REST])
    draw = lambda *_, **__: torch.tensor(standard_normal(LATENT_SHAPE, SEED, next(purposes))[None])  # noqa: E731
    monkeypatch.setattr(diffusers_vae, "randn_tensor", draw)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(noise()))


@pytest.mark.parametrize(
    ("base", "name", "scheduler", "strength"),
    [
        ("sd1", "ddim", "DDIMScheduler", 1.0),
        ("sd1", "euler", "EulerDiscreteScheduler", 0.6),
        ("sd1", "dpm++_2m", "DPMSolverMultistepScheduler", 1.0),
        ("sdxl", "euler", "EulerDiscreteScheduler", 1.0),
        ("sdxl", "ddim", "DDIMScheduler", 0.8),
    ],
)
def test_inpainting(models, folders, picture, mask, monkeypatch, base, name, scheduler, strength):
    kind, module = {
        "sd1": ("StableDiffusionInpaintPipeline", inpaint),
        "sdxl": ("StableDiffusionXLInpaintPipeline", xl_inpaint),
    }[base]
    give_noise(monkeypatch, module, strength)
    pipeline = pipeline_of(kind, folders[base], scheduler)
    inputs = {"image": picture, "mask_image": mask, "height": HEIGHT, "width": WIDTH}
    expected = pipeline(strength=strength, **inputs, **settings_of_pipeline()).images
    asked = request(scheduler=name, image=picture, mask=mask, strength=strength)
    ours = latents(models[base], asked)
    assert_close(ours, expected)
    whole = replace(asked, mask=Image.new("L", mask.size, 255))
    assert relative_error(latents(models[base], whole), expected) > 0.01


def test_without_a_picture_all_of_it_is_drawn_anew(models, picture):
    """As the script has it for class pictures: the masked picture is grey, whatever the picture was."""
    white = Image.new("L", picture.size, 255)
    whole = latents(models["sd1"], request(image=picture, mask=white, strength=1.0))
    assert np.array_equal(latents(models["sd1"], request()), whole)


def test_a_picture_does_not_depend_on_its_batch(models, picture, mask):
    asked = request(image=picture, mask=mask, strength=1.0, num_images_per_prompt=2)
    together, apart = (
        np.stack([own for _, own in models["sd1"].latents(one, models["sd1"].rows(one))])
        for one in (replace(asked, batch_size=2), replace(asked, batch_size=1))
    )
    assert relative_error(together, apart) < 1e-5
    assert relative_error(apart[:1], apart[1:]) > 0.1


def test_a_mask_that_cannot_be_used_is_refused(models, picture, mask, tmp_path):
    plain = SamplingModel(open_bundle(write_random_model(tmp_path / "plain", levels=0)))
    with pytest.raises(ConfigError, match=r"plain is no base for inpainting, its UNet takes 4 channels and not 9; "):
        plain.rows(request(image=picture, mask=mask))
    with pytest.raises(ConfigError, match=r"--mask: 48x32 pixels, its --image 32x48; give both in the same size"):
        models["sd1"].rows(request(image=picture, mask=mask.rotate(90, expand=True)))
    with pytest.raises(ConfigError, match=r"--mask: 32x48 pixels, its --image none; give both in the same size"):
        models["sd1"].rows(request(mask=mask))

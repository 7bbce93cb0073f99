"""SDXL samples diffusers' pictures from the prompt itself, with and without an adapter on all three networks."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from dreambooth_ms.adapters.lora import adaptable_layers
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.specs import PLAYGROUND_25
from dreambooth_ms.sampling.model import Rows, SamplingModel
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import CLIP_TARGETS, open_bundle
from tests.parity.reference import normal, relative_error
from tests.tiny_model import write_random_sdxl
from tests.whole_loras import read_lora, write_run_lora

PROMPT, NEGATIVE = "a photo of star", "a star"
# Not square, so that no side passes for another.
HEIGHT, WIDTH = 48, 32
NOISE = normal(1, 4, HEIGHT // 2, WIDTH // 2)
STEPS, GUIDANCE = 3, 3.0
RANK, ALPHA, TARGETS = 3, 7, ("to_q", "to_k", "to_v", "to_out.0")

# Float32 sums in another order, through the steps of the UNet: measured below 1e-5.
LATENTS = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A file with an adapter of each network, both factors away from zero."""
    folder = open_bundle(model)
    networks = {"unet": folder.denoiser.load(), **folder.load_text_encoders().networks()}
    chosen = {}
    for number, (name, network) in enumerate(networks.items()):
        targets = TARGETS if name == "unet" else CLIP_TARGETS
        chosen[name] = {
            layer: (
                0.15 * normal(RANK, cell.in_channels, seed=2 * number),
                0.15 * normal(cell.out_channels, RANK, seed=2 * number + 1),
            )
            for layer, cell in adaptable_layers(network).items()
            if layer.endswith(targets)
        }
    return write_run_lora(tmp_path_factory.mktemp("adapter"), chosen, alpha=ALPHA)


@pytest.fixture(scope="module")
def ours(model, adapter):
    """Our networks with the adapter on them."""
    return SamplingModel(open_bundle(model), [adapter], keep_text_encoders=True)


def pipeline_of(model):
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, **more):
    """Diffusers' latents and picture."""
    settings = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **more}
    latents = pipeline(height=HEIGHT, width=WIDTH, latents=torch.tensor(NOISE), output_type="latent", **settings).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents, pipeline.image_processor.postprocess(decoded, output_type="np")[0]


def request(scale, negative=""):
    return SampleRequest(
        prompts=(PROMPT,),
        negative_prompt=negative,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        lora_scales=(scale,),
    )


def sample_ours(ours, scale, negative=""):
    asked = request(scale, negative)
    texts = ours.embeddings(asked)
    ((number, latents),) = ours.latents(asked, Rows(NOISE, [texts[PROMPT]], texts[negative]))
    return latents[None], ours.picture(latents, number)


def assert_same(ours, expected):
    error = relative_error(ours[0], expected[0])
    levels = np.abs(ours[1].astype(int) - np.rint(expected[1] * 255)).max()
    print(f"latents {error:.1e}, pixels {levels:.0f} levels")
    assert error < LATENTS
    assert levels <= 1


def test_without_a_negative_prompt_it_is_guided_by_zeros_as_diffusers_is(ours, model):
    empty = ours.embeddings(request(0.0))[""]
    assert not empty.text.any()
    assert not empty.pooled.any()
    assert_same(sample_ours(ours, 0.0), sample(pipeline_of(model)))


def test_a_negative_prompt_samples_another_picture_and_diffusers_too(ours, model):
    expected = sample(pipeline_of(model), negative_prompt=NEGATIVE)
    assert_same(sample_ours(ours, 0.0, NEGATIVE), expected)
    assert relative_error(sample_ours(ours, 0.0)[0], expected[0]) > 100 * LATENTS


def test_the_numbers_of_the_picture_show_in_it(ours, model):
    """So a wrong order of them would be seen."""
    others = sample(pipeline_of(model), original_size=(WIDTH, HEIGHT)), sample(pipeline_of(model), target_size=(8, 8))
    assert all(relative_error(sample_ours(ours, 0.0)[0], other[0]) > 10 * LATENTS for other in others)


def test_diffusers_loads_our_adapter_of_all_three_networks_and_samples_our_picture(ours, model, adapter):
    assert read_lora(adapter, model).keys() == {"unet", "text_encoder", "text_encoder_2"}
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(adapter.parent)
    expected = sample(pipeline)
    assert_same(sample_ours(ours, 1.0), expected)
    assert relative_error(sample_ours(ours, 0.0)[0], expected[0]) > 0.1
    without_text = pipeline_of(model)
    without_text.load_lora_weights(adapter.parent)
    without_text.text_encoder.disable_adapters()
    assert relative_error(expected[0], sample(without_text)[0]) > 100 * LATENTS


def test_the_refiner_is_told_how_beautiful_the_picture_is(tmp_path):
    """As in its own pipeline, which starts from the same noise where nothing of a picture is kept."""
    folder = open_bundle(write_random_sdxl(tmp_path, refiner=True))
    assert ([reader.name for reader in folder.text], folder.num_add_time_ids) == (["text_encoder_2"], 5)
    model, asked = SamplingModel(folder), request(1.0)
    texts = model.embeddings(asked)
    ((_, latents),) = model.latents(asked, Rows(NOISE, [texts[PROMPT]], texts[""]))

    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": PROMPT,
        "image": Image.new("RGB", (WIDTH, HEIGHT)),
        "latents": torch.tensor(NOISE),
        "strength": 1.0,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
    }
    assert texts[""].text.any(), "the refiner is guided by the encoded empty prompt"
    error = relative_error(latents[None], pipeline(**arguments).images)
    print(f"latents of the refiner {error:.1e}")
    assert error < LATENTS
    assert relative_error(latents[None], pipeline(**arguments, aesthetic_score=2.5).images) > 10 * LATENTS


def test_nan_ends_in_a_line_and_not_in_a_black_picture(ours):
    asked = request(0.0)
    texts = ours.embeddings(asked)
    broken = PromptText(*(np.full_like(value, np.nan) for value in texts[PROMPT]))
    ((number, latents),) = ours.latents(asked, Rows(NOISE, [broken], texts[""]))
    with pytest.raises(WeightError, match=r"picture 0 came out as NaN or infinity; .*pretrained_vae"):
        ours.picture(latents, number)


def test_latents_of_playground_are_moved_and_scaled_by_channel():
    """(z - mean) * 0.5 / std, and back."""
    vae, latents = PLAYGROUND_25.vae, normal(2, 4, 5, 3)
    scaled = vae.scaled(latents)
    for channel in range(4):
        expected = (latents[:, channel] - vae.latents_mean[channel]) * 0.5 / vae.latents_std[channel]
        assert scaled[:, channel] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert vae.unscaled(scaled) == pytest.approx(latents, abs=1e-5)

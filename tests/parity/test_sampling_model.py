"""What a model samples is what diffusers' pipelines sample: from pictures, refined, with several adapters."""

from dataclasses import replace

import diffusers
import mindspore as ms
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import vae as diffusers_vae
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as xl_img2img
from mindspore import Tensor, nn
from PIL import Image

from dreambooth_ms.adapters.lora import adaptable_layers
from dreambooth_ms.config.sample import RefinerConfig, SizesConfig
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats import model_config
from dreambooth_ms.formats.folder_layout import read_json, write_json
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.sampling import autoencoder
from dreambooth_ms.sampling.model import SamplingModel, sample_refined, starting_noise
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.sampling.schedulers import Denoiser
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import normal, relative_error
from tests.tiny_model import write_random_model, write_random_sdxl
from tests.whole_loras import write_run_lora

PROMPT, NEGATIVE = "a photo of star", "a star"
# Not square, so that no side passes for another.
HEIGHT, WIDTH = 48, 32
LATENT_SHAPE = (4, HEIGHT // 2, WIDTH // 2)
SEED = 3

# Float32 sums in another order, through the steps of the UNet: measured below 1e-5.
LATENTS = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {
        "sd1": write_random_model(home / "sd1"),
        "base": write_random_sdxl(home / "base", levels=0),
        "refiner": write_random_sdxl(home / "refiner", refiner=True, levels=0),
    }


@pytest.fixture(scope="module")
def models(folders):
    return {name: SamplingModel(open_bundle(folder), keep_text_encoders=True) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def edm_base(tmp_path_factory):
    folder = write_random_sdxl(tmp_path_factory.mktemp("edm") / "base", levels=0)
    changes = {
        "scheduler/scheduler_config.json": model_config.EDM_SCHEDULER,
        "vae/config.json": {"latents_mean": [-1.6, 2.0, 4.0, 0.3], "latents_std": [8.4, 6.0, 9.5, 5.2]},
    }
    for name, change in changes.items():
        kept = read_json(folder / name, None) if name.startswith("vae") else {}
        write_json(folder / name, kept | change)
    return folder


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def pipeline_of(kind, folder, scheduler="DDIMScheduler", **options):
    xl = {"add_watermarker": False} if "XL" in kind else {}
    pipeline = getattr(diffusers, kind).from_pretrained(folder, **xl)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def request(**more):
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": HEIGHT, "width": WIDTH, "seed": SEED}
    return SampleRequest(prompts=(PROMPT,), negative_prompt=NEGATIVE, **settings | more)


def settings_of_pipeline(**more):
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "negative_prompt": NEGATIVE}
    return {"prompt": PROMPT, **settings, **more}


def noise(purpose="sample"):
    return starting_noise([0], LATENT_SHAPE, SEED, purpose)


def give_noise(monkeypatch, pipeline_module, purpose="sample"):
    """Diffusers draws the noise that we draw: of the picture's posterior, and of its first step."""
    posterior = standard_normal(LATENT_SHAPE, SEED, autoencoder.PURPOSE)[None]
    monkeypatch.setattr(diffusers_vae, "randn_tensor", lambda *_, **__: torch.tensor(posterior))
    monkeypatch.setattr(pipeline_module, "randn_tensor", lambda *_, **__: torch.tensor(noise(purpose)))


def latents(model, asked):
    ((_, sampled),) = model.latents(asked, model.rows(asked))
    return sampled[None]


def assert_close(ours, expected):
    error = relative_error(ours, expected)
    print(f"latents {error:.1e}")
    assert error < LATENTS


@pytest.mark.parametrize(
    ("name", "scheduler", "strength"),
    [
        ("ddim", "DDIMScheduler", 0.75),
        ("heun", "HeunDiscreteScheduler", 0.5),
        ("dpm++_2m", "DPMSolverMultistepScheduler", 0.8),
    ],
)
def test_image_to_image(models, folders, picture, monkeypatch, name, scheduler, strength):
    give_noise(monkeypatch, img2img)
    pipeline = pipeline_of("StableDiffusionImg2ImgPipeline", folders["sd1"], scheduler)
    expected = pipeline(image=picture, strength=strength, **settings_of_pipeline()).images
    asked = request(scheduler=name, image=picture, strength=strength)
    ours = latents(models["sd1"], asked)
    assert_close(ours, expected)
    assert relative_error(latents(models["sd1"], request(scheduler=name)), expected) > 0.1


@pytest.mark.parametrize(
    ("name", "scheduler"), [("edm_euler", "EDMEulerScheduler"), ("edm_dpm++_2m", "EDMDPMSolverMultistepScheduler")]
)
def test_a_base_trained_in_edms_formulation(models, edm_base, picture, monkeypatch, name, scheduler):
    """As Playground v2.5 is: from noise, and from a picture."""
    model = SamplingModel(open_bundle(edm_base))
    pipeline = pipeline_of("StableDiffusionXLPipeline", edm_base, scheduler)
    expected = pipeline(latents=torch.tensor(noise()), height=HEIGHT, width=WIDTH, **settings_of_pipeline()).images
    ours = latents(model, request(scheduler=name))
    assert_close(ours, expected)
    assert relative_error(latents(models["base"], request(scheduler="euler")), expected) > 0.1
    give_noise(monkeypatch, xl_img2img)
    pipeline = pipeline_of("StableDiffusionXLImg2ImgPipeline", edm_base, scheduler)
    expected = pipeline(image=picture, strength=0.5, **settings_of_pipeline()).images
    assert_close(latents(model, request(scheduler=name, image=picture, strength=0.5)), expected)
    with pytest.raises(ConfigError, match="--scheduler ddim: this model was trained in EDM's formulation; use edm_"):
        list(model.sample(request(scheduler="ddim")))


def test_image_to_image_of_sdxl_with_other_sizes(models, folders, picture, monkeypatch):
    give_noise(monkeypatch, xl_img2img)
    pipeline = pipeline_of("StableDiffusionXLImg2ImgPipeline", folders["base"], "EulerDiscreteScheduler")
    sizes = {"original_size": (60, 70), "crops_coords_top_left": (3, 5), "target_size": (20, 30)}
    negative_sizes = {f"negative_{name}": value for name, value in sizes.items()}
    expected = pipeline(image=picture, strength=0.5, **sizes, **negative_sizes, **settings_of_pipeline()).images
    sizes = SizesConfig(
        orig_width=70, orig_height=60, crop_coords_top=3, crop_coords_left=5, target_width=30, target_height=20
    )
    asked = request(scheduler="euler", image=picture, strength=0.5, sizes=sizes)
    assert_close(latents(models["base"], asked), expected)


@pytest.mark.parametrize(
    ("name", "scheduler"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")]
)
def test_the_refiner_goes_on_where_the_base_stops(models, folders, name, scheduler):
    """As in diffusers' ensemble of experts: `denoising_end` of the one is `denoising_start` of the other."""
    steps = {"num_inference_steps": 5}
    base = pipeline_of("StableDiffusionXLPipeline", folders["base"], scheduler)
    begun = base(
        latents=torch.tensor(noise()), height=HEIGHT, width=WIDTH, denoising_end=0.6, **settings_of_pipeline(**steps)
    ).images
    refiner = pipeline_of("StableDiffusionXLImg2ImgPipeline", folders["refiner"], scheduler)
    expected = refiner(image=begun, denoising_start=0.6, **settings_of_pipeline(**steps)).images
    ours = refined_latents(models, request(scheduler=name, **steps), RefinerConfig(denoising_end=0.6))
    assert_close(ours, expected)
    assert relative_error(begun, expected) > 0.01


def test_the_refiner_starts_from_the_finished_picture(models, folders, monkeypatch):
    base = pipeline_of("StableDiffusionXLPipeline", folders["base"])
    begun = base(latents=torch.tensor(noise()), height=HEIGHT, width=WIDTH, **settings_of_pipeline()).images
    give_noise(monkeypatch, xl_img2img, "sample, refined")
    refiner = pipeline_of("StableDiffusionXLImg2ImgPipeline", folders["refiner"])
    scores = {"aesthetic_score": 5.0, "negative_aesthetic_score": 3.0}
    expected = refiner(image=begun, strength=0.5, **scores, **settings_of_pipeline()).images
    ours = refined_latents(models, request(sizes=SizesConfig(**scores)), RefinerConfig(refiner_strength=0.5))
    assert_close(ours, expected)


def refined_latents(models, asked, refinement):
    """The refiner's latents after its last step."""
    reports = []
    (sampled,) = sample_refined(models["base"], models["refiner"], asked, refinement, reports.append, release=False)
    assert {report.stage for report in reports} == {"base", "refiner"}
    assert sampled.picture.shape == (HEIGHT, WIDTH, 3)
    assert sampled.settings["refiner"] == str(models["refiner"].bundle.path)
    return reports[-1].latents


class Doubled(nn.Cell):
    """Stands for a UNet: its prediction is its text."""

    def construct(self, latents, timesteps_B, text):
        return text


def test_guidance_is_rescaled():
    negative, positive = normal(2, 4, 6, 8), 3 * normal(2, 4, 6, 8, seed=1) + 1
    text = Tensor(np.concatenate([negative, positive]))
    ours = Denoiser(Doubled(), guided=True, rescaled=True)(
        Tensor(negative), Tensor(np.zeros(2, np.float32)), Tensor([5.0, 0.7], ms.float32), text
    )
    guided = torch.tensor(negative + 5 * (positive - negative))
    expected = rescale_noise_cfg(guided, torch.tensor(positive), guidance_rescale=0.7)
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(guided, expected) > 0.1


def test_adapters_have_scales_of_their_own(folders, models, tmp_path):
    """1 and 0.6 of the text encoder and the UNet, then other scales, without loading anything again."""
    folder = open_bundle(folders["sd1"])
    networks = {"unet": folder.denoiser.load(), **folder.load_text_encoders().networks()}
    files = [
        write_run_lora(tmp_path / str(n), random_factors(networks, n, rank=2 + n), alpha=4.0 + 2 * n) for n in range(2)
    ]
    pipeline = pipeline_of("StableDiffusionPipeline", folders["sd1"])
    for n, file in enumerate(files):
        pipeline.load_lora_weights(file.parent, adapter_name=str(n))
    arguments = settings_of_pipeline(latents=torch.tensor(noise()), height=HEIGHT, width=WIDTH)
    model = SamplingModel(folder, files, keep_text_encoders=True)
    sampled = []
    for scales in ((1.0, 0.6), (-0.5, 1.2)):
        pipeline.set_adapters(["0", "1"], list(scales))
        expected = pipeline(**arguments).images
        sampled.append(latents(model, request(lora_scales=scales)))
        assert_close(sampled[-1], expected)
    assert relative_error(*sampled) > 0.1
    (denoiser,) = model._denoisers.values()
    assert len(denoiser.compile_cache) == 1, "other scales are no other graph"
    assert np.array_equal(latents(model, request(lora_scales=(0.0,))), latents(models["sd1"], request()))
    with pytest.raises(ConfigError, match="--lora_scale: expected one number, or one for each of 2 adapters, got 3"):
        model.rows(request(lora_scales=(1.0, 1.0, 1.0)))


def random_factors(networks, seed, rank):
    """Factors of attention layers, both factors away from zero; the second LoRA has the queries alone."""
    ends = ("to_q", "q_proj") if seed else ("to_q", "to_v", "to_out.0", "q_proj", "v_proj")
    chosen = {}
    for number, (name, network) in enumerate(networks.items()):
        layers = {layer: cell for layer, cell in adaptable_layers(network).items() if layer.endswith(ends)}
        chosen[name] = {
            layer: (
                0.3 * normal(rank, cell.in_channels, seed=10 * seed + number),
                0.3 * normal(cell.out_channels, rank, seed=10 * seed + number + 5),
            )
            for layer, cell in layers.items()
        }
    return chosen


def test_long_prompts_are_read_in_pieces(models, folders):
    """Each of 75 tokens between a start and an end token; both prompts get as many."""
    prompt = " ".join(["a photo of a star"] * 25)
    asked = SampleRequest(prompts=(prompt,), negative_prompt=NEGATIVE, support_long_prompts=True)
    ours = models["sd1"].embeddings(asked)
    pipeline = pipeline_of("StableDiffusionPipeline", folders["sd1"])
    tokenizer = pipeline.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    count = -(-len(ids) // 75)
    assert count > 1
    pieces = []
    for first in range(0, len(ids), 75):
        piece = [tokenizer.bos_token_id, *ids[first : first + 75], tokenizer.eos_token_id]
        pieces.append(piece + [tokenizer.pad_token_id] * (77 - len(piece)))
    with torch.no_grad():
        expected = pipeline.text_encoder(torch.tensor(pieces))[0].reshape(1, count * 77, -1)
    assert relative_error(ours[prompt].text[None], expected) < 1e-5
    assert ours[NEGATIVE].text.shape == ours[prompt].text.shape
    short = models["sd1"].embeddings(SampleRequest(prompts=(PROMPT,), support_long_prompts=True))
    assert np.array_equal(short[PROMPT].text, models["sd1"].embeddings(SampleRequest(prompts=(PROMPT,)))[PROMPT].text)


def test_what_is_stopped_gives_the_pictures_that_are_done(models):
    reports = []
    asked = request(num_images_per_prompt=3, batch_size=1, num_inference_steps=2)
    sampled = list(models["sd1"].sample(asked, reports.append, lambda: len(reports) == 3))
    assert [one.number for one in sampled] == [0]
    assert [(report.step, report.rows) for report in reports] == [(1, range(1)), (2, range(1)), (1, range(1, 2))]
    assert reports[0].steps == 2
    assert reports[0].total == 3


def test_pictures_of_some_numbers_are_those_of_the_whole_request(models):
    """So what is missing of a series is sampled as if it had never been missing; the steps' noise included."""
    asked = request(num_images_per_prompt=3, batch_size=1, num_inference_steps=2, scheduler="euler_a")
    whole = dict(models["sd1"].latents(asked, models["sd1"].rows(asked)))
    some = replace(asked, numbers=(2, 0), num_images_per_prompt=2)
    found = dict(models["sd1"].latents(some, models["sd1"].rows(some)))
    assert list(found) == [2, 0]
    assert all(np.array_equal(own, whole[number]) for number, own in found.items())


def test_lent_networks_are_used_as_they_are_at_the_time(models, folders):
    bundle = open_bundle(folders["sd1"])
    unet, encoders = bundle.denoiser.load(), bundle.load_text_encoders()
    model = SamplingModel(bundle, denoiser=unet, text_encoders=encoders)
    assert np.array_equal(latents(model, request()), latents(models["sd1"], request()))
    before = model.embeddings(request())[PROMPT].text
    weight = encoders.networks()["text_encoder"].text_model.final_layer_norm.bias
    weight.set_data(weight + 1)
    assert relative_error(model.embeddings(request())[PROMPT].text, before) > 0.1, "nothing is remembered"
    model.release()
    assert model.denoiser is unet
    read = SamplingModel(bundle, embeddings=model.embeddings(request()), denoiser=unet)
    assert relative_error(latents(read, request()), latents(model, request())) == 0.0


def test_what_a_model_cannot_sample_is_said_in_a_line(models, picture):
    model = models["sd1"]
    refused = [
        (request(image=picture, strength=0.1), "--strength 0.1: of 4 steps none is left"),
        (request(scheduler="edm_euler"), "--scheduler edm_euler: is for models trained in EDM's formulation"),
        (request(clip_skip=1), "--clip_skip: expected 0 to 0, as its text encoders have layers, got 1"),
    ]
    for asked, said in refused:
        with pytest.raises(ConfigError, match=said):
            model.rows(asked)
    with pytest.raises(WeightError, match="33x32 pixels do not fit; sides must be multiples of 4"):
        model.rows(request(height=32, width=33))
    with pytest.raises(
        ConfigError, match=r"--refiner .*: its latents are not those of .*; give the refiner of the same"
    ):
        list(sample_refined(model, models["refiner"], request(), RefinerConfig()))


def test_the_size_follows_the_picture_to_start_from(models):
    """Its shape is kept, at the area of the model, in sides that the networks can halve."""
    wide = Image.new("RGB", (400, 200))
    model = models["sd1"]
    assert model.size(SampleRequest(prompts=("",), image=wide)) == (24, 44)
    assert model.size(SampleRequest(prompts=("",), image=wide, height=40)) == (40, 80)
    assert model.size(SampleRequest(prompts=("",), image=wide, width=40)) == (20, 40)
    assert model.size(SampleRequest(prompts=("",), image=wide, width=32, height=32)) == (32, 32)
    assert model.size(SampleRequest(prompts=("",))) == (32, 32)

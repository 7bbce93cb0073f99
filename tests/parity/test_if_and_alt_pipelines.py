"""DeepFloyd IF's stages and AltDiffusion sample what diffusers' pipelines sample, and adapters of IF go both ways."""

import sys
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deepfloyd_if import pipeline_if_superresolution as enlarging
from diffusers.pipelines.deprecated.alt_diffusion import AltDiffusionPipeline, RobertaSeriesModelWithTransformation
from safetensors.numpy import load_file, save_file
from transformers import XLMRobertaTokenizer

from dreambooth_ms.adapters.file import FILE_NAME, open_adapter
from dreambooth_ms.adapters.writing import write_adapter
from dreambooth_ms.config.sample import SuperResolutionConfig
from dreambooth_ms.data import second_stage
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.folder_layout import read_json, write_json
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.sampling.model import SamplingModel, sample_enlarged, starting_noise
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import MARKS, open_bundle
from tests.parity.reference import normal, relative_error
from tests.parity.test_schedulers import reference_scheduler
from tests.tiny_model import write_random_alt, write_random_if
from tests.whole_loras import random_lora

PROMPT, NEGATIVE, SEED, STEPS = "A photo of a DOG ", "a cat", 3, 4
SIZE, LARGE = (32, 16), (64, 32)
# Float32 sums in another order, through the steps: measured up to 6e-5.
LATENTS = 1e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {
        "first": write_random_if(home / "first", levels=1),
        "second": write_random_if(home / "second", second=True, levels=1, only_cross_attention=True),
        "alt": write_random_alt(home / "alt", levels=1),
        "m18": write_random_alt(home / "m18", levels=1, has_pre_transformation=True),
        "unmasked": write_random_alt(home / "unmasked", levels=1, use_attention_mask=False),
    }


@pytest.fixture(scope="module")
def models(folders):
    return {name: SamplingModel(open_bundle(folder), keep_text_encoders=True) for name, folder in folders.items()}


def request(size=SIZE, **more):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "seed": SEED, "scheduler": "ddpm"}
    return SampleRequest(prompts=(PROMPT,), negative_prompt=NEGATIVE, height=size[0], width=size[1], **settings | more)


def sampled(model, asked):
    ((_, latents),) = model.latents(asked, model.rows(asked))
    return latents


def pipeline_of(folder, monkeypatch, **changes):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    config = read_json(folder / "scheduler" / "scheduler_config.json") | changes
    pipeline.scheduler = reference_scheduler("ddpm", config, monkeypatch, SEED)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings(size=SIZE, **more):
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return asked | {"height": size[0], "width": size[1], "clean_caption": False, "output_type": "pt"} | more


def give_noise(monkeypatch, module, *noises):
    """Diffusers draws these, one after the other."""
    given = iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(next(given)))


def sampled_by_diffusers(folder, monkeypatch, small=None, lora=None, **changes):
    pipeline = pipeline_of(folder, monkeypatch, **changes)
    if lora:
        pipeline.load_lora_weights(lora)
    start = starting_noise([0], (3, *(LARGE if small is not None else SIZE)), SEED, "sample")
    if small is None:
        # The module has the name of a class beside it.
        give_noise(monkeypatch, sys.modules[type(pipeline).__module__], start)
        return pipeline(**settings()).images[0]
    of_small = standard_normal((3, *LARGE), SEED, second_stage.PURPOSE, row=0)[None]
    give_noise(monkeypatch, enlarging, start, of_small)
    return pipeline(image=torch.tensor(small)[None], noise_level=100, **settings(LARGE)).images[0]


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_the_first_stage(models, folders, monkeypatch, variance):
    model = SamplingModel(models["first"].bundle.with_schedule({"variance_type": variance}))
    ours = sampled(model, request())
    expected = sampled_by_diffusers(folders["first"], monkeypatch, variance_type=variance)
    print(f"{variance}: {relative_error(ours, expected):.1e}")
    assert relative_error(ours, expected) < LATENTS


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_the_second_stage(models, folders, monkeypatch, variance):
    small = np.clip(normal(3, 16, 8), -1, 1)
    model = SamplingModel(models["second"].bundle.with_schedule({"variance_type": variance}))
    ours = sampled(model, request(LARGE, small=small[None], noise_level=100))
    expected = sampled_by_diffusers(folders["second"], monkeypatch, small=small, variance_type=variance)
    print(f"{variance}: {relative_error(ours, expected):.1e}")
    assert relative_error(ours, expected) < LATENTS
    for other in ({"noise_level": 400}, {"small": -small[None]}):
        asked = {"noise_level": 100, "small": small[None]} | other
        assert relative_error(sampled(model, request(LARGE, **asked)), expected) > 10 * LATENTS


def test_one_stage_behind_the_other_is_both_by_themselves(models):
    asked, wanted = request(), SuperResolutionConfig(super_resolution="x", super_resolution_steps=3, noise_level=100)
    (sample,) = sample_enlarged(models["first"], models["second"], asked, wanted, release=False)
    small = sampled(models["first"], asked)
    own = replace(
        request((4 * SIZE[0], 4 * SIZE[1]), small=small[None], num_inference_steps=3, guidance_scale=4.0),
        purpose="sample, enlarged",
        noise_level=100,
    )
    expected = models["second"].picture(sampled(models["second"], own), 0)
    assert sample.picture.shape == (4 * SIZE[0], 4 * SIZE[1], 3)
    assert np.array_equal(sample.picture, expected)
    assert (sample.settings["height"], sample.settings["noise_level"]) == (4 * SIZE[0], 100)
    assert sample.settings["num_inference_steps"] == STEPS
    other = replace(wanted, super_resolution_prompt="a dog")
    (with_other,) = sample_enlarged(models["first"], models["second"], asked, other, release=False)
    assert not np.array_equal(with_other.picture, sample.picture)


def test_what_does_not_go_together_is_said(models):
    wanted = SuperResolutionConfig(super_resolution="x")
    for first, second in (("first", "first"), ("second", "second"), ("alt", "second")):
        with pytest.raises(ConfigError, match=r"--super_resolution .*: expected a second stage"):
            list(sample_enlarged(models[first], models[second], request(), wanted))
    with pytest.raises(ConfigError, match=r"--image: missing; .* enlarges pictures"):
        models["second"].rows(request(LARGE))
    with pytest.raises(ConfigError, match="--clip_skip: expected 0 to 0"):
        models["alt"].rows(request(clip_skip=1))


def test_a_second_stage_without_text_encoder_is_read_by_the_first_one(models, folders, tmp_path):
    folder = write_random_if(tmp_path / "second", second=True, levels=1, only_cross_attention=True)
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"text_encoder": [None, None]})
    bundle = open_bundle(folder)
    assert bundle.text == ()
    wanted = SuperResolutionConfig(super_resolution="x", super_resolution_steps=2)
    ours, expected = (
        next(sample_enlarged(models["first"], second, request(), wanted, release=False)).picture
        for second in (SamplingModel(bundle), models["second"])
    )
    assert np.array_equal(ours, expected)
    with pytest.raises(WeightError, match="holds no text encoder"):
        SamplingModel(bundle).rows(request(LARGE, small=normal(1, 3, 16, 8)))


def write_lora(bundle, folder):
    """A LoRA of the first stage in the form that a training writes."""
    spec, targets = bundle.opened().spec, (".to_q", ".to_out.0", ".add_k_proj", ".add_v_proj")
    lora = random_lora(spec, folder, lambda layer: layer.endswith(targets), alphas=(None,), ranks=(2,))
    folder.mkdir()
    metadata = {f"{MARKS}variance_type": "fixed_small"}
    write_adapter(lora.adapter, folder / FILE_NAME, LoraFormat.DIFFUSERS, spec, DType.F32, metadata)
    return folder


def test_an_adapter_goes_to_diffusers_and_comes_from_upstreams_file(models, folders, monkeypatch, tmp_path):
    lora = write_lora(models["first"].bundle, tmp_path / "ours")
    model = SamplingModel(models["first"].bundle, [lora])
    ours = sampled(model, request())
    expected = sampled_by_diffusers(folders["first"], monkeypatch, lora=str(lora), variance_type="fixed_small")
    print(f"LoRA: {relative_error(ours, expected):.1e}")
    assert relative_error(ours, expected) < LATENTS
    base = sampled(models["first"], request())
    assert relative_error(ours, base) > 10 * LATENTS
    # Upstream's files have peft's names for what reads text, and its own before them for the rest.
    mixed, tensors = tmp_path / "mixed", load_file(lora / FILE_NAME)
    renamed = {
        name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.") if ".add_" in name else name: value
        for name, value in tensors.items()
    }
    assert len(renamed.keys() - tensors.keys()) == len(tensors) // 2
    mixed.mkdir()
    save_file(renamed, mixed / FILE_NAME)
    spec = models["first"].bundle.opened().spec
    read, known = (open_adapter(path, [spec]).adapter.updates for path in (mixed, lora))
    assert read.keys() == known.keys()
    assert {name.rpartition(".")[2] for name in read} == {"to_q", "0", "add_k_proj", "add_v_proj"}
    for name, update in read.items():
        for factor, value in update.factors.items():
            assert np.array_equal(value, known[name].factors[factor])


@pytest.mark.parametrize("name", ["alt", "m18", "unmasked"])
def test_altdiffusion(models, folders, name):
    folder = folders[name]
    load = lambda kind, part: kind.from_pretrained(folder, subfolder=part)  # noqa: E731
    tokenizer = load(XLMRobertaTokenizer, "tokenizer")
    tokenizer.model_max_length = 77
    encoder = load(RobertaSeriesModelWithTransformation, "text_encoder").eval()
    pipeline = AltDiffusionPipeline(
        vae=load(diffusers.AutoencoderKL, "vae"),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=load(diffusers.UNet2DConditionModel, "unet"),
        scheduler=load(diffusers.DDIMScheduler, "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    start = starting_noise([0], (4, SIZE[0] // 2, SIZE[1] // 2), SEED, "sample")
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    sizes = {"height": SIZE[0], "width": SIZE[1], "output_type": "latent"}
    expected = pipeline(latents=torch.tensor(start), **asked, **sizes).images[0]
    ours = sampled(models[name], request(scheduler="ddim"))
    print(f"{name}: {relative_error(ours, expected):.1e}")
    assert relative_error(ours, expected) < LATENTS

"""An adapter goes to diffusers and comes from it in one file, with every number and with the same pictures."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file

from dreambooth_ms.cli.assemble import load_adapted_unet
from dreambooth_ms.config.schema import WeightsConfig
from dreambooth_ms.errors import WeightError
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings
from dreambooth_ms.weights.lora_file import FILE_NAME, read_lora, steps_taken, write_lora
from dreambooth_ms.weights.model_folder import open_model_folder
from tests.parity.reference import normal, relative_error
from tests.tiny_model import write_random_model

RANK, ALPHA, TARGETS = 3, 7, ["to_q", "to_k", "to_v", "to_out.0"]
NOISE, TEXT, NEGATIVE = normal(1, 4, 16, 16), normal(1, 77, 24), normal(77, 24, seed=1)

# Float32 sums in another order through four steps of the UNet: measured 4e-6.
LATENTS = 1e-4


def pipeline_of(model):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline):
    """Diffusers' latents and picture (H, W, 3) in [0, 1]: DDIM, four steps, guidance 3."""
    latents = pipeline(
        prompt_embeds=torch.tensor(TEXT),
        negative_prompt_embeds=torch.tensor(NEGATIVE)[None],
        latents=torch.tensor(NOISE),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents[0], pipeline.image_processor.postprocess(decoded, output_type="np")[0]


def random_peft_adapter(model, alpha):
    """Diffusers' pipeline with an adapter as peft makes it, both factors away from zero."""
    pipeline = pipeline_of(model)
    pipeline.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False))
    with torch.no_grad():
        for i, parameter in enumerate(p for name, p in pipeline.unet.named_parameters() if ".lora_" in name):
            parameter.copy_(0.3 * torch.tensor(normal(*parameter.shape, seed=i)))
    return pipeline


def factors_of(pipeline):
    """Layer -> (A, B) of the adapter that a pipeline uses."""
    (adapter,) = pipeline.unet.peft_config
    state = get_peft_model_state_dict(pipeline.unet, adapter_name=adapter)
    tensors = {name: value.numpy() for name, value in state.items()}
    layers = {name.split(".lora_")[0] for name in tensors}
    return {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}


def scales_of(pipeline):
    """The factors on B A that peft uses, one per adapted layer."""
    return [next(iter(m.scaling.values())) for m in pipeline.unet.modules() if hasattr(m, "scaling")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def diffusers_adapter(model, tmp_path_factory):
    """A file that diffusers wrote, with peft's names and configuration."""
    pipeline, folder = random_peft_adapter(model, ALPHA), tmp_path_factory.mktemp("diffusers")
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    return SimpleNamespace(folder=folder, pipeline=pipeline)


@pytest.fixture(scope="module")
def ours(model, diffusers_adapter, tmp_path_factory):
    """Our UNet's picture with that adapter, and the same adapter in a file of ours."""
    folder = open_model_folder(model)
    weights = WeightsConfig(pretrained_model_name_or_path=str(model), lora=[str(diffusers_adapter.folder)])
    unet, _ = load_adapted_unet(folder, weights)
    settings = SamplingSettings("ddim", 4, guidance_scale=3.0, batch_size=1)
    sampler = Sampler(unet, folder.load_vae(), folder.scheduler_config, settings)
    *_, latents = sampler.denoise(NOISE, TEXT, NEGATIVE)
    adapter = read_lora(diffusers_adapter.folder)
    tensors = [(layer, *factors) for layer, factors in adapter.factors.items()]
    return SimpleNamespace(
        adapter=adapter,
        latents=latents.asnumpy()[0],
        picture=next(sampler.pictures(NOISE, TEXT, NEGATIVE)),
        file=write_lora(tmp_path_factory.mktemp("ours"), tensors, adapter.rank, adapter.alpha, TARGETS, step=500),
    )


def assert_same_picture(ours, pipeline):
    latents, picture = draw(pipeline)
    error = relative_error(ours.latents, latents)
    levels = np.abs(ours.picture.astype(int) - np.rint(picture * 255)).max()
    print(f"latents {error:.1e}, pixels {levels:.0f} levels")
    assert error < LATENTS
    assert levels <= 1


def assert_same_factors(ours, expected):
    assert ours.keys() == expected.keys()
    for layer, factors in ours.items():
        assert all(np.array_equal(a, b) for a, b in zip(factors, expected[layer], strict=True)), layer


class TestFromDiffusers:
    def test_every_factor_and_alpha_are_read(self, diffusers_adapter):
        read = read_lora(diffusers_adapter.folder)
        assert (read.rank, read.alpha, read.alpha_is_stated) == (RANK, ALPHA, True)
        assert_same_factors(read.factors, factors_of(diffusers_adapter.pipeline))

    def test_it_draws_the_same_picture(self, ours, diffusers_adapter):
        assert_same_picture(ours, diffusers_adapter.pipeline)

    def test_the_adapter_and_its_alpha_show_in_the_picture(self, ours, model):
        """So the comparisons here can fail."""
        assert relative_error(ours.latents, draw(pipeline_of(model))[0]) > 0.1
        assert relative_error(ours.latents, draw(random_peft_adapter(model, RANK))[0]) > 0.1

    def test_the_names_of_the_published_training_scripts_are_read_and_alpha_is_the_rank(self, model, tmp_path):
        """`lora.down` and `lora.up`, without peft's configuration."""
        pipeline = random_peft_adapter(model, RANK)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
        assert any(name.endswith("to_q.lora.down.weight") for name in load_file(tmp_path / FILE_NAME))
        read = read_lora(tmp_path)
        assert (read.rank, read.alpha, read.alpha_is_stated) == (RANK, RANK, False)
        assert_same_factors(read.factors, factors_of(pipeline))

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ({"use_rslora": True}, "use_rslora"),
            ({"alpha_pattern": {"to_q": 5}}, "alpha_pattern"),
            ({"rank_pattern": {"to_q": 2}}, "different ranks"),
        ],
        ids=["alpha over the root of the rank", "alphas by layer", "ranks by layer"],
    )
    def test_a_scaling_that_we_do_not_have_is_refused(self, model, tmp_path, option, said):
        """Drawn with another strength than it was trained with, it would be another adapter."""
        pipeline = pipeline_of(model)
        pipeline.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **option))
        StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
            unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        )
        with pytest.raises(WeightError, match=said):
            read_lora(tmp_path)


class TestToDiffusers:
    @pytest.fixture
    def loaded(self, ours, model, caplog, monkeypatch):
        """A fresh pipeline that has read our file, and what it said about it."""
        pipeline = pipeline_of(model)
        monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            pipeline.load_lora_weights(ours.file.parent)
        return SimpleNamespace(pipeline=pipeline, said=[record.getMessage() for record in caplog.records])

    def test_every_factor_and_alpha_arrive_and_no_key_is_missing_or_unexpected(self, loaded, ours):
        # All it says is that there is nothing for the text encoder, which is so.
        assert len(set(loaded.said)) == 1
        assert "No LoRA keys associated to CLIPTextModel" in loaded.said[0]
        assert_same_factors(factors_of(loaded.pipeline), ours.adapter.factors)
        assert scales_of(loaded.pipeline) == [pytest.approx(ALPHA / RANK)] * len(ours.adapter.factors)

    def test_it_draws_the_same_picture(self, loaded, ours):
        assert_same_picture(ours, loaded.pipeline)

    def test_what_we_write_we_read(self, ours):
        assert steps_taken(ours.file) == 500
        read = read_lora(ours.file)
        assert (read.rank, read.alpha, read.alpha_is_stated) == (RANK, ALPHA, True)
        assert_same_factors(read.factors, ours.adapter.factors)


def test_an_adapter_of_another_base_is_refused_by_name(model, tmp_path):
    layer = "down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    file = write_lora(tmp_path, [(layer, normal(2, 16), normal(16, 2))], 2, 2.0, TARGETS, step=1)
    weights = WeightsConfig(pretrained_model_name_or_path=str(model), lora=[str(file)])
    with pytest.raises(WeightError, match=f"{FILE_NAME}: was trained on another base than {model}"):
        load_adapted_unet(open_model_folder(model), weights)


def test_an_adapter_for_layers_of_another_size_is_refused(model, tmp_path):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file = write_lora(tmp_path, [(layer, normal(2, 16), normal(16, 2))], 2, 2.0, TARGETS, step=1)
    weights = WeightsConfig(pretrained_model_name_or_path=str(model), lora=[str(file)])
    with pytest.raises(WeightError, match=r"the adapter does not fit the base: \(2, 16\) for \(2, 32\)"):
        load_adapted_unet(open_model_folder(model), weights)

"""An adapter goes to diffusers and comes from it in one file, with every number and with the same pictures."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file

from dreambooth_ms.adapters.adapter import Adapter, folded
from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.adapters.writing import write_adapter
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.models.specs import SD_15
from dreambooth_ms.sampling.model import Rows, SamplingModel
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.training.checkpoint import STEP_KEY, Result, result_of
from dreambooth_ms.weights.bundle import CLIP_TARGETS, open_bundle
from tests.parity.reference import normal, relative_error
from tests.tiny_model import write_random_model
from tests.whole_loras import read_lora, write_run_lora

RANK, ALPHA, TARGETS = 3, 7, ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_RANK, TEXT_ALPHA = 2, 5
PROMPT = "a photo of star"
NOISE, TEXT, NEGATIVE = normal(1, 4, 16, 16), normal(1, 77, 24), normal(77, 24, seed=1)

# Float32 sums in another order through four steps of the UNet: measured 4e-6.
LATENTS = 1e-4


def pipeline_of(model):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, **prompt):
    """Diffusers' latents and picture (H, W, 3) in [0, 1]: DDIM, four steps, guidance 3."""
    embeddings = {"prompt_embeds": torch.tensor(TEXT), "negative_prompt_embeds": torch.tensor(NEGATIVE)[None]}
    latents = pipeline(
        **(prompt or embeddings),
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
    add_random_adapter(pipeline.unet, RANK, alpha, TARGETS)
    return pipeline


def add_random_adapter(network, rank, alpha, targets):
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    network.add_adapter(config)
    with torch.no_grad():
        for i, parameter in enumerate(p for name, p in network.named_parameters() if ".lora_" in name):
            parameter.copy_(0.3 * torch.tensor(normal(*parameter.shape, seed=i)))


def factors_of(network):
    """Layer -> (A, B) of the adapter that a network of a pipeline uses."""
    (adapter,) = network.peft_config
    state = get_peft_model_state_dict(network, adapter_name=adapter)
    tensors = {name: value.numpy() for name, value in state.items()}
    layers = {name.split(".lora_")[0] for name in tensors}
    return {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}


def scales_of(network):
    """The factors on B A that peft uses, one per adapted layer."""
    return list(scales_by_layer(network).values())


def scales_by_layer(network):
    return {name: next(iter(m.scaling.values())) for name, m in network.named_modules() if hasattr(m, "lora_A")}


def settings_of(updates):
    """The ranks and alphas of a network's layers."""
    return {(own.rank, own.alpha_or_rank) for own in updates.values()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), levels=1)


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
    adapted = SamplingModel(open_bundle(model), [diffusers_adapter.folder])
    networks = read_lora(diffusers_adapter.folder, model)
    return SimpleNamespace(
        adapter=networks["unet"],
        file=write_again(networks, tmp_path_factory.mktemp("ours")),
        **vars(sampled(adapted, PromptText(TEXT[0]), PromptText(NEGATIVE))),
    )


def write_again(networks, target):
    """Adapters that were read, in a file of ours."""
    path, metadata = target / FILE_NAME, {STEP_KEY: "500"}
    write_adapter(Adapter(networks), path, LoraFormat.DIFFUSERS, SD_15, metadata=metadata)
    return path


REQUEST = SampleRequest(prompts=(PROMPT,), num_inference_steps=4, guidance_scale=3.0)


def sampled(model, text, negative):
    """Our latents and picture."""
    ((number, latents),) = model.latents(REQUEST, Rows(NOISE, [text], negative))
    return SimpleNamespace(latents=latents, picture=model.picture(latents, number))


def assert_same_picture(ours, pipeline, **prompt):
    latents, picture = sample(pipeline, **prompt)
    error = relative_error(ours.latents, latents)
    levels = np.abs(ours.picture.astype(int) - np.rint(picture * 255)).max()
    print(f"latents {error:.1e}, pixels {levels:.0f} levels")
    assert error < LATENTS
    assert levels <= 1


def assert_same_factors(ours, expected):
    assert ours.keys() == expected.keys()
    for layer, own in ours.items():
        assert all(np.array_equal(a, b) for a, b in zip((own.down, own.up), expected[layer], strict=True)), layer


def as_written(updates):
    """What our file holds: the scale is in the factors, because older readers take it for 1."""
    return {layer: folded(own) for layer, own in updates.items()}


def assert_same_but_for_rounding(ours, expected):
    """B was multiplied by a scale that is no power of two, and divided by it."""
    assert ours.keys() == expected.keys()
    for layer, own in ours.items():
        assert np.array_equal(own.down, expected[layer].down), layer
        assert (np.abs(own.up - expected[layer].up) <= 2**-23 * np.abs(own.up)).all(), layer


class TestFromDiffusers:
    def test_every_factor_and_alpha_are_read(self, model, diffusers_adapter):
        networks = read_lora(diffusers_adapter.folder, model)
        assert networks.keys() == {"unet"}
        assert settings_of(networks["unet"]) == {(RANK, ALPHA)}
        assert_same_factors(networks["unet"], factors_of(diffusers_adapter.pipeline.unet))

    def test_it_samples_the_same_picture(self, ours, diffusers_adapter):
        assert_same_picture(ours, diffusers_adapter.pipeline)

    def test_the_adapter_and_its_alpha_show_in_the_picture(self, ours, model):
        """So the comparisons here can fail."""
        assert relative_error(ours.latents, sample(pipeline_of(model))[0]) > 0.1
        assert relative_error(ours.latents, sample(random_peft_adapter(model, RANK))[0]) > 0.1

    def test_the_names_of_the_published_training_scripts_are_read_and_alpha_is_the_rank(self, model, tmp_path):
        """`lora.down` and `lora.up`, without peft's configuration."""
        pipeline = random_peft_adapter(model, RANK)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
        assert any(name.endswith("to_q.lora.down.weight") for name in load_file(tmp_path / FILE_NAME))
        networks = read_lora(tmp_path, model)
        assert networks.keys() == {"unet"}
        assert settings_of(networks["unet"]) == {(RANK, RANK)}
        assert_same_factors(networks["unet"], factors_of(pipeline.unet))

    @pytest.mark.parametrize(
        "option",
        [{"use_rslora": True}, {"alpha_pattern": {"to_q": 5}}, {"rank_pattern": {"to_q": 2}}],
        ids=["alpha over the root of the rank", "alphas by layer", "ranks by layer"],
    )
    def test_every_scaling_of_peft_is_read(self, model, tmp_path, option):
        """Sampled with another strength than it was trained with, it would be another adapter."""
        pipeline = pipeline_of(model)
        pipeline.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **option))
        StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
            unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        )
        scales = scales_by_layer(pipeline.unet)
        assert len(set(scales.values())) == (1 if "use_rslora" in option else 2)
        assert set(scales.values()) != {ALPHA / RANK}
        found = read_lora(tmp_path, model)["unet"]
        assert {layer: own.scale for layer, own in found.items()} == pytest.approx(scales)


class TestToDiffusers:
    @pytest.fixture
    def loaded(self, ours, model, caplog, monkeypatch):
        """A fresh pipeline that has read our file, and what it said about it."""
        pipeline = pipeline_of(model)
        monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            pipeline.load_lora_weights(ours.file.parent)
        return SimpleNamespace(pipeline=pipeline, said=[record.getMessage() for record in caplog.records])

    def test_every_factor_arrives_with_its_scale_and_no_key_is_missing_or_unexpected(self, loaded, ours):
        # All it says is that there is nothing for the text encoder, which is so.
        assert len(set(loaded.said)) == 1
        assert "No LoRA keys associated to CLIPTextModel" in loaded.said[0]
        assert_same_factors(as_written(ours.adapter), factors_of(loaded.pipeline.unet))
        assert scales_of(loaded.pipeline.unet) == [1.0] * len(ours.adapter)

    def test_it_samples_the_same_picture(self, loaded, ours):
        assert_same_picture(ours, loaded.pipeline)

    def test_what_we_write_we_read(self, model, ours):
        assert result_of(ours.file.parent) == Result(ours.file, 500)
        networks = read_lora(ours.file, model)
        assert networks.keys() == {"unet"}
        assert settings_of(networks["unet"]) == {(RANK, ALPHA)}
        assert_same_but_for_rounding(networks["unet"], ours.adapter)


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    """A file that diffusers wrote, the pipeline behind it, our picture with it, and a file of ours of the same."""
    pipeline, folder = random_peft_adapter(model, ALPHA), tmp_path_factory.mktemp("both")
    add_random_adapter(pipeline.text_encoder, TEXT_RANK, TEXT_ALPHA, list(CLIP_TARGETS))
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    values = {}
    for name, network in networks.items():
        values[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
        values[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **values)
    adapted = SamplingModel(open_bundle(model), [folder])
    embeddings = adapted.embeddings(REQUEST)
    picture = sampled(adapted, embeddings[PROMPT], embeddings[""])
    read = read_lora(folder, model)
    return SimpleNamespace(
        pipeline=pipeline,
        networks=networks,
        read=read,
        picture=picture,
        adapted=adapted,
        file=write_again(read, tmp_path_factory.mktemp("ours of both")),
    )


class TestWithATextEncoder:
    """The file holds both networks' parts, of unlike rank and alpha; pictures are sampled from the prompt itself."""

    def test_every_factor_and_alpha_of_both_are_read(self, both):
        assert both.read.keys() == both.networks.keys()
        for name, settings in (("unet", (RANK, ALPHA)), ("text_encoder", (TEXT_RANK, TEXT_ALPHA))):
            assert settings_of(both.read[name]) == {settings}
            assert_same_factors(both.read[name], factors_of(both.networks[name]))

    def test_it_samples_diffusers_picture(self, both):
        assert_same_picture(both.picture, both.pipeline, prompt=PROMPT)

    def test_the_part_of_the_text_encoder_shows_in_the_picture(self, both, model):
        alone = random_peft_adapter(model, ALPHA)
        assert relative_error(both.picture.latents, sample(alone, prompt=PROMPT)[0]) > 100 * LATENTS
        base, adapted = (
            both.adapted.embeddings(replace(REQUEST, lora_scales=(scale,)))[PROMPT].text for scale in (0.0, 1.0)
        )
        assert relative_error(adapted, base) > 0.1

    def test_a_fresh_pipeline_takes_every_factor_and_alpha_from_our_file(self, both, model, caplog, monkeypatch):
        pipeline = pipeline_of(model)
        monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            pipeline.load_lora_weights(both.file.parent)
        assert [record.getMessage() for record in caplog.records] == []
        for name in ("unet", "text_encoder"):
            network = getattr(pipeline, name)
            assert_same_factors(as_written(both.read[name]), factors_of(network))
            assert scales_of(network) == [1.0] * len(both.read[name])
        assert_same_picture(both.picture, pipeline, prompt=PROMPT)

    def test_what_we_write_we_read(self, model, both):
        assert result_of(both.file.parent) == Result(both.file, 500)
        read = read_lora(both.file, model)
        assert read.keys() == both.read.keys()
        for name, updates in read.items():
            assert settings_of(updates) == settings_of(both.read[name])
            assert_same_but_for_rounding(updates, both.read[name])

    def test_the_names_of_the_published_training_scripts_are_read(self, model, both, tmp_path):
        """`lora_linear_layer.down` and `up` in the text encoder, as the scripts write them."""
        layers = {
            f"{name}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
            for name, network in both.networks.items()
        }
        StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
        assert any(name.endswith("q_proj.lora_linear_layer.down.weight") for name in load_file(tmp_path / FILE_NAME))
        for name, updates in read_lora(tmp_path, model).items():
            assert all(own.alpha_or_rank == own.rank for own in updates.values())
            assert_same_factors(updates, factors_by_layer(both.read[name]))


def factors_by_layer(updates):
    return {layer: (own.down, own.up) for layer, own in updates.items()}


def one_layer(name):
    return {"unet": {name: (normal(2, 16), normal(16, 2))}}


def test_an_adapter_of_another_base_is_refused_by_name(model, tmp_path):
    layer = "down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    file = write_run_lora(tmp_path, one_layer(layer))
    said = (
        f"{FILE_NAME} does not fit a LoRA of SD 1.x in the naming of diffusers for {model}: 2 unexpected .unet.{layer}"
    )
    with pytest.raises(WeightError, match=said):
        SamplingModel(open_bundle(model), [file])


def test_an_adapter_for_layers_of_another_size_is_refused(model, tmp_path):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    file = write_run_lora(tmp_path, one_layer(layer))
    with pytest.raises(WeightError, match=r"1 of another shape .*: a weight of \(16, 24\) has no update by \(2, 16\)"):
        SamplingModel(open_bundle(model), [file])

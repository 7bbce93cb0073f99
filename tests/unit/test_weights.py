"""Weights are read strictly and written whole or not at all, and a model folder says what is wrong with it."""

import errno
import inspect
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
from mindspore import nn
from transformers import CLIPConfig, CLIPTextConfig

from dreambooth_ms.atomic import atomic_path, check_writable, write_bytes
from dreambooth_ms.config.train import LossConfig
from dreambooth_ms.diffusion import EdmSpec, NoiseScheduleSpec
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats import model_config
from dreambooth_ms.formats.files.open import read_tensors, write_tensors
from dreambooth_ms.formats.model_config import EDM_SCHEDULER
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel
from dreambooth_ms.models.parameters import initialise, public_parameters, read_parameters
from dreambooth_ms.models.specs import (
    CLIP_L_TEXT,
    OPENCLIP_BIGG_TEXT,
    OPENCLIP_H_TEXT,
    PLAYGROUND_25_VAE,
    SD_15_UNET,
    SD_21_UNET,
    SD_VAE,
    SDXL_REFINER_UNET,
    SDXL_UNET,
    SDXL_VAE,
    ClipSpec,
    ClipTextSpec,
    ClipVisionSpec,
    TransformerSpec,
    UNetSpec,
    VaeSpec,
)
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.ops import Conv2d, Dense
from dreambooth_ms.ops.layout import StoredLayout
from dreambooth_ms.ops.linear import empty_parameter
from dreambooth_ms.weights import bundle as model_folder
from dreambooth_ms.weights.bundle import load_strict
from tests.parity.reference import normal
from tests.tiny_model import IF_UNET, POOLED, write_random_sdxl
from tests.whole_models import tokenizer_folders
from tools.tiny_base.clip_config import write_clip_config
from tools.tiny_base.initialise import RESIDUAL_ENDS, initialise_for_training


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv = Conv2d(3, 4, 3)
        self.dense = nn.CellList([Dense(4, 2), Dense(2, 2)])
        self.logit_scale = empty_parameter(())


SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "conv.bias": (4,),
    "dense.0.weight": (2, 4),
    "dense.0.bias": (2,),
    "dense.1.weight": (2, 2),
    "dense.1.bias": (2,),
    "logit_scale": (),
}


@pytest.fixture
def tensors():
    return {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}


class TestLoading:
    def test_a_network_has_the_public_names_and_shapes_before_and_after_it_is_filled(self, tensors):
        network = Network()
        for _ in range(2):
            assert {name: parameter.shape for name, parameter in public_parameters(network).items()} == SHAPES
            load_strict(network, tensors, "a file")

    def test_what_was_loaded_is_read_back_bit_by_bit(self, tensors):
        network = Network()
        load_strict(network, tensors, "a file")
        found = read_parameters(network)
        assert found.keys() == tensors.keys()
        assert all(np.array_equal(found[name], tensors[name]) for name in tensors)

    def test_half_precision_is_widened(self, tensors):
        network, halves = Network(), {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
        load_strict(network, halves, "a file")
        found = read_parameters(network)
        assert all(found[name].dtype == np.float32 for name in tensors)
        assert all(np.array_equal(found[name], halves[name]) for name in tensors)

    def test_everything_that_does_not_fit_is_listed_together_and_nothing_is_written(self, tensors):
        network = Network()
        load_strict(network, tensors, "a file")
        wrong = {name: tensor + 1 for name, tensor in tensors.items()} | {"lora.weight": np.zeros(3, np.float32)}
        del wrong["dense.0.bias"], wrong["conv.bias"]
        wrong["conv.weight"] = wrong["conv.weight"].reshape(4, 27)
        with pytest.raises(WeightError) as error:
            load_strict(network, wrong, "folder/a file")
        message = str(error.value)
        assert message.startswith("folder/a file does not fit Network")
        assert "2 missing (conv.bias, dense.0.bias)" in message
        assert "1 unexpected (lora.weight)" in message
        assert "1 of another shape (conv.weight: expected (4, 3, 3, 3), got (4, 27))" in message
        found = read_parameters(network)
        assert all(np.array_equal(found[name], tensors[name]) for name in tensors)

    def test_a_long_list_is_cut_and_counted(self, tensors):
        with pytest.raises(WeightError, match=r"7 missing \(.*dense\.1\.bias and 2 more\)"):
            load_strict(Network(), {}, "a file")

    def test_only_the_named_surplus_may_be_there(self, tensors):
        buffers = {"position_ids": np.zeros(1)}
        load_strict(Network(), tensors | buffers, "a file", ignore_unexpected=("position_ids",))
        with pytest.raises(WeightError, match="other_ids"):
            load_strict(Network(), tensors | {"other_ids": np.zeros(1)}, "a file", ignore_unexpected=("position_ids",))

    @pytest.mark.parametrize("kernel_size", [1, 3, 4])
    def test_the_stored_layout_of_a_convolution_loses_no_bit(self, kernel_size):
        layout, weight = StoredLayout(kernel_size), normal(5, 3, kernel_size, kernel_size)
        stored = layout.store(weight)
        assert stored.shape == (5, kernel_size**2 * 3)
        assert np.array_equal(stored[1, :3], weight[1, :, 0, 0])  # the channels of a tap are adjacent
        assert layout.public_shape(stored.shape) == weight.shape
        assert np.array_equal(layout.restore(stored), weight)


class TestStartValues:
    def test_they_are_a_function_of_seed_and_name(self):
        first, again, other = Network(), Network(), Network()
        for network, seed in ((first, 0), (again, 0), (other, 1)):
            initialise(network, seed)
        first, again, other = map(read_parameters, (first, again, other))
        matrices = [name for name in SHAPES if name.endswith("weight")]
        assert all(np.array_equal(first[name], again[name]) for name in SHAPES)
        assert not any(np.array_equal(first[name], other[name]) for name in matrices)
        assert all((first[name] == 0).all() for name in SHAPES if name.endswith("bias"))

    def test_for_training_a_network_starts_as_the_identity_on_its_skip_path(self):
        unet = UNet2DConditionModel(UNET)
        initialise_for_training(unet, 3)
        values = read_parameters(unet)
        ends = {name for name in values if name.endswith(RESIDUAL_ENDS) or name == "conv_out.weight"}
        assert {"conv_out.weight", "mid_block.resnets.0.conv2.weight"} <= ends
        assert {name.split(".attentions.0.")[-1] for name in ends if "mid_block.attentions" in name} == {
            "proj_out.weight",
            "transformer_blocks.0.attn1.to_out.0.weight",
            "transformer_blocks.0.attn2.to_out.0.weight",
            "transformer_blocks.0.ff.net.2.weight",
        }
        for name, value in values.items():
            if value.ndim < 2:
                assert (value == (1 if name.endswith(".weight") else 0)).all(), name
            elif name in ends:
                assert not value.any(), name
            else:
                # Uniform draws: their variance is estimated with a deviation of 0.9 / sqrt(their number).
                estimate = value.var() * np.prod(value.shape[1:])
                assert abs(estimate - 1) < 5 * 0.9 / np.sqrt(value.size), name

    def test_for_training_too_they_are_a_function_of_seed_and_name(self):
        networks = [Network() for _ in range(3)]
        for network, seed in zip(networks, (0, 0, 1), strict=True):
            initialise_for_training(network, seed)
        first, again, other = map(read_parameters, networks)
        matrices = [name for name, shape in SHAPES.items() if len(shape) > 1]
        assert all(np.array_equal(first[name], again[name]) for name in SHAPES)
        assert not any(np.array_equal(first[name], other[name]) for name in matrices)
        assert len({first[name].ravel()[0] for name in matrices}) == len(matrices)

    def test_for_training_words_start_as_loud_as_what_the_layers_may_add(self):
        text_encoder = CLIPTextModel(TEXT)
        initialise_for_training(text_encoder, 3)
        values = read_parameters(text_encoder)
        assert values["text_model.embeddings.token_embedding.weight"].std() == pytest.approx(1, abs=0.1)
        assert values["text_model.embeddings.position_embedding.weight"].std() == pytest.approx(0.02, abs=0.002)
        ends = [name for name in values if name.endswith(("out_proj.weight", "fc2.weight"))]
        assert len(ends) == 2 * TEXT.transformer.num_hidden_layers
        assert not any(values[name].any() for name in ends)


class TestAtomicFiles:
    def test_a_folder_that_can_be_written_to_is_left_as_it_is(self, tmp_path):
        check_writable(tmp_path)
        check_writable(tmp_path / "to be made" / "later")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_made(self, tmp_path):
        file = tmp_path / "file"
        file.touch()
        for folder in (file, file / "below", Path("/proc/x") if sys.platform.startswith("linux") else file):
            with pytest.raises(WeightError, match=r"cannot be written .*; choose another folder"):
                check_writable(folder)

    def test_a_file_appears_with_its_content_and_ordinary_rights(self, tmp_path):
        target = tmp_path / "new folder" / "file.bin"
        write_bytes(target, b"content")
        assert target.read_bytes() == b"content"
        plain = tmp_path / "plain"
        plain.touch()
        assert target.stat().st_mode == plain.stat().st_mode
        assert list(target.parent.iterdir()) == [target]

    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
    def test_a_failure_in_between_leaves_the_old_file_and_no_partial_one(self, tmp_path, failure):
        target = tmp_path / "file.bin"
        target.write_bytes(b"old")
        with pytest.raises(failure), atomic_path(target) as partial:
            partial.write_bytes(b"ne")
            assert partial.parent == tmp_path
            raise failure
        assert target.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [target]

    def test_a_full_disk_is_said_and_leaves_the_old_file(self, tmp_path, monkeypatch):
        target = tmp_path / "file.safetensors"
        write_tensors(target, {"a": np.ones(3, np.float32)})

        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WeightError, match=r"file\.safetensors.*No space left"):
            write_tensors(target, {"a": np.zeros(3, np.float32)})
        assert read_tensors(target)[0]["a"].tolist() == [1, 1, 1]
        assert list(tmp_path.iterdir()) == [target]

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path):
        """Something else stands where the folder should be; unlike missing rights this stops the superuser too."""
        (tmp_path / "taken").touch()
        with pytest.raises(WeightError, match=r"taken/file\.bin.*choose another folder"):
            write_bytes(tmp_path / "taken" / "file.bin", b"content")

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
    def test_a_folder_without_the_right_to_write_is_named(self, tmp_path):
        tmp_path.chmod(0o555)
        with pytest.raises(WeightError, match=r"file\.bin.*choose another folder"):
            write_bytes(tmp_path / "file.bin", b"content")


class TestTensorFiles:
    def test_tensors_keep_their_bits_and_dtypes(self, tmp_path):
        tensors = {
            "single": normal(3, 4),
            "half": normal(2).astype(np.float16),
            "turned": normal(3, 4).T,
            "logit_scale": np.array(2.5, np.float32),
        }
        write_tensors(tmp_path / "file.safetensors", tensors, {"step": "7"})
        found, metadata = read_tensors(tmp_path / "file.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert np.array_equal(found[name], tensor)
        assert metadata == {"format": "pt", "step": "7"}

    @pytest.mark.parametrize("kind", ["truncated", "cut in its header", "empty", "missing", "text", "folder"])
    def test_a_file_that_cannot_be_read_is_named(self, tmp_path, kind):
        path = tmp_path / "weights.safetensors"
        write_tensors(path, {"a": normal(100)})
        content = path.read_bytes()
        if kind in ("missing", "folder"):
            path.unlink()
        if kind == "folder":
            path.mkdir()
        damaged = {
            "truncated": content[:-7],
            "cut in its header": content[:20],
            "empty": b"",
            "text": b"<!DOCTYPE html><title>404 Not Found</title>",
        }
        if kind in damaged:
            path.write_bytes(damaged[kind])
        with pytest.raises(WeightError, match=r"weights\.safetensors: (no such file|not a readable safetensors file)"):
            read_tensors(path)


TEXT = ClipTextSpec(
    transformer=TransformerSpec(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_act="gelu",
        layer_norm_eps=1e-4,
    ),
    vocab_size=30,
    max_position_embeddings=8,
    eos_token_id=29,
)
UNET = UNetSpec(
    block_out_channels=(8, 16),
    has_attention=(False, True),
    num_heads=(1, 2),
    cross_attention_dim=16,
    layers_per_block=1,
    use_linear_projection=True,
    in_channels=5,
    out_channels=6,
    norm_num_groups=4,
    norm_eps=1e-4,
    sample_size=8,
)
VAE = VaeSpec(
    block_out_channels=(8, 16),
    layers_per_block=1,
    in_channels=1,
    latent_channels=5,
    norm_num_groups=4,
    scaling_factor=0.3,
)
SMALL_VAE = replace(VAE, in_channels=3)
UNET_OF_FOLDER = replace(UNET, out_channels=5)
VISION = ClipVisionSpec(
    transformer=TransformerSpec(hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4),
    image_size=24,
    patch_size=6,
)


def write_unet():
    return written(model_config.write_unet_config(UNET))


def write_vae():
    return written(model_config.write_vae_config(VAE, 16))


def write_text():
    return written(model_config.write_text_config(TEXT, 16))


def defaults_of(name):
    """The settings that a class of diffusers has by default, as its configurations say them."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


ODD = [None, [16, 16], "16", 16.0, -1, 0, 10**12, float("nan"), {}, True, ...]


class TestConfigurations:
    @pytest.mark.parametrize(
        "spec",
        [UNET, SD_15_UNET, SD_21_UNET, SDXL_UNET, SDXL_REFINER_UNET, IF_UNET],
        ids=["tiny", "sd15", "sd21", "sdxl", "refiner", "if"],
    )
    def test_a_unet_is_read_as_it_was_written(self, spec):
        assert model_config.read_unet_config(written(model_config.write_unet_config(spec))) == spec

    @pytest.mark.parametrize(
        "spec", [VAE, SD_VAE, SDXL_VAE, PLAYGROUND_25_VAE], ids=["tiny", "sd", "sdxl", "playground"]
    )
    def test_an_autoencoder_is_read_as_it_was_written(self, spec):
        assert model_config.read_vae_config(written(model_config.write_vae_config(spec, 64))) == spec

    @pytest.mark.parametrize("spec", [TEXT, CLIP_L_TEXT, OPENCLIP_H_TEXT], ids=["tiny", "sd1", "sd2"])
    def test_a_text_encoder_is_read_as_it_was_written(self, spec):
        assert model_config.read_text_config(written(model_config.write_text_config(spec, 16))) == spec

    def test_a_text_encoder_with_a_projection_is_read_as_it_was_written(self):
        config = written(model_config.write_text_config(OPENCLIP_BIGG_TEXT, 1280))
        assert config["architectures"] == ["CLIPTextModelWithProjection"]
        assert model_config.read_projected_text_config(config) == OPENCLIP_BIGG_TEXT

    def test_a_scheduler_of_edm_says_its_formulation(self):
        config = {"_class_name": "EDMEulerScheduler", "sigma_max": 120.0, "rho": 5.0, "solver_order": 2}
        assert model_config.read_scheduler_config(config) == EdmSpec(sigma_max=120.0, rho=5.0)
        for wrong in ({"sigma_max": 0.001}, {"sigma_data": 0.0}, {"rho": -7.0}, {"sigma_min": 0.0}):
            with pytest.raises(ConfigError, match=r"expected numbers above 0, and a larger sigma_max"):
                model_config.read_scheduler_config(config | wrong)
        with pytest.raises(WeightError, match=r"prediction_type: expected epsilon or v_prediction, got 'sample'"):
            model_config.read_scheduler_config(config | {"prediction_type": "sample"})

    def test_clip_is_read_as_it_was_written(self):
        spec = ClipSpec(text=TEXT, vision=VISION, projection_dim=20)
        assert model_config.read_clip_config(written(write_clip_config(spec))) == spec

    def test_dino_is_read_as_it_was_published(self):
        """The configuration of facebook/dino-vits16."""
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
        sizes |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
        config = {
            **{"architectures": ["ViTModel"], "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
            **{"image_size": 224, "initializer_range": 0.02, "model_type": "vit", "num_channels": 3},
            **{"patch_size": 16, "qkv_bias": True, "torch_dtype": "float32", "transformers_version": "4.11.0.dev0"},
            **sizes,
        }
        expected = ClipVisionSpec(transformer=TransformerSpec(**sizes), image_size=224, patch_size=16)
        assert model_config.read_vit_config(config) == expected
        for wrong in ({"qkv_bias": False}, {"hidden_act": "relu"}, {"interpolate_pos_encoding": True}):
            with pytest.raises(WeightError, match=next(iter(wrong))):
                model_config.read_vit_config(config | wrong)

    def test_what_says_no_of_blocks_that_it_has_not_is_read(self):
        config = model_config.write_unet_config(UNET) | {"mid_block_only_cross_attention": False}
        assert model_config.read_unet_config(config) == UNET

    def test_an_older_unet_has_the_same_number_of_heads_everywhere(self):
        config = model_config.write_unet_config(UNET) | {"attention_head_dim": 8}
        assert model_config.read_unet_config(config).num_heads == (8, 8)

    def test_a_scheduler_says_what_the_model_predicts(self):
        config = {"prediction_type": "v_prediction", "beta_end": 0.02, "beta_schedule": "linear"}
        expected = NoiseScheduleSpec(prediction_type="v_prediction", beta_end=0.02, beta_schedule="linear")
        assert model_config.read_scheduler_config(config) == expected
        assert model_config.read_scheduler_config({}) == NoiseScheduleSpec()
        with pytest.raises(WeightError, match=r"expected epsilon or v_prediction, got 'sample'"):
            model_config.read_scheduler_config({"prediction_type": "sample"})

    def test_betas_that_are_left_out_are_those_of_the_class(self):
        """As diffusers reads it; every configuration that a class of its own writes is taken."""
        for name in (name for name in dir(diffusers) if name.endswith("Scheduler")):
            config = defaults_of(name)
            if "beta_start" not in config:
                continue
            if name.removesuffix("Scheduler") not in model_config.BETAS:
                with pytest.raises(WeightError, match=f"{name}: for models that are trained in another way"):
                    model_config.read_scheduler_config({"_class_name": name})
                continue
            betas = ("beta_start", "beta_end", "beta_schedule")
            said = model_config.read_scheduler_config({"_class_name": name, "_diffusers_version": "0.39.0", **config})
            left_out = model_config.read_scheduler_config({"_class_name": name})
            assert [getattr(left_out, key) for key in betas] == [config[key] for key in betas]
            assert left_out == said

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler: for"),
            ({"_class_name": "MyScheduler"}, "MyScheduler: for models that are trained in another way"),
            ({"_class_name": ["DDIMScheduler"]}, "for models that are trained in another way"),
            ({"use_flow_sigmas": True}, "use_flow_sigmas True is not known, and may mean"),
            ({"timestep_type": "continuous"}, "timestep_type: expected discrete, got 'continuous'"),
            (
                {"variance_type": "learned"},
                "variance_type: expected null or fixed_small or .* or learned_range, got 'learned'",
            ),
            ({"timestep_spacing": "cosine"}, "expected linspace or leading or trailing, got 'cosine'"),
            ({"steps_offset": "1"}, "steps_offset: expected 0 or a whole number above 0, got '1'"),
            ({"trained_betas": [0.1, "0.2"]}, "trained_betas: expected a list, each a number or null, got"),
            ({"num_train_timesteps": 1e3}, "num_train_timesteps: expected a whole number above 0, got 1000.0"),
            ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas are both"),
            ({"beta_start": float("nan")}, "beta_start: expected a number, got nan"),
            ({"shift": 3.0}, "shift 3.0 is not known, and may mean"),
        ],
    )
    def test_what_no_scheduler_here_follows_is_refused_by_name(self, config, said):
        with pytest.raises(WeightError, match=said):
            model_config.read_scheduler_config(config)

    def test_edms_settings_are_looked_at_too(self):
        model_config.read_scheduler_config(EDM_SCHEDULER)
        for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
            model_config.read_scheduler_config({"_class_name": name, **defaults_of(name)})
        with pytest.raises(WeightError, match=r"rho: expected a number, got None"):
            model_config.read_scheduler_config({**EDM_SCHEDULER, "rho": None})

    @pytest.mark.parametrize(
        ("read", "config", "more", "said"),
        [
            ("unet", write_unet, {"sample_size": None}, "sample_size: expected a whole number above 0, got None"),
            ("unet", write_unet, {"sample_size": [16, 16]}, "sample_size: expected a whole number above 0, got"),
            ("unet", write_unet, {"num_class_embeds": 10}, "num_class_embeds 10 is not known, and may mean another"),
            ("unet", write_unet, {"act_fn": "gelu"}, "act_fn: expected silu beside blocks of these types, got 'gelu'"),
            ("unet", write_unet, {"only_cross_attention": True}, "only_cross_attention: expected False beside blocks"),
            ("unet", write_unet, {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types is not down_block"),
            ("unet", write_unet, {"cross_attention_dim": [8, 8]}, "cross_attention_dim: expected a whole number"),
            ("vae", write_vae, {"use_quant_conv": False}, "use_quant_conv: expected True, got False"),
            ("vae", write_vae, {"use_post_quant_conv": False}, "use_post_quant_conv: expected True, got False"),
            ("vae", write_vae, {"shift_factor": 0.1159}, "shift_factor: expected null or 0, got 0.1159"),
            ("vae", write_vae, {"mid_block_add_attention": False}, "mid_block_add_attention: expected True, got Fal"),
            ("vae", write_vae, {"act_fn": "mish"}, "act_fn: expected silu, got 'mish'"),
            ("vae", write_vae, {"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types and block_out_chan"),
            ("vae", write_vae, {"latents_mean": 5}, "latents_mean: expected a list, each a number or null, got 5"),
            ("vae", write_vae, {"latents_std": [1.0]}, "latents_std: expected 5 numbers, got 1"),
            ("vae", write_vae, {"scaling_factor": float("inf")}, "scaling_factor: expected a number, got inf"),
            ("vae", write_vae, {"out_channels": 4}, "out_channels 4 is not in_channels 1"),
            ("text_encoder", write_text, {"hidden_act": "relu"}, "hidden_act: expected quick_gelu or gelu, got 're"),
            ("text_encoder", write_text, {"hidden_size": None}, "hidden_size: expected a whole number above 0, got No"),
            ("text_encoder", write_text, {"layer_norm_eps": "1e-5"}, "layer_norm_eps: expected a number, got '1e-5'"),
            ("text_encoder", write_text, {"rope_theta": 1e4}, "rope_theta 10000.0 is not known, and may mean another"),
        ],
    )
    def test_a_setting_that_no_network_here_has_is_refused_by_name(self, read, config, more, said):
        with pytest.raises(WeightError, match=said):
            model_config.NETWORK_READERS[read](config() | more)

    @pytest.mark.parametrize(
        ("read", "config"), [("unet", write_unet), ("vae", write_vae), ("text_encoder", write_text)]
    )
    def test_bookkeeping_and_what_is_off_mean_nothing(self, read, config):
        more = {"_diffusers_version": "0.2.4", "_name_or_path": "a/b", "new": None, "newer": False, "newest": []}
        reader = model_config.NETWORK_READERS[read]
        assert reader(config() | more) == reader(config())

    def test_what_transformers_writes_is_known(self):
        for config, read in (
            (CLIPTextConfig(), model_config.read_text_config),
            (CLIPConfig(), model_config.read_clip_config),
            (CLIPTextConfig(projection_dim=64), model_config.read_projected_text_config),
        ):
            read(written(config.to_dict()))

    @pytest.mark.parametrize(
        ("spec", "problems"),
        [
            (replace(UNET, norm_num_groups=3), ["block_out_channels 8 is not a multiple of norm_num_groups 3"]),
            (replace(UNET, num_heads=(1, 3)), ["block_out_channels 16 is not a multiple of attention_head_dim 3"]),
            (replace(UNET, num_heads=(3, 2)), []),
            (replace(UNET, num_heads=(1,)), ["attention_head_dim has 1 entries, block_out_channels 2"]),
            (
                replace(UNET, transformer_layers_per_block=(1, 2, 3)),
                ["transformer_layers_per_block has 3 entries, block_out_channels 2"],
            ),
            (
                replace(UNET, block_out_channels=(), has_attention=(), num_heads=()),
                ["block_out_channels is empty"],
            ),
            (replace(VAE, norm_num_groups=16), ["block_out_channels 8 is not a multiple of norm_num_groups 16"]),
            (
                replace(TEXT, transformer=replace(TEXT.transformer, num_attention_heads=3)),
                ["hidden_size 16 is not a multiple of num_attention_heads 3"],
            ),
            (replace(TEXT, eos_token_id=30), ["eos_token_id 30 is none of 30 tokens (vocab_size)"]),
            *((spec, []) for spec in (UNET, SD_15_UNET, SD_21_UNET, SDXL_UNET, SDXL_REFINER_UNET)),
            *((spec, []) for spec in (VAE, SD_VAE, SDXL_VAE, PLAYGROUND_25_VAE)),
            *((spec, []) for spec in (TEXT, CLIP_L_TEXT, OPENCLIP_H_TEXT, OPENCLIP_BIGG_TEXT)),
        ],
    )
    def test_sizes_that_no_network_has_are_named(self, spec, problems):
        found = list(spec.problems())
        assert found[: len(problems)] == problems
        assert bool(found) == bool(problems)


TOKENS = {"bos_token": "<a>", "eos_token": "<b>", "pad_token": "<b>", "unk_token": "<b>", "model_max_length": 77}


def written(config):
    """What a reader of the JSON file gets: lists for tuples."""
    return json.loads(json.dumps(config))


PARTS = [
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
]


def test_clip_is_loaded_as_it_was_saved(tmp_path):
    """Its temperature has no axis, and must not get one on the way."""
    spec = ClipSpec(text=TEXT, vision=VISION, projection_dim=20)
    network = CLIPModel(spec)
    initialise(network, 0)
    model_folder.save_network(tmp_path, "clip", network, write_clip_config(spec))
    saved, loaded = read_parameters(network), read_parameters(model_folder.load_encoder(tmp_path / "clip", CLIPModel))
    assert loaded.keys() == saved.keys()
    assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
    assert loaded["logit_scale"].shape == ()


class TestModelFolder:
    @pytest.fixture
    def text_encoder(self):
        network = CLIPTextModel(TEXT)
        initialise(network, 0)
        return network

    @pytest.fixture
    def folder(self, tmp_path, text_encoder):
        """Every part is there; only the networks are real."""
        for name in PARTS:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
        (tmp_path / "model_index.json").write_text('{"unet": [], "vae": [], "text_encoder": []}')
        for part, network, config in (
            ("unet", UNet2DConditionModel(UNET_OF_FOLDER), model_config.write_unet_config(UNET_OF_FOLDER)),
            ("vae", AutoencoderKL(VAE), model_config.write_vae_config(VAE, 16)),
            ("text_encoder", text_encoder, model_config.write_text_config(TEXT, 16)),
        ):
            model_folder.save_network(tmp_path, part, network, config)
        return tmp_path

    def test_it_knows_its_networks(self, folder):
        found = model_folder.open_bundle(folder)
        (reader,) = found.text
        assert (found.denoiser.spec, found.codec.spec, reader.spec) == (UNET_OF_FOLDER, VAE, TEXT)
        assert found.schedule.trained() == NoiseScheduleSpec()
        assert found.picture_size == 16
        assert tokenizer_folders(found) == [folder / "tokenizer"]

    def test_a_network_is_loaded_as_it_was_saved(self, folder, text_encoder):
        saved = read_parameters(text_encoder)
        loaded = read_parameters(model_folder.open_bundle(folder).text[0].load())
        assert loaded.keys() == saved.keys()
        assert all(np.array_equal(loaded[name], saved[name]) for name in saved)

    @pytest.mark.parametrize("part", PARTS)
    def test_a_missing_part_is_named(self, folder, part):
        (folder / part).unlink()
        with pytest.raises(WeightError) as error:
            model_folder.open_bundle(folder)
        assert str(folder) in str(error.value)
        assert part.rsplit("/", 1)[-1] in str(error.value)

    @pytest.mark.parametrize("content", ["", "[1, 2]", "<!DOCTYPE html>", "{}"], ids=["empty", "list", "page", "bare"])
    def test_a_configuration_that_says_nothing_is_named(self, folder, content):
        (folder / "unet/config.json").write_text(content)
        with pytest.raises(WeightError, match=r"unet/config\.json"):
            model_folder.open_bundle(folder)

    @pytest.mark.parametrize("name", [name for name in PARTS if name.endswith(".json") and "vocab" not in name])
    def test_odd_values_are_told_and_never_a_traceback(self, folder, name):
        scheduler = model_config.write_scheduler_config(NoiseScheduleSpec())
        for path, content in (
            ("scheduler/scheduler_config.json", scheduler),
            ("tokenizer/tokenizer_config.json", TOKENS),
        ):
            (folder / path).write_text(json.dumps(content))
        good = json.loads((folder / name).read_text())
        for key, value in itertools.product(good, ODD):
            changed = {own: kept for own, kept in (good | {key: value}).items() if kept is not ...}
            (folder / name).write_text(json.dumps(changed))
            try:
                found = model_folder.open_bundle(folder)
                found.latent_shape(64, 64)
                assert found.picture_size < 10**9
            except WeightError as error:
                assert "\n" not in str(error)

    def test_sizes_that_cannot_be_are_told_when_it_is_opened(self, folder):
        config = json.loads((folder / "unet/config.json").read_text()) | {"norm_num_groups": 3}
        (folder / "unet/config.json").write_text(json.dumps(config))
        said = (
            r"unet/config\.json: block_out_channels 8 is not a multiple of norm_num_groups 3; .*: no network has these"
        )
        with pytest.raises(WeightError, match=said):
            model_folder.open_bundle(folder)

    def test_a_scheduler_of_another_formulation_is_refused_when_it_is_opened(self, folder):
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
        with pytest.raises(
            WeightError, match=r"scheduler_config\.json: FlowMatchEulerDiscreteScheduler: for models that"
        ):
            model_folder.open_bundle(folder)

    def test_noise_is_not_taught_to_a_model_with_zero_terminal_snr(self, folder):
        config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
        schedule = model_folder.open_bundle(folder).schedule
        assert schedule.trained().rescale_betas_zero_snr
        with pytest.raises(
            WeightError, match=r"scheduler_config\.json: prediction_type epsilon with zero terminal SNR"
        ):
            schedule.trained(LossConfig(prediction_type="epsilon"))

    def test_a_temperature_beside_a_text_encoder_means_nothing(self, folder):
        file = folder / "text_encoder/model.safetensors"
        more = {"logit_scale": np.float32(4.6), "text_model.embeddings.position_ids": np.arange(8)[None]}
        saved, digest = read_tensors(file)[0], model_folder.open_bundle(folder).text[0].digest()
        write_tensors(file, saved | {name: np.asarray(value) for name, value in more.items()})
        (reader,) = model_folder.open_bundle(folder).text
        loaded = read_parameters(reader.load())
        assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
        assert reader.digest() == digest

    def test_a_variant_that_is_not_there_is_named_beside_what_is(self, folder):
        with pytest.raises(WeightError, match=r"unet/diffusion_pytorch_model\.fp16\.safetensors.*found: config\.json"):
            model_folder.open_bundle(folder, variant="fp16")

    def test_a_tensor_that_belongs_to_no_network_is_told_before_any_is_read(self, folder):
        file = folder / "unet/diffusion_pytorch_model.safetensors"
        write_tensors(file, read_tensors(file)[0] | {"surplus.weight": np.zeros(2, np.float32)})
        with pytest.raises(WeightError, match=r"does not fit a model of SD 2.*1 unexpected \(unet\.surplus\.weight\)"):
            model_folder.open_bundle(folder)

    def test_old_names_and_shapes_of_the_autoencoders_attention_are_read(self, folder):
        file, old = folder / "vae/diffusion_pytorch_model.safetensors", {"to_q": "query", "to_out.0": "proj_attn"}
        saved, before = read_tensors(file)[0], {}
        for name, value in saved.items():
            is_matrix = ".attentions.0.to_" in name and value.ndim == 2
            for new, other in old.items():
                name = name.replace(f".attentions.0.{new}.", f".attentions.0.{other}.")
            before[name] = value[..., None, None] if is_matrix else value
        assert before.keys() != saved.keys()
        digest = model_folder.open_bundle(folder).codec.digest()
        write_tensors(file, before)
        found = model_folder.open_bundle(folder).codec
        loaded = read_parameters(found.load())
        assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
        assert found.digest() == digest

    def test_weights_of_another_network_are_refused(self, folder):
        config = model_config.write_text_config(CLIP_L_TEXT, 16)
        config |= {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
        (folder / "text_encoder/config.json").write_text(json.dumps(config))
        with pytest.raises(WeightError, match=r"text_encoder/model\.safetensors does not fit CLIPTextModel"):
            model_folder.open_bundle(folder).text[0].load()

    @pytest.mark.parametrize("inside", ["", "vae"], ids=["the autoencoder's folder", "a model folder"])
    def test_another_autoencoder_takes_the_place_of_its_own(self, folder, tmp_path_factory, inside):
        other, network = tmp_path_factory.mktemp("other"), AutoencoderKL(SMALL_VAE)
        initialise(network, 7)
        (other / "base").mkdir()
        model_folder.save_network(other / "base", "vae", network, model_config.write_vae_config(SMALL_VAE, 16))
        found = model_folder.open_bundle(folder, vae=other / "base" if inside else other / "base" / "vae")
        assert found.codec.spec == SMALL_VAE
        assert (
            found.opened().network("vae", dict).file == other / "base" / "vae" / "diffusion_pytorch_model.safetensors"
        )
        loaded, saved = read_parameters(found.codec.load()), read_parameters(network)
        assert all(np.array_equal(loaded[name], saved[name]) for name in saved)

    def test_another_autoencoder_that_is_none_is_named(self, folder, tmp_path_factory):
        nothing = tmp_path_factory.mktemp("nothing")
        with pytest.raises(WeightError, match=f"{nothing.name}/diffusion_pytorch_model.safetensors is missing"):
            model_folder.open_bundle(folder, vae=nothing)

    @pytest.mark.parametrize("refiner", [False, True], ids=["base", "refiner"])
    def test_sdxl_is_known_by_its_second_text_encoder(self, tmp_path, refiner):
        found = model_folder.open_bundle(write_random_sdxl(tmp_path, refiner=refiner))
        tokenizers = ("tokenizer_2",) if refiner else ("tokenizer", "tokenizer_2")
        assert tokenizer_folders(found) == [tmp_path / name for name in tokenizers]
        assert (found.num_add_time_ids, found.zeros_for_empty_prompt) == (5 if refiner else 6, not refiner)
        assert [reader.name for reader in found.text] == (["text_encoder"] * (not refiner)) + ["text_encoder_2"]
        assert found.text[-1].spec.projection_dim == POOLED

    @pytest.mark.parametrize(("wider", "count"), [(8, 7), (-16, 4), (1, 0), (None, 0)])
    def test_a_unet_that_reads_other_numbers_than_sdxls_is_refused(self, tmp_path, wider, count):
        config = json.loads((write_random_sdxl(tmp_path) / "unet/config.json").read_text())
        key = "projection_class_embeddings_input_dim"
        config[key] = wider and config[key] + wider
        (tmp_path / "unet/config.json").write_text(json.dumps(config))
        with pytest.raises(WeightError, match=f"its unet reads {count} add_time_ids"):
            model_folder.open_bundle(tmp_path)

    def test_a_second_text_encoder_alone_is_no_sdxl(self, folder):
        (folder / "model_index.json").write_text('{"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}')
        with pytest.raises(WeightError, match="SDXL"):
            model_folder.open_bundle(folder)

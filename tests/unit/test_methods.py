"""What each method trains, and that the folder of a full training is a model folder that diffusers loads as it is."""

import json
from dataclasses import replace
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from mindspore import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from dreambooth_ms.config.train import MethodConfig
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.models.clip import CLIPTextModel
from dreambooth_ms.models.parameters import public_parameters, read_parameters
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.training import methods
from dreambooth_ms.training.checkpoint import ADAPTER, MODEL, Result, result_of
from dreambooth_ms.training.methods import METHODS
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import normal
from tests.tiny_model import write_random_model, write_random_sdxl
from tests.whole_loras import read_lora

STEP = 42


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("base"), levels=1)


@pytest.fixture(scope="module")
def half_base(base, tmp_path_factory):
    """The same base as diffusers saves a variant: in half precision, with a safety checker."""
    folder = tmp_path_factory.mktemp("half")
    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float16)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker(clip).half(), feature_extractor=CLIPImageProcessor()
    )
    pipeline.save_pretrained(folder, variant="fp16")
    return folder


def deeper(bundle):
    """The text encoder of a base with a layer more."""
    spec = bundle.text[0].spec
    return CLIPTextModel(replace(spec, transformer=replace(spec.transformer, num_hidden_layers=2)))


def trained(path, method, text=False, variant=None, **settings):
    """A learner whose trained weights have become others, as by a training."""
    folder = open_bundle(path, variant)
    networks = {"unet": folder.denoiser.load()} | ({"text_encoder": folder.text[0].load()} if text else {})
    config = MethodConfig(method=method, train_text_encoder=text, **settings)
    learner = METHODS[method](
        config, folder, networks["unet"], TextEncoders({"text_encoder": networks["text_encoder"]}) if text else None, 3
    )
    chosen = {id(parameter) for parameter in learner.parameters}
    for network in networks.values():
        for i, one in enumerate(public_parameters(network).values()):
            if id(one.parameter) in chosen:
                one.write(one.read() + 0.1 * normal(*one.shape, seed=i))
    return SimpleNamespace(
        learner=learner, values={name: read_parameters(network) for name, network in networks.items()}
    )


def assert_holds(module, values):
    state = {name: value.numpy() for name, value in module.state_dict().items() if "position_ids" not in name}
    assert state.keys() == values.keys()
    assert all(np.array_equal(state[name], values[name]) for name in values)


class TestTheFolderOfAFullTraining:
    def test_diffusers_loads_sdxl_with_both_text_encoders_trained_and_another_autoencoder(self, tmp_path):
        """But for the end of the first text encoder, which SDXL does not read and nothing may change."""
        path, other = write_random_sdxl(tmp_path / "base"), write_random_sdxl(tmp_path / "other", seed=1)
        folder = open_bundle(path, vae=other)
        encoders = folder.load_text_encoders()
        networks = {"unet": folder.denoiser.load(), **encoders.networks()}
        config = MethodConfig(method="full", train_text_encoder=True)
        learner = METHODS["full"](config, folder, networks["unet"], encoders, 3)
        before = read_parameters(networks["text_encoder"])
        for i, parameter in enumerate(learner.parameters):
            parameter.set_data(parameter + Tensor(0.1 * normal(*parameter.shape, seed=i)))
        assert len({parameter.name for parameter in learner.parameters}) == len(learner.parameters)
        after = read_parameters(networks["text_encoder"])
        kept = {name for name, value in before.items() if np.array_equal(value, after[name])}
        assert kept == {name for name in before if ".layers.1." in name or "final_layer_norm" in name}

        learner.write_result(tmp_path / "run", STEP)
        pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run", add_watermarker=False)
        for name, network in networks.items():
            assert_holds(getattr(pipeline, name), read_parameters(network))
        assert_holds(pipeline.vae, weights_of(StableDiffusionXLPipeline.from_pretrained(other).vae))
        assert pipeline.config.force_zeros_for_empty_prompt
        assert result_of(tmp_path / "run").steps == STEP

    @pytest.mark.parametrize("text", [False, True], ids=["UNet", "UNet and text encoder"])
    def test_diffusers_loads_the_trained_values_and_the_rest_of_the_base(self, base, tmp_path, text):
        run = trained(base, "full", text)
        run.learner.write_result(tmp_path, STEP)
        pipeline, before = (StableDiffusionPipeline.from_pretrained(path) for path in (tmp_path, base))
        rest = {} if text else {"text_encoder": weights_of(before.text_encoder)}
        for name, values in (run.values | rest | {"vae": weights_of(before.vae)}).items():
            assert_holds(getattr(pipeline, name), values)
        assert not np.array_equal(weights_of(before.unet)["conv_in.weight"], run.values["unet"]["conv_in.weight"])
        assert pipeline.scheduler.config == before.scheduler.config
        assert pipeline.tokenizer("a photo").input_ids == before.tokenizer("a photo").input_ids
        assert result_of(tmp_path) == Result(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", STEP)
        assert run.learner.result == result_of(tmp_path).path.relative_to(tmp_path)

    @pytest.mark.parametrize(("precision", "dtype"), [("fp16", DType.F16), ("bf16", DType.BF16), ("fp32", DType.F32)])
    def test_it_has_the_precision_that_was_asked_for(self, half_base, tmp_path, precision, dtype):
        run = trained(half_base, "full", variant="fp16", save_precision=precision)
        run.learner.write_result(tmp_path, STEP)
        bundle = open_bundle(tmp_path)
        assert {tensor.dtype for tensor in bundle.opened().tensors.values()} == {dtype}
        found = read_parameters(bundle.denoiser.load())
        for name, value in run.values["unet"].items():
            assert np.allclose(found[name], value, rtol={"fp16": 1e-3, "bf16": 1e-2, "fp32": 0}[precision], atol=1e-6)

    def test_a_weight_that_is_too_large_for_it_is_named(self, base, tmp_path):
        run = trained(base, "full", save_precision="fp16")
        run.learner.parameters[0].set_data(run.learner.parameters[0] + Tensor(1e6, ms.float32))
        with pytest.raises(WeightError, match=r"holds a number that is too large for F16; choose a wider type$"):
            run.learner.write_result(tmp_path, STEP)
        assert result_of(tmp_path) is None

    def test_we_read_it_as_a_base(self, base, tmp_path):
        run = trained(base, "full", text=True)
        run.learner.write_result(tmp_path, STEP)
        folder = open_bundle(tmp_path)
        for name, network in (("unet", folder.denoiser.load()), ("text_encoder", folder.text[0].load())):
            found = read_parameters(network)
            assert all(np.array_equal(found[key], value) for key, value in run.values[name].items())

    def test_of_a_variant_it_has_plain_names_and_loads_without_naming_one(self, half_base, tmp_path):
        run = trained(half_base, "full", variant="fp16")
        run.learner.write_result(tmp_path, STEP)
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
        before = StableDiffusionPipeline.from_pretrained(half_base, variant="fp16")
        assert_holds(pipeline.unet, run.values["unet"])
        for name in ("vae", "text_encoder", "safety_checker"):
            assert_holds(getattr(pipeline, name), weights_of(getattr(before, name)))
        assert not [path.name for path in tmp_path.rglob("*fp16*")]

    def test_a_safety_checker_that_the_base_names_but_lacks_is_named_no_more(self, base, tmp_path):
        run = trained(base, "full")
        index = json.loads((base / "model_index.json").read_text())
        named = index | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
        (base / "model_index.json").write_text(json.dumps(named))
        try:
            run.learner.write_result(tmp_path, STEP)
        finally:
            (base / "model_index.json").write_text(json.dumps(index))
        assert json.loads((tmp_path / "model_index.json").read_text())["safety_checker"] == [None, None]
        assert_holds(StableDiffusionPipeline.from_pretrained(tmp_path).unet, run.values["unet"])

    def test_a_run_that_was_killed_while_it_wrote_has_no_result(self, base, tmp_path, monkeypatch):
        run = trained(base, "full", text=True)
        save = methods.save_network

        def killed(target, name, *rest):
            if name == "text_encoder":
                raise KeyboardInterrupt
            save(target, name, *rest)

        monkeypatch.setattr(methods, "save_network", killed)
        with pytest.raises(KeyboardInterrupt):
            run.learner.write_result(tmp_path, STEP)
        assert result_of(tmp_path) is None

    def test_a_checkpoint_holds_only_what_was_trained(self, base, tmp_path):
        trained(base, "full", text=True).learner.write_part(tmp_path, STEP)
        assert {path.name for path in tmp_path.iterdir()} == {"unet", "text_encoder"}


class TestWhatIsTrained:
    def test_full_trains_every_weight_of_the_networks(self, base):
        run = trained(base, "full", text=True)
        sizes = {name: sum(value.size for value in values.values()) for name, values in run.values.items()}
        found = {"unet": 0, "text_encoder": 0}
        for one in run.learner.trainables:
            found[one.kind] += one.parameter.size
        assert found == sizes

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_layers_that_are_left_out_of_the_text_encoder_are_not(self, base, method):
        bundle = replace(open_bundle(base), clip_skip=1)
        encoders = TextEncoders({"text_encoder": deeper(bundle)}, 1)
        config = MethodConfig(method=method, train_text_encoder=True)
        learner = METHODS[method](config, bundle, bundle.denoiser.load(), encoders, 3)
        names = {one.parameter.name for one in learner.trainables if one.kind == "text_encoder"}
        assert any("layers.0." in name for name in names)
        assert not any("layers.1." in name for name in names)

    def test_lora_trains_two_factors_of_the_attention_layers_of_the_networks(self, base, tmp_path):
        run = trained(base, "lora", text=True, rank=2, lora_alpha=4)
        assert sum(one.kind == "text_encoder" for one in run.learner.trainables) == 2 * 4
        assert len(run.learner.trainables) == 2 * (32 + 4)
        run.learner.write_result(tmp_path, STEP)
        assert result_of(tmp_path) == Result(tmp_path / "pytorch_lora_weights.safetensors", STEP)
        assert run.learner.result == result_of(tmp_path).path.relative_to(tmp_path)
        for name, updates in read_lora(tmp_path, base).items():
            for layer, update in updates.items():
                assert (update.rank, update.alpha) == (2, 4.0)
                assert np.array_equal(update.down, run.values[name][f"{layer}.lora_A.weight"])
                assert np.array_equal(update.up, run.values[name][f"{layer}.lora_B.weight"])

    def test_a_trained_lora_is_written_as_diffusers_writes_it(self, base, tmp_path):
        """The names of its scripts, and beside them peft's settings, with the layers as they were asked for.

        Alpha is the rank there, since older versions read none; the trained one has a key of our own.
        """
        run = trained(base, "lora", text=True, rank=2, lora_alpha=3, lora_target_modules=["to_v", "attn1.to_q"])
        run.learner.write_part(tmp_path, STEP)
        file = open_tensor_file(tmp_path / "pytorch_lora_weights.safetensors")
        layers = [name.partition(".lora_A.")[0] for name in run.values["unet"] if ".lora_A." in name]
        names = [f"unet.{layer}.lora.{way}.weight" for layer in layers for way in ("down", "up")]
        assert [name for name in file.tensors if name.startswith("unet.")] == names
        text = [name for name in file.tensors if name not in names]
        assert len(text) == 2 * 4
        assert all(".lora_linear_layer." in name and name.startswith("text_encoder.") for name in text)
        common = {"r": 2, "lora_alpha": 2.0, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False}
        common |= {"use_rslora": False}
        targets = {"unet": ["attn1.to_q", "to_v"], "text_encoder": ["k_proj", "out_proj", "q_proj", "v_proj"]}
        settings = {
            f"{part}.{key}": value
            for part in targets
            for key, value in (common | {"target_modules": targets[part]}).items()
        }
        assert list(file.metadata) == ["format", "lora_adapter_metadata", "dreambooth_ms_lora", "dreambooth_ms_step"]
        trained_alphas = {key: value for key, value in json.loads(file.metadata["dreambooth_ms_lora"]).items() if value}
        assert trained_alphas == {
            f"{part}.{key}": own for part in targets for key, own in (("r", 2), ("lora_alpha", 3.0))
        }
        layer = layers[0]
        up = file.tensors[f"unet.{layer}.lora.up.weight"].read()
        assert np.array_equal(up, np.float32(1.5) * run.values["unet"][f"{layer}.lora_B.weight"])
        assert file.metadata["lora_adapter_metadata"] == json.dumps(settings, sort_keys=True)
        assert (file.metadata["format"], file.metadata["dreambooth_ms_step"]) == ("pt", str(STEP))

    @pytest.mark.parametrize("text", [False, True], ids=["UNet", "UNet and text encoder"])
    def test_the_denoiser_names_its_inputs_as_it_reads_them(self, base, text):
        learner = trained(base, "lora", text).learner
        assert (learner.text_encoders is not None) is text
        names = ("sample", "timestep", "input_ids" if text else "encoder_hidden_states")
        assert learner.denoiser.input_names == names

    @pytest.mark.parametrize("method", ["lora", "full"])
    @pytest.mark.parametrize("text", [False, True], ids=["UNet", "UNet and text encoder"])
    def test_every_trained_weight_has_a_name_of_its_own(self, base, method, text):
        names = [parameter.name for parameter in trained(base, method, text).learner.parameters]
        assert len(names) == len(set(names))

    def test_a_rank_above_a_layer_of_the_text_encoder_is_refused(self, base):
        with pytest.raises(ConfigError, match="--rank: expected 1 to 16"):
            trained(base, "lora", text=True, rank=20)

    def test_an_empty_folder_has_no_result(self, tmp_path):
        assert result_of(tmp_path) is None

    @pytest.mark.parametrize("name", [ADAPTER, MODEL], ids=str)
    def test_a_result_that_cannot_be_read_is_none(self, tmp_path, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"cut")
        assert result_of(tmp_path) == Result(path, 0)


def weights_of(module):
    """All values of a network of a pipeline, which are never changed."""
    return {name: value.numpy() for name, value in module.state_dict().items() if "position_ids" not in name}

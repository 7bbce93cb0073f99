"""Commands take a base and adapters of any format: the same weights give the same bits, whatever file they are in."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreambooth_ms.adapters.attach import attach
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.train import MethodConfig
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.models.parameters import read_parameters
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.prompts import ModelAdapters
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.training.methods import METHODS
from dreambooth_ms.weights.bundle import open_bundle
from dreambooth_ms.weights.model_writing import plan_model
from tests.small_specs import SMALL
from tests.whole_loras import FILES, random_lora, read_lora, write_lora_as
from tests.whole_models import (
    RUNNING,
    RUNNING_SD2,
    SUFFIXES,
    digests_of,
    random_model,
    roles_of,
    tokenizer_folders,
    write_in_shards,
)

PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One model in every format that is read."""
    folder = tmp_path_factory.mktemp("bases")
    model = random_model(RUNNING, folder)
    paths = {}
    for form, suffix in SUFFIXES.items():
        paths[form.value] = folder / f"{form.value}{suffix}"
        plan_model(model, form).write(paths[form.value])
    state = load_file(paths["stability"])
    paths["pickled"], paths["bin"], paths["shards"] = folder / "pickled.ckpt", folder / "bin", folder / "shards"
    torch.save({"state_dict": state, "global_step": 5}, paths["pickled"])
    write_in_shards(model, paths["shards"], 1_000_000)
    plan_model(model, Format.DIFFUSERS).write(paths["bin"])
    for file in paths["bin"].rglob("*.safetensors"):
        name = file.name.replace("model.", "pytorch_model.") if file.name.startswith("model.") else file.name
        torch.save(load_file(file), file.with_name(name.replace(".safetensors", ".bin")))
        file.unlink()
    return paths


@pytest.fixture(scope="module")
def opened(bases):
    return {name: open_bundle(path) for name, path in bases.items()}


class TestBases:
    @pytest.mark.parametrize("name", ["stability", "mindone", "pickled", "bin", "shards"])
    def test_it_is_the_same_model_as_the_folder(self, opened, name):
        found, folder = opened[name], opened["diffusers"]
        assert roles_of(found) == roles_of(folder)
        assert found.picture_size == folder.picture_size
        assert digests_of(found) == digests_of(folder)

    def test_digests_tell_weights_apart(self, opened):
        assert len(set(digests_of(opened["stability"]).values())) == 3

    @pytest.mark.parametrize("name", ["stability", "bin"])
    def test_networks_are_filled(self, opened, name):
        roles = (lambda bundle: bundle.denoiser, lambda bundle: bundle.codec, lambda bundle: bundle.text[0])
        for role in roles:
            found, expected = (read_parameters(role(opened[one]).load()) for one in (name, "diffusers"))
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[key], expected[key]) for key in expected)

    def test_a_whole_tower_of_sd_2_is_read_without_its_last_layer(self, tmp_path):
        model, naming = random_model(RUNNING_SD2, tmp_path), naming_of(Format.STABILITY, RUNNING_SD2)
        unused = {name: StoredTensor.of(np.ones(naming.shapes[name], np.float32)) for name in naming.optional}
        assert any(".layers.2." in name for name in unused)
        whole = replace(model, tensors={**model.tensors, **unused})
        plan_model(whole, Format.STABILITY).write(tmp_path / "model.safetensors")
        found = read_parameters(open_bundle(tmp_path / "model.safetensors").text[0].load())
        expected = model.of_part("text_encoder")
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name].read()) for name in expected)

    def test_a_folders_own_tokenizer_wins(self, opened, bases):
        own, on_board = (tokenizer_folders(opened[form])[0] for form in ("diffusers", "stability"))
        assert own == bases["diffusers"] / "tokenizer"
        assert (on_board / "merges.txt").is_file()

    def test_what_a_base_lacks_is_told(self, tmp_path, bases):
        model = random_model(RUNNING, tmp_path, parts=("unet", "text_encoder"))
        plan_model(model, Format.STABILITY).write(tmp_path / "model.safetensors")
        with pytest.raises(WeightError, match="holds no vae; convert it into a folder and put them into that"):
            open_bundle(tmp_path / "model.safetensors")


def train(base, output, pictures):
    return main(
        ["train", "--pretrained_model_name_or_path", str(base), "--instance_data_dir", str(pictures), "--seed", "3"]
        + ["--instance_prompt", PROMPT, "--resolution", "32", "--train_batch_size", "1", "--max_train_steps", "1"]
        + ["--ms_mode", "1", "--output_dir", str(output)]
    )


def test_a_single_file_is_trained_on(bases, tmp_path, pynative):
    """What is trained on is the same as from the folder: the tests of bases say so."""
    (tmp_path / "dog").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "dog" / "0.png")
    assert train(bases["stability"], tmp_path / "run", tmp_path / "dog") == 0
    trained = read_lora(tmp_path / "run", bases["stability"])["unet"]
    assert all(np.abs(own.up).max() > 0 for own in trained.values())


def embedding_of(model, scale=1.0):
    return model.embeddings(SampleRequest(prompts=(PROMPT,), lora_scales=(scale,)))[PROMPT]


LINEAR = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.2", ".q_proj", ".out_proj")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return random_lora(RUNNING, tmp_path_factory.mktemp("lora"), choose=lambda layer: layer.endswith(LINEAR))


@pytest.fixture(scope="module")
def files(lora):
    """The same LoRA in every format."""
    paths = {}
    for form in (LoraFormat.KOHYA, LoraFormat.PEFT, LoraFormat.MINDONE):
        paths[form] = lora.path / f"{form.name}{FILES.get(form, '.safetensors')}"
        write_lora_as(lora, paths[form], form)
    return paths


@pytest.fixture(scope="module")
def embedding(opened, files):
    return embedding_of(SamplingModel(opened["diffusers"], [files[LoraFormat.KOHYA]]))


class TestAdapters:
    @pytest.mark.parametrize("form", [LoraFormat.PEFT, LoraFormat.MINDONE], ids=lambda form: form.value)
    def test_every_format_adapts_alike(self, opened, files, lora, embedding, form):
        model = SamplingModel(opened["diffusers"], [files[form]])
        assert np.abs(embedding_of(model).text - embedding.text).max() < 1e-5
        assert np.abs(embedding_of(model, 0.0).text - embedding.text).max() > 0.01
        parameters = read_parameters(model.denoiser)
        for layer, own in lora.adapter.parts["unet"].items():
            scale = parameters[f"{layer}.lora_scale"]
            update = scale * parameters[f"{layer}.lora_B.weight"] @ parameters[f"{layer}.lora_A.weight"]
            assert np.abs(update - own.delta(update)).max() < 1e-5, layer

    def test_updates_of_convolutions_are_in_their_weights(self, opened, tmp_path):
        """1x1 ones, which kohya adapts in every SD 1 model, and 3x3 ones."""
        ends = (".proj_in", ".conv1", ".to_q")
        lora = random_lora(RUNNING, tmp_path, choose=lambda layer: layer.endswith(ends))
        write_lora_as(lora, tmp_path / "lora.safetensors", LoraFormat.KOHYA)
        base = read_parameters(opened["diffusers"].denoiser.load())
        network = opened["diffusers"].denoiser.load()
        adapters = ModelAdapters(opened["diffusers"], [tmp_path / "lora.safetensors"])
        attached = attach({"unet": network}, adapters.opened)
        attached.set_scales((0.5,))
        now = read_parameters(network)
        convolutions = {name: own for name, own in lora.adapter.parts["unet"].items() if not name.endswith(".to_q")}
        assert len(convolutions) > 4
        for layer, own in convolutions.items():
            expected = base[f"{layer}.weight"] + 0.5 * own.delta(base[f"{layer}.weight"])
            assert np.abs(now[f"{layer}.weight"] - expected).max() < 1e-6, layer
        attached.set_scales((0.0,))
        now = read_parameters(network)
        assert all(np.array_equal(now[name], base[name]) for name in base)

    def test_a_lora_for_another_family_says_what_does_not_fit(self, opened, tmp_path):
        """Its sizes are its own, so that it is no LoRA for SDXL either."""
        lora = random_lora(SMALL["sdxl"], tmp_path)
        write_lora_as(lora, tmp_path / "lora.safetensors", LoraFormat.KOHYA)
        with pytest.raises(WeightError, match=r"does not fit a LoRA of SD 1.x in the naming of kohya .*unexpected"):
            SamplingModel(opened["diffusers"], [tmp_path / "lora.safetensors"])


def test_the_result_of_a_full_training_from_a_single_file_is_a_whole_folder(opened, tmp_path):
    base = opened["mindone"]
    unet = base.denoiser.load()
    METHODS["full"](MethodConfig(method="full"), base, unet, None, 0).write_result(tmp_path / "full", 1)
    result = open_bundle(tmp_path / "full")
    assert digests_of(result) == digests_of(base)
    assert result.denoiser.spec == base.denoiser.spec
    assert result.schedule.trained() == base.schedule.trained()
    assert tokenizer_folders(result) == [tmp_path / "full/tokenizer"]


def test_files_that_hold_a_model_but_no_base(tmp_path, bases, capsys):
    assert train(tmp_path / "none.safetensors", tmp_path / "out", tmp_path) == 2
    assert "no such file or folder" in capsys.readouterr().err
    write_safetensors(tmp_path / "x.safetensors", open_bundle(bases["diffusers"]).opened().of_part("unet"))
    assert train(tmp_path / "x.safetensors", tmp_path / "out", tmp_path) == 2
    assert "this is a UNet alone, in diffusers' naming without its folder" in capsys.readouterr().err

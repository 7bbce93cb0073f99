"""SDXL in single files: trained on, sampled with and merged into as the folder with the same weights, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.train import MethodConfig
from dreambooth_ms.diffusion import EdmSpec, NoiseScheduleSpec
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.open import read_tensors
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.models.parameters import read_parameters
from dreambooth_ms.models.specs import PLAYGROUND_25_VAE, Family
from dreambooth_ms.sampling.schedulers import SCHEDULERS
from dreambooth_ms.training.methods import METHODS
from dreambooth_ms.weights.bundle import open_bundle
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import open_model
from tests.whole_models import RUNNING_SDXL, SUFFIXES, digests_of, random_model, roles_of, tokenizer_folders, values_of

# Two resolutions, of which one has transformers.
UNET = replace(
    RUNNING_SDXL.unet,
    block_out_channels=(32, 64),
    has_attention=(False, True),
    num_heads=(1, 1),
    transformer_layers_per_block=1,
)
SDXL = replace(RUNNING_SDXL, unet=UNET)
REFINER = replace(
    SDXL,
    family=Family.SDXL_REFINER,
    unet=replace(UNET, cross_attention_dim=128, projection_class_embeddings_input_dim=5 * 256 + 128),
    text_encoder=None,
)

PROMPT = "a photo of sks dog"
FILES = [Format.STABILITY, Format.MINDONE]
each_file = pytest.mark.parametrize("form", FILES, ids=lambda form: form.value)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One model in every format."""
    folder = tmp_path_factory.mktemp("bases")
    model = random_model(SDXL, folder)
    paths = {form: folder / f"{form.value}{suffix}" for form, suffix in SUFFIXES.items()}
    for form, path in paths.items():
        plan_model(model, form).write(path)
    return paths


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """A run of one step on all three networks from each of them, and a picture sampled with it."""
    home = tmp_path_factory.mktemp("runs")
    (home / "dog").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 96, 3), np.uint8)
    Image.fromarray(pixels).save(home / "dog" / "0.png")
    for form, base in bases.items():
        run = home / form.value
        trained = main(
            ["train", "--pretrained_model_name_or_path", str(base), "--instance_data_dir", str(home / "dog")]
            + ["--instance_prompt", PROMPT, "--resolution", "64", "--train_batch_size", "1", "--max_train_steps", "1"]
            + ["--train_text_encoder", "--rank", "2", "--seed", "3", "--ms_mode", "1", "--output_dir", str(run)]
        )
        sampled = main(
            ["sample", "--weight", f"{base},{run}", "--prompt", PROMPT, "--num_inference_steps", "2", "--ms_mode", "1"]
            + ["--height", "64", "--width", "64", "--seed", "3", "--output_dir", str(run / "sampled")]
        )
        assert (trained, sampled) == (0, 0)
    return home


def picture_of(run):
    (file,) = (run / "sampled").glob("*.png")
    return np.asarray(Image.open(file))


@each_file
def test_what_is_learnt_from_a_file_is_what_is_learnt_from_the_folder(runs, pynative, form):
    (found, _), (expected, _) = (read_tensors(runs / one.value / FILE_NAME) for one in (form, Format.DIFFUSERS))
    assert {name.partition(".")[0] for name in expected} == {"unet", "text_encoder", "text_encoder_2"}
    assert {name.partition(".")[0] for name, value in expected.items() if ".up." in name and value.any()} == {
        "unet", "text_encoder", "text_encoder_2",
    }  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@each_file
def test_what_is_sampled_from_a_file_is_what_is_sampled_from_the_folder(runs, form):
    expected = picture_of(runs / Format.DIFFUSERS.value)
    assert expected.std() > 1
    assert np.array_equal(picture_of(runs / form.value), expected)


@each_file
def test_a_file_is_opened_as_the_folder(bases, form):
    found, folder = open_bundle(bases[form]), open_bundle(bases[Format.DIFFUSERS])
    assert roles_of(found) == roles_of(folder)
    for field in ("zeros_for_empty_prompt", "num_add_time_ids", "picture_size"):
        assert getattr(found, field) == getattr(folder, field), field
    assert digests_of(found) == digests_of(folder)
    assert len(digests_of(found)) == 4


@each_file
def test_the_refiner_is_opened_with_its_one_text_encoder(tmp_path, form):
    model, path = random_model(REFINER, tmp_path), tmp_path / f"refiner{SUFFIXES[form]}"
    plan_model(model, form).write(path)
    found = open_bundle(path)
    (reader,) = found.text
    assert (reader.name, found.num_add_time_ids, found.zeros_for_empty_prompt) == ("text_encoder_2", 5, False)
    loaded, saved = read_parameters(reader.load()), model.of_part("text_encoder_2")
    assert loaded.keys() == saved.keys()
    assert all(np.array_equal(loaded[name], saved[name].read()) for name in saved)


def test_its_second_tokenizer_fills_short_prompts_with_another_token(bases):
    first, second = tokenizer_folders(open_bundle(bases[Format.STABILITY]))
    assert first != second
    assert all((folder / "merges.txt").is_file() for folder in (first, second))


@each_file
def test_a_trained_adapter_is_merged_into_all_three_networks(bases, runs, tmp_path, form):
    target = tmp_path / f"merged{SUFFIXES[form]}"
    flags = ["--base", str(bases[form]), "--lora", str(runs / form.value), "--target", str(target)]
    assert main(["merge", *flags]) == 0
    before, after = open_model(bases[form]).tensors, open_model(target).tensors
    changed = {name.partition(".")[0] for name in before if not np.array_equal(before[name].read(), after[name].read())}
    assert changed == {"unet", "text_encoder", "text_encoder_2"}


@each_file
def test_a_file_without_its_second_text_encoder_says_so(tmp_path, form):
    parts = ("unet", "vae", "text_encoder")
    path = tmp_path / f"model{SUFFIXES[form]}"
    plan_model(random_model(SDXL, tmp_path, parts=parts), form).write(path)
    with pytest.raises(WeightError, match="holds no text_encoder_2; convert it into a folder"):
        open_bundle(path)


@pytest.fixture(scope="module")
def other():
    return random_model(SDXL, None, seed=1)


@pytest.fixture(scope="module")
def vae(other, tmp_path_factory):
    """Alone in a file, in LDM naming without a prefix, as the published ones are."""
    path, prefix = tmp_path_factory.mktemp("vae") / "vae.safetensors", "first_stage_model."
    tensors = plan_model(other, Format.STABILITY).tensors
    write_safetensors(path, {n.removeprefix(prefix): own for n, own in tensors.items() if n.startswith(prefix)})
    return path


class TestAnotherAutoencoder:
    @pytest.mark.parametrize("form", Format, ids=lambda form: form.value)
    def test_it_may_be_alone_in_a_file(self, bases, other, vae, form):
        found = open_bundle(bases[form], vae=vae)
        assert values_of(found.opened().of_part("vae")) == values_of(other.of_part("vae"))
        assert found.codec.spec == open_bundle(bases[form]).codec.spec
        assert found.opened().of_part("vae").keys() == other.of_part("vae").keys()
        assert found.codec.digest() != open_bundle(bases[form]).codec.digest()

    @pytest.mark.parametrize("form", [Format.DIFFUSERS, Format.STABILITY], ids=lambda form: form.value)
    def test_it_is_in_the_folder_that_a_full_training_writes(self, bases, other, vae, tmp_path, form):
        base = open_bundle(bases[form], vae=vae)
        METHODS["full"](MethodConfig(method="full"), base, base.denoiser.load(), None, 0).write_result(tmp_path, 1)
        result = open_bundle(tmp_path)
        assert values_of(result.opened().of_part("vae")) == values_of(other.of_part("vae"))
        assert result.codec.spec == base.codec.spec
        assert result.text[1].digest() == base.text[1].digest()

    def test_a_base_without_one_is_whole_with_it(self, tmp_path, other, vae):
        parts = ("unet", "text_encoder", "text_encoder_2")
        base = random_model(SDXL, tmp_path, parts=parts)
        plan_model(base, Format.STABILITY).write(tmp_path / "base.safetensors")
        found = open_bundle(tmp_path / "base.safetensors", vae=vae).opened()
        assert found.parts == ("unet", "vae", "text_encoder", "text_encoder_2")
        assert values_of(found.of_part("vae")) == values_of(other.of_part("vae"))

    def test_another_kind_of_file_is_told(self, bases):
        with pytest.raises(WeightError, match="this is a whole model; expected an autoencoder"):
            open_bundle(bases[Format.DIFFUSERS], vae=bases[Format.STABILITY])


def test_playground_in_a_file_opens_and_is_trained_in_its_own_formulation(tmp_path):
    statistics = {"edm_mean": PLAYGROUND_25_VAE.latents_mean, "edm_std": PLAYGROUND_25_VAE.latents_std}
    more = {name: StoredTensor.of(np.array(values, np.float32)) for name, values in statistics.items()}
    tensors = plan_model(random_model(SDXL, tmp_path), Format.STABILITY).tensors
    write_safetensors(tmp_path / "playground.safetensors", {**tensors, **more})
    folder = open_bundle(tmp_path / "playground.safetensors")
    assert folder.schedule.config["sigma_data"] == 0.5
    assert folder.codec.spec.latents_mean == pytest.approx(PLAYGROUND_25_VAE.latents_mean)
    assert folder.schedule.trained() == EdmSpec()


def test_a_file_with_marks_of_velocity_and_zero_terminal_snr_is_trained_and_sampled_so(tmp_path):
    marks = {name: StoredTensor.of(np.zeros(0, np.float32)) for name in ("v_pred", "ztsnr")}
    tensors = plan_model(random_model(SDXL, tmp_path), Format.STABILITY).tensors
    write_safetensors(tmp_path / "marked.safetensors", {**tensors, **marks})
    schedule = open_bundle(tmp_path / "marked.safetensors").schedule
    assert schedule.trained() == NoiseScheduleSpec(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for name in ("ddim", "euler", "dpm++_2m"):
        scheduler = SCHEDULERS[name].create(schedule.config)
        scheduler.set_timesteps(4)
        assert float(scheduler.timesteps[0]) == 999

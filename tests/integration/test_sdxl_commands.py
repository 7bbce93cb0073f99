"""SDXL from photographs to pictures: class pictures, LoRA on all three networks with another autoencoder, samples."""

import shutil

import numpy as np
import pytest
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.numpy import load_file

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.open import read_tensors
from dreambooth_ms.training.checkpoint import STATE
from dreambooth_ms.training.history import read_history
from tests.picture_settings import read_settings
from tests.tiny_model import write_random_sdxl


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, photographs of different sizes, an autoencoder alone in its folder, and a run of two steps."""
    home = tmp_path_factory.mktemp("home")
    write_random_sdxl(home / "base", levels=0)
    shutil.copytree(write_random_sdxl(home / "other", seed=1, levels=0) / "vae", home / "vae")
    (home / "photographs").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 9 * i, 50, 3), np.uint8)
        Image.fromarray(pixels).save(home / "photographs" / f"{i}.png")
    status = main(
        [
            *("train", "--pretrained_model_name_or_path", str(home / "base"), "--output_dir", str(home / "run")),
            *("--pretrained_vae_model_name_or_path", str(home / "vae"), "--resolution", "32", "--seed", "1"),
            *("--instance_data_dir", str(home / "photographs"), "--instance_prompt", "a photo of star"),
            *("--with_prior_preservation", "--class_data_dir", str(home / "class"), "--class_prompt", "a star"),
            *("--num_class_images", "1", "--infer_steps", "2", "--train_text_encoder", "--text_encoder_lr", "5e-6"),
            *("--adam_weight_decay_text_encoder", "1e-3", "--train_batch_size", "1", "--max_train_steps", "2"),
            *("--checkpointing_steps", "2"),
        ]
    )
    assert status == 0
    return home


def test_both_groups_are_trained_on_and_the_missing_class_picture_is_sampled(home):
    history = read_history(home / "run")
    assert [line["step"] for line in history] == [1, 2]
    assert all(line["instance_loss"] > 0 and line["class_loss"] > 0 for line in history)
    assert read_settings(home / "class" / "class-00000.png")["prompt"] == "a star"


def test_the_adapter_has_all_three_networks_and_diffusers_loads_it(home):
    """The layers that SDXL does not read keep their zeros."""
    tensors = load_file(home / "run" / FILE_NAME)
    assert {name.split(".")[0] for name in tensors} == {"unet", "text_encoder", "text_encoder_2"}
    moved = {name.split(".")[0] for name, value in tensors.items() if ".up." in name and value.any()}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}
    unread = [value for name, value in tensors.items() if name.startswith("text_encoder.text_model.encoder.layers.1")]
    assert len(unread) == 8
    pipeline = StableDiffusionXLPipeline.from_pretrained(home / "base", add_watermarker=False)
    pipeline.load_lora_weights(home / "run")
    assert all(network.peft_config for network in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2))


def test_a_checkpoint_keeps_the_two_text_encoders_apart(home):
    state, _ = read_tensors(home / "run" / "checkpoint-2" / STATE)
    layer = "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    assert state[layer].shape != state[f"text_encoder_2.{layer}"].shape
    assert {name for name in state if name.startswith("first_moment.")} == {
        f"first_moment.{name}" for name in state if "moment." not in name
    }


def test_a_picture_is_sampled_with_the_adapter_and_refined(home):
    """At the model's own size."""
    write_random_sdxl(home / "refiner", refiner=True, levels=0)
    status = main(
        [
            *("sample", "--weight", f"{home / 'base'},{home / 'run'}", "--prompt", "a photo of star"),
            *("--num_inference_steps", "4", "--output_dir", str(home / "sampled")),
            *(
                "--refiner",
                str(home / "refiner"),
                "--denoising_end",
                "0.5",
                "--orig_width",
                "64",
                "--orig_height",
                "48",
            ),
        ]
    )
    assert status == 0
    (file,) = (home / "sampled").iterdir()
    settings = read_settings(file)
    assert (settings["refiner"], settings["denoising_end"]) == (str(home / "refiner"), 0.5)
    assert settings["original_size"] == [64, 48]
    picture = np.asarray(Image.open(file))
    assert picture.shape == (32, 32, 3)
    assert picture.std() > 1

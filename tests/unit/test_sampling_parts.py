"""The parts of sampling that are plain functions: tiles, sheets, sizes, flags of the guide."""

import numpy as np
import pytest

from demo.sampling_without_streamlit import sample_flags
from dreambooth_ms.cli.sample import request_of
from dreambooth_ms.config.load import load
from dreambooth_ms.config.sample import SampleConfig, SizesConfig
from dreambooth_ms.sampling.picture_file import first_free_number, grid
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.sampling.schedulers import taken_steps

REQUIRED = ["--pretrained_model_name_or_path", "base", "--prompt", "a star"]


def test_a_sheet_has_the_pictures_row_by_row():
    pictures = [np.full((2, 3, 3), number, np.uint8) for number in range(3)]
    sheet = grid(pictures, columns=2)
    assert sheet.shape == (4, 6, 3)
    assert sheet[:, :, 0].tolist() == [[0] * 3 + [1] * 3] * 2 + [[2] * 3 + [255] * 3] * 2


def test_numbers_go_on_from_what_is_in_the_folder(tmp_path):
    assert first_free_number(tmp_path / "nowhere") == 0
    for name in ("00002.png", "grid-00007.png", "00005.txt"):
        (tmp_path / name).touch()
    assert first_free_number(tmp_path) == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0, 10)),
        ({"strength": 0.75}, (3, 10)),
        ({"strength": 1.0}, (0, 10)),
        ({"denoising_end": 0.8}, (0, 8)),
        ({"denoising_start": 0.8}, (8, 10)),
    ],
)
def test_the_steps_that_are_taken(settings, expected):
    levels = np.arange(901, 0, -100)
    asked = SampleRequest(prompts=("",), num_inference_steps=10, **settings)
    assert taken_steps(levels, asked, 1, 1000, from_picture="strength" in settings) == expected


class TestRequests:
    def test_a_configuration_becomes_a_request(self):
        config = load(
            SampleConfig,
            [
                *(*REQUIRED, "--sd_xl_base_ratios", "0.5", "--num_rows", "2", "--num_cols", "3", "--clip_skip", "1"),
                *("--orig_width", "60", "--orig_height", "70", "--crop_coords_left", "4", "--aesthetic_score", "7"),
                *("--lora", "a,b", "--lora_scale", "1.0,0.6", "--guidance_rescale", "0.7", "--vae_whole_up_to", "512"),
            ],
        )
        asked = request_of(config, ["a star", "a circle"])
        assert asked.prompts == ("a star", "a circle")
        assert (asked.width, asked.height, asked.num_images_per_prompt) == (704, 1408, 6)
        assert asked.lora_scales == (1.0, 0.6)
        assert (asked.clip_skip, asked.guidance_rescale, asked.whole_up_to) == (1, 0.7, 512)
        assert asked.sizes == SizesConfig(orig_width=60, orig_height=70, crop_coords_left=4, aesthetic_score=7.0)

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ([], (0.8, None)),
            (["--high_noise_frac", "0.6"], (0.6, None)),
            (["--refiner_strength", "0.2"], (None, 0.2)),
        ],
    )
    def test_the_refiner_goes_on_unless_the_base_finishes(self, flags, expected):
        wanted = load(SampleConfig, [*REQUIRED, "--refiner", "refiner", *flags]).refinement
        assert (wanted.base_share, wanted.refiner_strength) == expected

    @pytest.mark.parametrize(
        ("flags", "note"),
        [
            (["--strength", "0.5"], "--strength has no effect without --image"),
            (["--eta", "1", "--scheduler", "euler"], "--eta has no effect without --scheduler ddim"),
            (["--refiner_strength", "0.5"], "--refiner_strength has no effect without --refiner"),
            (
                ["--guidance_rescale", "0.5", "--guidance_scale", "1"],
                "--guidance_rescale has no effect with a --guidance_scale of 1 or less",
            ),
        ],
    )
    def test_what_has_no_effect_is_noted(self, flags, note):
        notes = []
        load(SampleConfig, [*REQUIRED, *flags], notes.append)
        assert notes == [note]

    def test_one_scale_in_a_file_needs_no_list(self, tmp_path):
        (tmp_path / "run.yaml").write_text("weights: {lora: [a], lora_scale: 0.5}")
        config = load(SampleConfig, [*REQUIRED, "--config", str(tmp_path / "run.yaml")])
        assert config.weights.lora_scale == [0.5]


class TestFlagsOfTheGuide:
    def loaded(self, *flags):
        return load(SampleConfig, sample_flags(flags))

    def test_without_flags_it_is_sdxl_with_the_guides_settings(self):
        config = self.loaded()
        wanted = config.pictures
        assert config.weights.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
        assert wanted.prompt.startswith("Astronaut in a jungle")
        assert (wanted.num_inference_steps, wanted.guidance_scale, wanted.scheduler) == (40, 5.0, "euler")
        assert (wanted.seed, wanted.output_dir) == (42, "outputs/demo")

    def test_a_training_configuration_stands_for_its_bases(self, capsys):
        path = "configs/training/sd_xl_base_finetune_dreambooth_lora_910b.yaml"
        config = self.loaded("--config", path, "--weight", "base.ckpt,lora.ckpt", "--sd_xl_base_ratios", "1.0")
        assert config.weights.lora == ["lora.ckpt"]
        assert config.pictures.num_inference_steps == 40
        assert f"--config {path}: is for training; pictures are sampled by " in capsys.readouterr().err

    def test_the_refiner_is_named_the_guides_way(self):
        config = self.loaded("--add_pipeline", "True").refinement
        assert config.refiner == "stabilityai/stable-diffusion-xl-refiner-1.0"
        assert (config.denoising_end, config.refiner_strength) == (0.85, None)
        config = self.loaded(
            *("--add_pipeline", "True", "--pipeline_weight", "refiner.ckpt", "--stage2strength", "0.3"),
            *("--finish_denoising", "False"),
        ).refinement
        assert (config.refiner, config.denoising_end, config.refiner_strength) == ("refiner.ckpt", None, 0.3)
        assert self.loaded("--pipeline_weight", "refiner.ckpt").refinement.refiner is None

    def test_samplers_and_guiders_have_the_guides_names(self):
        wanted = self.loaded("--sampler", "HeunEDMSampler", "--guider", "IdentityGuider").pictures
        assert (wanted.scheduler, wanted.guidance_scale) == ("heun", 1.0)

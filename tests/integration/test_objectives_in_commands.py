"""Other objectives by the commands: Playground from photographs to pictures, a model of zero terminal SNR, and what is
refused."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.train import LossConfig, MethodConfig
from dreambooth_ms.formats.folder_layout import INDEX, SCHEDULER, write_json
from dreambooth_ms.formats.model_config import EDM_SCHEDULER
from dreambooth_ms.training.methods import METHODS
from dreambooth_ms.weights.bundle import open_bundle
from tests.picture_settings import read_settings
from tests.tiny_model import write_random_model, write_random_sdxl

STATISTICS = {
    "scaling_factor": 0.5,
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
}
ALL_NOISE = ["--multires_noise_iterations", "6", "--ip_noise_gamma", "0.1", "--noise_offset", "0.05"]
OF_ZERO_SNR = ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]


def changed(path, **values):
    write_json(path, json.loads(path.read_text()) | values)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """SDXL, the same as Playground, SD, and photographs."""
    home = tmp_path_factory.mktemp("home")
    write_random_sdxl(home / "sdxl", levels=0)
    shutil.copytree(home / "sdxl", home / "playground")
    changed(home / "playground" / "vae" / "config.json", **STATISTICS)
    write_json(home / "playground" / SCHEDULER, dict(EDM_SCHEDULER))
    changed(home / "playground" / INDEX, scheduler=["diffusers", EDM_SCHEDULER["_class_name"]])
    write_random_model(home / "sd", levels=0)
    (home / "photographs").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(home / "photographs" / f"{i}.png")
    return home


def train(home, base, output, *more):
    return main(
        [
            *("train", "--pretrained_model_name_or_path", str(home / base), "--output_dir", str(home / output)),
            *("--instance_data_dir", str(home / "photographs"), "--instance_prompt", "a photo of star", "--seed", "1"),
            *("--resolution", "32", "--train_batch_size", "1", *more),
        ]
    )


def sample(home, base, lora, output, *more):
    return main(
        [
            *("sample", "--pretrained_model_name_or_path", str(home / base), "--lora", str(home / lora)),
            *(
                "--prompt",
                "a photo of star",
                "--num_inference_steps",
                "2",
                "--height",
                "32",
                "--width",
                "32",
                "--output_dir",
                str(home / output),
                *more,
            ),
        ]
    )


def marks(path):
    with safe_open(path / FILE_NAME, "np") as file:
        return {name: value for name, value in file.metadata().items() if name.startswith("dreambooth_ms.schedule")}


@pytest.fixture(scope="module")
def playground(home):
    """A run of two steps with class and validation pictures, Huber and all noise, that was stopped after one."""
    classes = ["--with_prior_preservation", "--class_data_dir", str(home / "class"), "--class_prompt", "a star"]
    classes += ["--num_class_images", "1", "--infer_steps", "2", "--validation_prompt", "a star"]
    classes += ["--validation_steps", "1", "--num_validation_images", "1", "--validation_inference_steps", "2"]
    run = partial(train, home, "playground", "run", *classes, *ALL_NOISE, "--loss_type", "huber")
    assert run("--max_train_steps", "1") == 0
    first = (home / "run" / FILE_NAME).read_bytes()
    assert run("--max_train_steps", "2") == 0
    assert (home / "run" / FILE_NAME).read_bytes() != first
    return partial(train, home, "playground", "whole", *classes, *ALL_NOISE, "--loss_type", "huber")


def test_playground_is_trained_by_its_scheduler_alone_and_bit_for_bit_when_it_goes_on(home, playground):
    assert playground("--max_train_steps", "2") == 0
    assert (home / "whole" / FILE_NAME).read_bytes() == (home / "run" / FILE_NAME).read_bytes()
    assert read_settings(home / "class" / "class-00000.png")["scheduler"] == "edm_euler"
    assert read_settings(home / "run" / "validation" / "step-000001-0.png")["scheduler"] == "edm_dpm++_2m"


def test_a_playground_lora_says_so_and_is_refused_on_sdxl(home, playground, capfd):
    assert marks(home / "run") == {"dreambooth_ms.schedule._class_name": "EDMDPMSolverMultistepScheduler"}
    assert sample(home, "playground", "run", "pictures", "--scheduler", "edm_euler") == 0
    assert "EDM" not in capfd.readouterr().err
    assert sample(home, "sdxl", "run", "none") == 2
    assert "was trained in EDM's formulation, and" in capfd.readouterr().err
    assert not (home / "none").exists()
    assert (
        main(
            [
                "convert",
                str(home / "run"),
                str(home / "kohya.safetensors"),
                "--format",
                "kohya",
                "--base",
                str(home / "sdxl"),
            ]
        )
        == 0
    )
    with safe_open(home / "kohya.safetensors", "np") as file:
        assert any(name.startswith("dreambooth_ms.schedule") for name in file.metadata())


@pytest.mark.parametrize(
    ("base", "flags", "said"),
    [
        ("playground", ["--snr_gamma", "5"], "--snr_gamma: {} was trained in EDM's formulation"),
        ("playground", ["--debiased_estimation_loss"], "--debiased_estimation_loss: {} was trained in EDM's"),
        ("playground", ["--loss_type", "huber", "--huber_schedule", "exponential"], "--huber_schedule exponential: {}"),
        ("playground", ["--rescale_betas_zero_snr"], "--rescale_betas_zero_snr: {} was trained in EDM's formulation"),
        (
            "sdxl",
            ["--edm_sampling", "lognormal"],
            "--edm_sampling: {} was trained in DDPM's formulation",
        ),
        ("sdxl", ["--edm_weighting", "edm"], "--edm_weighting: {}"),
        ("sdxl", ["--do_edm_style_training", "--snr_gamma", "5"], "--snr_gamma: --do_edm_style_training weighs rows"),
        ("sdxl", ["--rescale_betas_zero_snr"], "prediction_type epsilon with zero terminal SNR"),
        ("sdxl", ["--min_timestep", "1000"], "--min_timestep 1000: expected less than the 1000 of {}"),
    ],
)
def test_what_means_nothing_to_a_base_is_refused_before_any_work(home, base, flags, said, capfd):
    assert train(home, base, "refused", "--max_train_steps", "1", *flags) == 2
    place = home / base if base == "playground" else home / base / "scheduler/scheduler_config.json"
    error = capfd.readouterr().err
    assert said.format(place) in error
    assert len([line for line in error.splitlines() if "error" in line]) == 1
    assert not (home / "refused").exists()


def test_the_folder_of_a_full_run_has_the_scheduler_that_fits(home):
    """diffusers' pipeline takes it."""
    changed(home / "sd" / SCHEDULER, _class_name="PNDMScheduler", skip_prk_steps=True)
    changes = LossConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True).changes
    base = open_bundle(home / "sd").with_schedule(changes)
    METHODS["full"](MethodConfig(method="full"), base, base.denoiser.load(), None, 0).write_result(home / "full", 1)
    pipeline = StableDiffusionPipeline.from_pretrained(home / "full")
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    expected = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "beta_end": 0.012}
    assert {key: pipeline.scheduler.config[key] for key in expected} == expected
    assert open_bundle(home / "full").schedule.trained() == base.schedule.trained()


def test_a_lora_of_zero_terminal_snr_is_sampled_so(home, capfd):
    assert train(home, "sd", "zero", *OF_ZERO_SNR, "--max_train_steps", "1") == 0
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "True"}
    assert marks(home / "zero") == {f"dreambooth_ms.schedule.{key}": value for key, value in told.items()}
    capfd.readouterr()
    assert sample(home, "sd", "zero", "of_lora") == 0
    error = capfd.readouterr().err
    assert "was trained with prediction_type v_prediction, and is sampled so" in error
    assert "was trained with rescale_betas_zero_snr True, and is sampled so" in error
    settings = read_settings(home / "of_lora" / "00000.png")
    assert settings["prediction_type"] == "v_prediction"
    assert sample(home, "sd", "zero", "by_flags", *OF_ZERO_SNR, "--timestep_spacing", "linspace") == 0
    assert "is sampled so" not in capfd.readouterr().err
    pixels = [np.asarray(Image.open(home / name / "00000.png")) for name in ("of_lora", "by_flags")]
    assert not np.array_equal(*pixels)

"""What other programs read of our files: the metadata of LoRAs, LoRAs in kohya's names, and the text in pictures; and a
picture that is sampled again by its own text."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from sd_parsers import ParserManager

from dreambooth_ms.adapters.file import FILE_NAME, KOHYA_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.conversion import open_lora
from dreambooth_ms.formats.naming.update_kinds import DOWN, UP
from dreambooth_ms.sampling.picture_file import SETTINGS_KEY, validation_pictures
from dreambooth_ms.weights.hub import find_adapter
from tests.picture_settings import read_settings
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject

STAR = "a photo of sks star"


def run(command, *more, **values):
    return main([command, *(part for name, value in values.items() for part in (f"--{name}", str(value))), *more])


def train(home, output, steps, *more):
    flags = {
        "pretrained_model_name_or_path": home / "base",
        "instance_data_dir": home / "photographs",
        "instance_prompt": STAR,
        "class_prompt": "a photo of star",
        "resolution": 32,
        "train_batch_size": 1,
        "checkpointing_steps": 1,
        "seed": 5,
        "prior_preservation": "base_output",
        "max_train_steps": steps,
        "output_dir": home / output / "star",
    }
    return run("train", *more, **flags)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, photographs, and a run of two steps on them with both files."""
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0)
    write_subject(home / "photographs")
    more = ("--output_kohya_format", "--validation_prompt", STAR, "--num_validation_images", "1")
    more += ("--validation_steps", "1", "--validation_inference_steps", "2")
    assert train(home, "run", 2, *more) == 0
    return home


@pytest.fixture(scope="module")
def pictures(home):
    """The folder with three pictures and their sheet."""
    flags = {"num_rows": 1, "num_cols": 3, "num_inference_steps": 2, "scheduler": "euler_a", "seed": 4, "width": 40}
    lora = home / "run" / "star"
    flags |= {"pretrained_model_name_or_path": home / "base", "lora": lora, "lora_scale": 0.5, "height": 32}
    negative = 'blurry, "dark": no'
    assert run("sample", prompt=STAR, negative_prompt=negative, output_dir=home / "pictures", **flags) == 0
    return home / "pictures"


def header_and_values(path):
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


class TestMetadata:
    def test_a_trained_file_says_what_browsers_of_loras_show(self, home):
        with safe_open(home / "run" / "star" / FILE_NAME, "np") as file:
            metadata = file.metadata()
        count = len(list((home / "photographs").glob("*.png")))
        expected = {
            "ss_sd_model_name": "base",
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "ss_resolution": "(32, 32)",
            "ss_steps": "2",
            "ss_num_train_images": str(count),
            "ss_num_reg_images": "0",
            "ss_learning_rate": "0.0005",
            "ss_unet_lr": "0.0005",
            "ss_text_encoder_lr": "None",
            "ss_lr_scheduler": "constant",
            "ss_optimizer": "AdamW",
            "ss_mixed_precision": "no",
            "ss_seed": "5",
            "ss_clip_skip": "None",
            "ss_tag_frequency": json.dumps({"photographs": {STAR: count}}),
            "ss_dataset_dirs": json.dumps({"photographs": {"n_repeats": 1, "img_count": count}}),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": STAR,
            "modelspec.resolution": "32x32",
            "modelspec.trigger_phrase": STAR,
            "modelspec.prediction_type": "epsilon",
            "modelspec.timestep_range": "0,1000",
            "modelspec.encoder_layer": "1",
            "modelspec.tags": "sks",
        }
        told = {name: value for name, value in metadata.items() if name.startswith(("ss_", "modelspec."))}
        assert told.pop("modelspec.hash_sha256") == f"0x{metadata['sshs_model_hash']}"
        assert told == expected
        assert str(home) not in json.dumps(metadata)

    @pytest.mark.parametrize("name", [FILE_NAME, KOHYA_NAME])
    def test_hashes_are_those_of_the_file(self, home, name):
        header, values = header_and_values(home / "run" / "star" / name)
        metadata = header["__metadata__"]
        assert metadata["sshs_model_hash"] == hashlib.sha256(values).hexdigest()
        assert len(metadata["sshs_legacy_hash"]) == 8

    def test_a_stopped_run_writes_the_same_bytes(self, home):
        assert train(home, "stopped", 1) == 0
        assert train(home, "stopped", 2) == 0
        files = [home / run / "star" / FILE_NAME for run in ("run", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_inspect_tells_the_most_of_it_in_a_line(self, home, capfd):
        assert run("inspect", str(home / "run" / "star")) == 0
        line = f"trained: on base, which is sd_v1, at 32x32, steps 2, by {STAR}, words sks"
        assert line in capfd.readouterr().out.splitlines()


class TestTheFileInKohyasNames:
    def test_it_has_the_same_updates_and_what_made_it(self, home):
        folder = home / "run" / "star"
        own, kohyas = (open_lora(folder / name, None) for name in (FILE_NAME, KOHYA_NAME))
        assert (own.form.name, kohyas.form.name) == ("DIFFUSERS", "KOHYA")
        assert own.adapter.updates.keys() == kohyas.adapter.updates.keys()
        for layer, update in own.adapter.updates.items():
            zeros = np.zeros((len(update.factors[UP]), update.factors[DOWN].shape[1]), np.float32)
            assert np.array_equal(update.delta(zeros), kohyas.adapter.updates[layer].delta(zeros))
        assert kohyas.metadata["ss_network_module"] == "networks.lora"
        assert "ss_network_module" not in own.metadata
        assert kohyas.metadata["ss_tag_frequency"] == own.metadata["ss_tag_frequency"]

    def test_the_folder_is_still_one_adapter(self, home):
        assert open_lora(find_adapter(str(home / "run" / "star")), None).form.name == "DIFFUSERS"

    def test_the_end_of_a_run_says_which_program_reads_which_file(self, home, capfd):
        assert train(home, "told", 1) == 0
        folder = home / "told" / "star"
        said = capfd.readouterr().err
        assert f"dreambooth-ms convert {folder / FILE_NAME} {folder / KOHYA_NAME} --format kohya" in said
        assert not (folder / KOHYA_NAME).exists()

    def test_convert_keeps_the_metadata_and_hashes_anew(self, home, tmp_path):
        source = home / "run" / "star" / FILE_NAME
        assert run("convert", str(source), str(tmp_path / "a.safetensors"), "--format", "kohya") == 0
        header, values = header_and_values(tmp_path / "a.safetensors")
        before, metadata = header_and_values(source)[0]["__metadata__"], header["__metadata__"]
        assert metadata["sshs_model_hash"] == hashlib.sha256(values).hexdigest() != before["sshs_model_hash"]
        assert metadata["ss_dataset_dirs"] == before["ss_dataset_dirs"]


class TestTheTextOfPictures:
    def test_other_programs_read_it(self, pictures):
        found = ParserManager().parse(pictures / "00001.png")
        assert found.generator.name == "AUTOMATIC1111"
        assert [one.value for one in found.prompts] == [f"{STAR} <lora:star:0.5>"]
        assert [one.value for one in found.negative_prompts] == ['blurry, "dark": no']
        (sampler,) = found.samplers
        assert (sampler.name, sampler.parameters["steps"], sampler.parameters["seed"]) == ("Euler a", "2", "4")
        assert found.metadata["Size"] == "40x32"

    def test_it_has_model_and_hashes(self, home, pictures):
        with Image.open(pictures / "00000.png") as picture:
            last = picture.text["parameters"].splitlines()[-1]
        digest = header_and_values(home / "run" / "star" / FILE_NAME)[0]["__metadata__"]["sshs_model_hash"]
        assert f'Model: base, Lora hashes: "star: {digest[:12]}", Version: dreambooth-ms ' in last


class TestLike:
    def test_a_picture_is_repeated_to_the_bit(self, home, pictures):
        for number in (0, 2):
            path, out = pictures / f"0000{number}.png", home / f"again{number}"
            assert run("sample", like=path, output_dir=out) == 0
            assert np.array_equal(pixels(path), pixels(out / "00000.png"))
            once = read_settings(path) | {"num_images_per_prompt": 1, "batch_size": 3}
            assert once == read_settings(out / "00000.png")

    def test_of_a_sheet_all_pictures(self, home, pictures):
        assert run("sample", like=pictures / "grid-00000.png", output_dir=home / "sheet") == 0
        names = sorted(path.name for path in pictures.iterdir())
        assert sorted(path.name for path in (home / "sheet").iterdir()) == names
        assert all(np.array_equal(pixels(pictures / name), pixels(home / "sheet" / name)) for name in names)

    def test_a_flag_varies_it(self, home, pictures):
        assert run("sample", like=pictures / "00000.png", seed=7, lora_scale=0, output_dir=home / "varied") == 0
        assert not np.array_equal(pixels(pictures / "00000.png"), pixels(home / "varied" / "00000.png"))
        settings = read_settings(home / "varied" / "00000.png")
        assert (settings["seed"], settings["lora_scale"], settings["scheduler"]) == (7, [0.0], "euler_a")

    def test_a_validation_picture_with_its_adapter(self, home, capfd):
        path = validation_pictures(home / "run" / "star" / "validation")[2][0]
        lora = home / "run" / "star" / "checkpoint-2"
        assert run("sample", like=path, lora=lora, output_dir=home / "validated") == 0
        assert "after step 2: name what was learnt then with --lora (checkpoint-2)" in capfd.readouterr().err
        difference = pixels(path).astype(int) - pixels(home / "validated" / "00000.png")
        assert np.abs(difference).max() <= 1, "the networks of a training round otherwise"

    def test_of_a1111_what_it_says(self, home, tmp_path, capfd):
        text = (
            "a (star:1.2),\nin snow <lora:dog:0.8>\nNegative prompt: dark\nSteps: 2, Sampler: DPM++ 2M, "
            "Schedule type: Automatic, "
            'CFG scale: 5, Seed: 9, Size: 40x32, Model: "a, b", Clip skip: 1, Version: v1.10.1'
        )
        information = PngInfo()
        information.add_text("parameters", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=information)
        assert run("sample", like=tmp_path / "a.png", output_dir=tmp_path / "out") == 2
        assert "--pretrained_model_name_or_path: required" in capfd.readouterr().err
        base = home / "base"
        assert run("sample", like=tmp_path / "a.png", output_dir=tmp_path, pretrained_model_name_or_path=base) == 0
        said = capfd.readouterr().err
        assert "another program drew its noise" in said
        assert "(its own was a, b)" in said
        assert "<lora:dog:0.8> left out of its prompt" in said
        expected = {
            **{"prompt": "a (star:1.2),\nin snow", "negative_prompt": "dark", "num_inference_steps": 2, "seed": 9},
            **{"scheduler": "dpm++_2m_karras", "guidance_scale": 5.0, "width": 40, "height": 32, "clip_skip": 0},
        }
        assert expected.items() <= read_settings(tmp_path / "00000.png").items()

    @pytest.mark.parametrize(
        ("chunks", "message"),
        [
            ({}, "does not say how it was made"),
            ({"parameters": "a workflow of something else"}, "does not say how it was made"),
            ({SETTINGS_KEY: '{"prompt": "a'}, "its settings are damaged"),
            ({SETTINGS_KEY: "[1, 2]"}, "its settings are damaged"),
            ({SETTINGS_KEY: '{"prompt": "a", "number": "x"}'}, "its settings are damaged"),
            ({SETTINGS_KEY: '{"prompt": "a", "seed": 1}'}, "its base is not in it"),
            ({SETTINGS_KEY: '{"prompt": "a", "seed": -1}'}, "seed: expected"),
            ({SETTINGS_KEY: '{"prompt": "a", "sharpness": 1}'}, "does not know sharpness of it"),
        ],
    )
    def test_what_says_nothing_is_refused_in_a_line(self, tmp_path, capfd, chunks, message):
        information = PngInfo()
        for name, text in chunks.items():
            information.add_text(name, text)
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=information)
        assert run("sample", like=tmp_path / "a.png", output_dir=tmp_path / "out") == 2
        assert message in capfd.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_what_is_no_picture_is_refused(self, tmp_path, capfd):
        (tmp_path / "a.png").write_text("text")
        for name, message in (("a.png", "cannot be read"), ("b.png", "no such file")):
            assert run("sample", like=tmp_path / name) == 2
            assert message in capfd.readouterr().err

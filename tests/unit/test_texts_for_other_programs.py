"""The text of A1111 in pictures, and the hashes of LoRAs, by their definitions."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save
from sd_parsers import ParserManager

from dreambooth_ms.config.choices import SamplingScheduler, read_table
from dreambooth_ms.config.load import load
from dreambooth_ms.config.sample import SampleConfig
from dreambooth_ms.config.spellings import choice_of
from dreambooth_ms.errors import DataError
from dreambooth_ms.formats.files.safetensors_file import lora_hashes
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.sampling import picture_text
from dreambooth_ms.sampling.picture_file import SETTINGS_KEY, write_picture
from dreambooth_ms.sampling.picture_text import parameters_of, read_picture_text

SETTINGS = {
    "prompt": "a dog, with a hat: red",
    "negative_prompt": "dark\nblurry",
    "pretrained_model_name_or_path": "models/v1.5, pruned.safetensors",
    "lora": ["runs/dog", "style.safetensors"],
    "lora_scale": [0.5],
    "lora_hashes": ["0123456789abcdef", ""],
    "scheduler": "dpm++_2m_karras",
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "seed": 3,
    "width": 64,
    "height": 32,
    "strength": 0.75,
    "clip_skip": 1,
}
BLACK = np.zeros((8, 8, 3), np.uint8)


def with_text(path, **texts):
    information = PngInfo()
    for name, text in texts.items():
        information.add_text(name, text)
    Image.fromarray(BLACK).save(path, pnginfo=information)
    return path


class TestParameters:
    def test_the_whole_text(self):
        *prompts, last = parameters_of(SETTINGS).split("\n")
        assert prompts == [
            "a dog, with a hat: red <lora:dog:0.5> <lora:style:0.5>",
            "Negative prompt: dark",
            "blurry",
        ]
        start = "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 3, Size: 64x32, "
        more = (
            'Model: "v1.5, pruned", Denoising strength: 0.75, Clip skip: 2, Lora hashes: "dog: 0123456789ab", Version: '
        )
        assert last.startswith(f"{start}{more}dreambooth-ms ")

    def test_another_program_reads_it(self, tmp_path):
        # It does not know that values may be quoted.
        write_picture(
            tmp_path / "a.png", BLACK, SETTINGS | {"pretrained_model_name_or_path": "models/v1-5.safetensors"}
        )
        found = ParserManager().parse(tmp_path / "a.png")
        assert found.prompts[0].value.startswith(SETTINGS["prompt"])
        assert found.negative_prompts[0].value == SETTINGS["negative_prompt"]
        (sampler,) = found.samplers
        assert (sampler.parameters["steps"], sampler.parameters["seed"]) == ("20", "3")
        assert sampler.model.name == "v1-5"

    def test_a_picture_that_says_little_has_what_it_says(self):
        assert parameters_of({"prompt": "a dog", "seed": 1}).startswith("a dog\nSeed: 1, Version: ")

    def test_every_scheduler_has_a_name_and_is_read_by_it(self):
        names = SamplingScheduler.__args__
        table = read_table(Path(picture_text.__file__).with_suffix(".yaml"))["samplers"]
        assert table.keys() == set(names)
        # EDM's are the samplers of their bases, under the same names.
        for name in set(names) - {"edm_euler", "edm_dpm++_2m"}:
            sampler, schedule = table[name]
            assert choice_of("scheduler", names, f"{sampler} {schedule}" if schedule == "Karras" else sampler) == name


class TestReading:
    def test_a_text_without_prompts(self, tmp_path):
        found = read_picture_text(with_text(tmp_path / "a.png", parameters="Steps: 5, Seed: 1, Sampler: Euler a"))
        assert found.values == {"num_inference_steps": "5", "seed": "1", "scheduler": "Euler a"}

    def test_quoted_values_keep_commas_and_quotes(self, tmp_path):
        text = 'a\nSteps: 5, Model: "a \\"b\\", c: d", Seed: 2'
        found = read_picture_text(with_text(tmp_path / "a.png", parameters=text))
        assert found.values["seed"] == "2"
        assert '(its own was a "b", c: d)' in found.notes[0]

    def test_flags_win_and_a_sampler_that_is_not_here_may_be_replaced(self, tmp_path):
        text = "a\nSteps: 5, Sampler: DPM++ 3M SDE, Seed: 2"
        path = with_text(tmp_path / "a.png", parameters=text)
        flags = ["--like", str(path), "--pretrained_model_name_or_path", "base"]

        def read(name):
            assert name == str(path)
            return read_picture_text(path).values

        with pytest.raises(Exception, match=r"scheduler: DPM\+\+ 3M SDE is not in this version; the nearest is"):
            load(SampleConfig, flags, read=read)
        config = load(SampleConfig, [*flags, "--scheduler", "dpm++_sde", "--seed", "4"], read=read)
        assert (config.pictures.scheduler, config.pictures.seed) == ("dpm++_sde", 4)
        assert (config.pictures.prompt, config.pictures.num_inference_steps) == ("a", 5)

    def test_settings_become_flags(self, tmp_path):
        settings = {"prompt": "a", "pretrained_model_name_or_path": "b", "original_size": [4, 2], "target_size": None}
        settings |= {"whole_up_to": 64, "crop_top": 3, "number": 7, "purpose": "class", "batch_size": 4, "rows": 2}
        found = read_picture_text(with_text(tmp_path / "a.png", **{SETTINGS_KEY: json.dumps(settings, sort_keys=True)}))
        assert (found.number, found.purpose, found.notes) == (7, "class", [])
        assert found.values == {
            **{"prompt": "a", "pretrained_model_name_or_path": "b", "orig_width": 4, "orig_height": 2},
            **{"vae_whole_up_to": 64, "crop_coords_top": 3, "batch_size": 2},
        }

    def test_the_first_stage_has_a_quarter_of_the_sides(self, tmp_path):
        settings = {"prompt": "a", "super_resolution": "b", "width": 256, "height": 256}
        found = read_picture_text(with_text(tmp_path / "a.png", **{SETTINGS_KEY: json.dumps(settings)}))
        assert (found.values["width"], found.values["height"]) == (64, 64)

    @pytest.mark.parametrize("text", ['{"number": -1}', '{"original_size": 3}', '{"super_resolution": "a"}', "null"])
    def test_damaged_settings(self, tmp_path, text):
        with pytest.raises(DataError, match="its settings are damaged"):
            read_picture_text(with_text(tmp_path / "a.png", **{SETTINGS_KEY: text}))


class TestHashes:
    def test_they_are_those_of_the_file_that_the_safetensors_library_writes(self):
        values = {name: np.random.default_rng(seed).random((300, 500), np.float32) for seed, name in enumerate("abc")}
        # One name, since the library keeps none of several in order.
        content = save(values, {"ss_steps": "2"})
        (length,) = struct.unpack("<Q", content[:8])
        tensors = {name: StoredTensor.of(value) for name, value in values.items()}
        assert lora_hashes(tensors, {"ss_steps": "2", "format": "pt"}) == {
            "sshs_model_hash": hashlib.sha256(content[8 + length :]).hexdigest(),
            "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
            "modelspec.hash_sha256": "0x" + hashlib.sha256(content[8 + length :]).hexdigest(),
        }

    def test_the_older_one_of_a_small_file_is_of_nothing(self):
        hashes = lora_hashes({"a": StoredTensor.of(np.ones(3, np.float32))}, {})
        assert hashes["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]

"""The text of A1111 in pictures, what LoRAs say of their run, and their hashes, by their definitions."""

import hashlib
import json
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

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
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.records import Concept, Record, Source
from dreambooth_ms.errors import DataError
from dreambooth_ms.formats.files.safetensors_file import lora_hashes
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.models.specs import Family
from dreambooth_ms.sampling import picture_text
from dreambooth_ms.sampling.picture_file import SETTINGS_KEY, write_picture
from dreambooth_ms.sampling.picture_text import parameters_of, read_picture_text
from dreambooth_ms.training.run_metadata import run_metadata

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


class TestRunMetadata:
    """Without networks: what a run of several subjects on one file says."""

    def test_several_subjects_a_file_and_new_words(self, tmp_path):
        (tmp_path / "sd21.safetensors").write_bytes(b"base")
        spec = SimpleNamespace(family=Family.SD2)
        schedule = SimpleNamespace(config={"prediction_type": "v_prediction", "num_train_timesteps": 500})
        base = SimpleNamespace(
            path=tmp_path / "sd21.safetensors", schedule=schedule, opened=lambda: SimpleNamespace(spec=spec)
        )
        config = load(
            TrainConfig,
            [
                *("--pretrained_model_name_or_path", f"{tmp_path}/sd21.safetensors", "--concepts_list", "list.json"),
                *("--output_dir", f"{tmp_path}/both", "--clip_skip", "1", "--train_text_encoder", "--seed", "3"),
                *("--text_encoder_lr", "5e-5", "--use_8bit_adam", "--max_timestep", "400"),
            ],
        )
        named = [
            ("10_dog", "sks dog", "instance", ("sks dog, snow", "dog")),
            ("cats", "zwx cat", "instance_2", ("zwx",)),
        ]
        named.append(("class", "a dog, a cat", "class", ("a dog, a cat",)))
        concepts = [
            Concept(name, (Record(Path(f"{folder}/0.png"), "", (8, 8), captions),) * 2, group=name.split("_")[0],
                    repeats=Fraction("2.5") if folder == "10_dog" else Fraction(1))
            for folder, _, name, captions in named
        ]  # fmt: skip
        sources = [
            Source(tmp_path / folder, prompt, concept)
            for (folder, prompt, _, _), concept in zip(named, concepts, strict=True)
        ]
        told = run_metadata(config, base, sources, concepts)
        expected = {
            "ss_sd_model_name": "sd21.safetensors",
            "ss_new_sd_model_hash": hashlib.sha256(b"base").hexdigest(),
            "ss_base_model_version": "sd_v2",
            "ss_v2": "True",
            "ss_num_train_images": "7",
            "ss_num_reg_images": "2",
            "ss_text_encoder_lr": "5e-05",
            "ss_optimizer": "AdamW8bit",
            "ss_clip_skip": "2",
            "ss_tag_frequency": json.dumps({"10_dog": {"sks dog": 2, "snow": 2, "dog": 2}, "cats": {"zwx": 2}}),
            "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
            "modelspec.prediction_type": "v",
            "modelspec.timestep_range": "0,400",
            "modelspec.encoder_layer": "2",
            "modelspec.trigger_phrase": "sks dog, zwx cat",
            "modelspec.tags": "sks, zwx",
        }
        assert expected.items() <= told.items()
        assert json.loads(told["ss_dataset_dirs"])["10_dog"] == {"n_repeats": 2.5, "img_count": 2}
        assert str(tmp_path) not in json.dumps(told)

    def test_a_family_that_kohyas_scripts_do_not_know_has_no_version_and_no_model_spec(self):
        opened = SimpleNamespace(spec=SimpleNamespace(family=Family.IF))
        base = SimpleNamespace(path=Path("folder"), schedule=SimpleNamespace(config={}), opened=lambda: opened)
        flags = ["--pretrained_model_name_or_path", "DeepFloyd/IF-I-XL-v1.0", "--concepts_list", "list.json"]
        told = run_metadata(load(TrainConfig, flags), base, [], [])
        assert told["ss_sd_model_name"] == "IF-I-XL-v1.0"
        assert not [name for name in told if name.startswith("modelspec.") or name == "ss_base_model_version"]

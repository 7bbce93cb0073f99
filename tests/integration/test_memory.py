"""Autoencoder and text encoder are gone before the first step."""

import gc

from dreambooth_ms.cli import train as command
from dreambooth_ms.models.clip import CLIPTextModel
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject


def test_only_the_unet_is_in_memory_when_training_starts(tmp_path, monkeypatch):
    gc.collect()
    before, alive = {id(thing) for thing in gc.get_objects()}, []

    def look_instead_of_training(*_):
        gc.collect()
        networks = (AutoencoderKL, CLIPTextModel, UNet2DConditionModel)
        alive.extend(type(thing) for thing in gc.get_objects() if type(thing) in networks and id(thing) not in before)

    monkeypatch.setattr(command, "train", look_instead_of_training)
    write_subject(tmp_path / "photographs")
    arguments = {
        "pretrained_model_name_or_path": write_random_model(tmp_path / "base", levels=0),
        "instance_data_dir": tmp_path / "photographs",
        "instance_prompt": "a photo of sks star",
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a photo of star",
        "num_class_images": 1,
        "infer_steps": 1,
        "resolution": 32,
        "max_train_steps": 1,
        "output_dir": tmp_path / "run",
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command.run([*flags, "--with_prior_preservation", "--center_crop"])
    assert alive == [UNet2DConditionModel]

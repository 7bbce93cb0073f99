"""A run with another kind of adapter goes on from its checkpoint bit for bit, and its result is read again."""

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.training.checkpoint import STATE
from dreambooth_ms.weights.bundle import open_bundle
from tests.tiny_model import write_random_model

KINDS = {
    "PiSSA and LoRA+": "--init_lora_weights pissa --loraplus_lr_ratio 4 --use_rslora True --train_text_encoder True",
    "LoCon": "--adapter locon --lora_target_modules to_q conv1 proj_in --rank_pattern {'to_q':2} --conv_alpha 1",
    "DoRA": "--adapter dora --lora_target_modules to_q to_v",
    "LoHa": "--adapter loha --lora_target_modules to_k to_out.0",
    "LoKr": "--adapter lokr --lora_target_modules to_q to_v --rank 2 --lokr_factor 4",
    "OFT": "--adapter oft --lora_target_modules to_q to_v --oft_block_size 8",
}
RANKS = {"PiSSA and LoRA+": {8}, "LoCon": {2, 4}, "LoKr": {0, 2}, "OFT": {0}}
"""Of what each writes, 0 where there is none; else 4."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_random_model(tmp_path / "base", levels=0)
    (tmp_path / "photographs").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photographs" / f"{number}.png")
    command = (
        "train --pretrained_model_name_or_path base --instance_data_dir photographs --instance_prompt star --seed 1"
    )
    command += (
        f" --resolution 32 --train_batch_size 1 --max_train_steps 3 --checkpointing_steps 1 {KINDS[kind]} --output_dir"
    )
    words = [word.replace("'", '"') for word in command.split()]
    assert main([*words, "whole"]) == 0
    assert main([*words, "second", "--resume_from_checkpoint", "whole/checkpoint-1"]) == 0
    states = [(tmp_path / folder / "checkpoint-3" / STATE).read_bytes() for folder in ("whole", "second")]
    assert states[0] == states[1]
    model = open_bundle(tmp_path / "base").opened().spec
    ranks = {update.rank for update in open_adapter(tmp_path / "second", [model]).adapter.updates.values()}
    assert ranks == RANKS.get(kind, {4})

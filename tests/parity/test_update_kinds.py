"""Updates of every kind in files that lycoris-lora and peft write, and in those that we write for them.

The references compute in float64 with the numbers of the file; ours is float32.
"""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.adapters.writing import write_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.weights.model_writing import plan_model
from tests.update_layers import LAYERS, disturb, error, network_of, torch_layer, weight_of, weights_of
from tests.whole_models import RUNNING, random_model

TOLERANCE = 1e-6
DORA = {"lora_dim": 4, "alpha": 2, "weight_decompose": True}
LYCORIS = {
    "LoRA with a middle factor": (LoConModule, {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "DoRA": (LoConModule, DORA),
    "DoRA of columns": (LoConModule, DORA | {"wd_on_out": False}),
    "LoHa": (LohaModule, {"lora_dim": 4, "alpha": 2}),
    "LoHa with cores": (LohaModule, {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "LoHa with DoRA's norms": (LohaModule, DORA),
    "LoKr": (LokrModule, {"lora_dim": 2, "alpha": 1}),
    "LoKr of products": (LokrModule, {"lora_dim": 2, "alpha": 1, "use_tucker": True, "decompose_both": True}),
    "LoKr of whole factors": (LokrModule, {"lora_dim": 100, "alpha": 1, "factor": 8}),
    "OFT": (DiagOFTModule, {"lora_dim": 8}),
    "OFT with a bound": (DiagOFTModule, {"lora_dim": 8, "constraint": 0.01, "rescaled": True}),
    "IA3": (IA3Module, {}),
    "IA3 of inputs": (IA3Module, {"train_on_input": True}),
    "differences": (FullModule, {}),
}


@pytest.fixture(scope="module")
def weights():
    return weights_of()


@contextmanager
def in_double():
    """Inside, lycoris-lora casts nothing to float32, which it does before it inverts a matrix."""
    torch.set_default_dtype(torch.float64)
    with patch.object(torch.Tensor, "float", lambda tensor: tensor):
        yield
    torch.set_default_dtype(torch.float32)


def lycoris_file(kind, weights, path, prefix="lora_unet_"):
    """A file of LyCORIS; returns what it makes of each weight."""
    cell, options = LYCORIS[kind]
    tensors, changed = {}, {}
    for layer, weight in weights.items():
        base = torch_layer(weight, torch.float32)
        module = cell("x", base, 1.0, **options)
        if cell is FullModule:
            module.apply_to()
        disturb(module, 0.01 if "OFT" in kind else 0.1)
        own = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
        for name, value in (own or module.state_dict()).items():
            if "org" not in name and name != "scalar":
                tensors[f"{prefix}{layer.replace('.', '_')}.{name}"] = value.detach().contiguous()
        base.double()
        with in_double():
            changed[layer] = weight_of(module.double(), weight)
    save_file(tensors, path)
    return changed


@pytest.mark.parametrize("kind", LYCORIS)
def test_we_take_what_lycoris_writes_and_write_it_again(tmp_path, weights, kind):
    path = tmp_path / "a.safetensors"
    changed = lycoris_file(kind, weights, path)
    opened = open_adapter(path, [RUNNING])
    found = opened.adapter.parts["unet"]
    assert found.keys() == weights.keys()
    errors = {name: error(found[name].delta(own), changed[name] - own) for name, own in weights.items()}
    print(kind, opened.kind, {name: f"{one:.1e}" for name, one in errors.items()})
    assert max(errors.values()) < TOLERANCE
    write_adapter(opened.adapter, tmp_path / "b.safetensors", LoraFormat.KOHYA_DIFFUSERS, RUNNING)
    before, after = load_file(path), load_file(tmp_path / "b.safetensors")
    assert before.keys() - after.keys() <= {n for n in before if n.endswith(".alpha")}
    assert after.keys() - before.keys() <= {n for n in after if n.endswith(".alpha")}
    for name, value in after.items():
        if name in before:
            assert np.array_equal(value.numpy().reshape(before[name].shape), before[name].numpy()), name
            assert value.shape == before[name].shape or value.numel() == 1, name


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_names_of_either_spelling(tmp_path, weights, prefix):
    changed = lycoris_file("LoHa", weights, tmp_path / "a.safetensors", prefix)
    found = open_adapter(tmp_path / "a.safetensors", [RUNNING]).adapter.parts["unet"]
    assert max(error(found[name].delta(own), changed[name] - own) for name, own in weights.items()) < TOLERANCE


LINEAR = LAYERS[:2]
PEFT = {
    "DoRA": (LAYERS, LoraConfig(r=4, lora_alpha=2, use_dora=True)),
    "DoRA with patterns": (
        LAYERS,
        LoraConfig(r=4, use_dora=True, use_rslora=True, rank_pattern={"to_k": 2}, alpha_pattern={"conv1": 16}),
    ),
    "LoHa": (LAYERS, LoHaConfig(r=4, alpha=2, rank_pattern={"to_k": 2}, alpha_pattern={"conv1": 1})),
    "LoHa with cores": (LAYERS, LoHaConfig(r=4, alpha=2, use_effective_conv2d=True)),
    "LoKr": (LAYERS, LoKrConfig(r=2, alpha=4)),
    "LoKr of products": (LAYERS, LoKrConfig(r=2, alpha=4, decompose_both=True, use_effective_conv2d=True)),
    "LoKr of whole factors": (LAYERS, LoKrConfig(r=16, alpha=4, decompose_factor=4)),
    "LoKr by an odd factor": (LAYERS, LoKrConfig(r=2, alpha=4, decompose_factor=16)),
    "OFT": (LAYERS, OFTConfig(oft_block_size=8)),
    "OFT of as many blocks": (LAYERS, OFTConfig(r=4, oft_block_size=0, num_cayley_neumann_terms=3)),
    "OFT by one term": (LINEAR, OFTConfig(oft_block_size=8, num_cayley_neumann_terms=2)),
    "OFT exactly": (LAYERS, OFTConfig(oft_block_size=8, use_cayley_neumann=False)),
    "OFT with a bound": (LAYERS, OFTConfig(oft_block_size=8, coft=True, eps=1e-2)),
    "OFT of one block": (LAYERS, OFTConfig(oft_block_size=8, block_share=True)),
}


def peft_model(weights, config):
    config.target_modules = {name.rpartition("attn1.")[2] if "attn1" in name else name for name in weights}
    return get_peft_model(network_of(weights, torch.float32), config)


def merged_weights(model, weights):
    network = model.double().merge_and_unload()
    return {name: network.get_submodule(name).weight.detach().numpy() for name in weights}


@pytest.mark.parametrize("kind", PEFT)
def test_we_take_the_folders_of_peft_and_it_takes_ours(tmp_path, weights, kind):
    layers, config = PEFT[kind]
    own = {name: weights[name] for name in layers}
    model = peft_model(own, config)
    disturb(model)
    model.save_pretrained(tmp_path / "theirs")
    changed = merged_weights(model, own)
    opened = open_adapter(tmp_path / "theirs", [RUNNING])
    found = opened.adapter.parts["unet"]
    assert (found.keys(), opened.notes) == (own.keys(), [])
    errors = {name: error(found[name].delta(value), changed[name] - value) for name, value in own.items()}
    print(kind, opened.kind, {name: f"{one:.1e}" for name, one in errors.items()})
    assert max(errors.values()) < TOLERANCE
    write_adapter(opened.adapter, tmp_path / "ours", LoraFormat.PEFT, RUNNING)
    again = PeftModel.from_pretrained(network_of(own, torch.float32), tmp_path / "ours")
    for name, value in merged_weights(again, own).items():
        assert error(value - own[name], changed[name] - own[name]) < TOLERANCE, name
    back = open_adapter(tmp_path / "ours", [RUNNING]).adapter.parts["unet"]
    for name, value in own.items():
        assert np.array_equal(back[name].delta(value), found[name].delta(value)), name


def test_diffusers_draws_by_our_dora_and_we_read_its_own(tmp_path):
    """One adapter, saved by diffusers, read by us, written again, and loaded by diffusers beside the model."""
    plan_model(random_model(RUNNING, tmp_path), Format.DIFFUSERS).write(tmp_path / "base")
    first = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    networks, saved = {"unet": first.unet, "text_encoder": first.text_encoder}, {}
    for part, network in networks.items():
        targets = ["to_q", "to_out.0", "conv1", "proj_in"] if part == "unet" else ["q_proj", "fc1"]
        network.add_adapter(LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=targets))
        disturb(network)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(network)
        saved[f"{part}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", **saved)
    opened = open_adapter(tmp_path / "theirs", [RUNNING])
    assert (opened.kind, opened.notes) == ("DoRA", [])
    write_adapter(opened.adapter, tmp_path / "ours.safetensors", LoraFormat.DIFFUSERS_PEFT, RUNNING)
    second = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    second.load_lora_weights(tmp_path / "ours.safetensors")
    flags = ["--base", str(tmp_path / "base"), "--lora", str(tmp_path / "theirs"), "--target", str(tmp_path / "merged")]
    assert main(["merge", *flags]) == 0
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    base = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    latents, tokens = torch.randn(1, 4, 16, 16), torch.arange(77)[None] % RUNNING.text_encoder.vocab_size

    def noise(pipeline):
        with torch.no_grad():
            return pipeline.unet(latents, 500, pipeline.text_encoder(tokens)[0]).sample.numpy()

    expected, plain = noise(first), noise(base)
    errors = {
        name: error(noise(own) - plain, expected - plain) for name, own in {"loaded": second, "merged": merged}.items()
    }
    print(errors)
    assert max(errors.values()) < 1e-3

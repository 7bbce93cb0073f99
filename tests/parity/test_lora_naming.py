"""LoRA files under our names are taken by diffusers' and peft's own converters, and theirs by us, with every number.

The specs have every name of the published models; only the widths are small.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import state_dict_utils
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.writing import file_tensors
from dreambooth_ms.formats.model_config import write_text_config, write_unet_config
from dreambooth_ms.formats.naming.lora_formats import LoraFormat, lora_layers, recognise_lora
from tests.parity.reference import normal
from tests.small_specs import SMALL
from tests.whole_loras import factor_shapes, lora_update

FAMILIES = ["sd15", "sd21", "sdxl"]
RANK = 2
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def random_factors(model, choose):
    factors = {}
    for seed, (layer, weight) in enumerate(lora_layers(model).items()):
        if choose(layer):
            down, up = factor_shapes(weight, RANK)
            factors[layer] = lora_update(normal(*down, seed=2 * seed), normal(*up, seed=2 * seed + 1), 1.0 + seed % 3)
    return factors


def tensors(form, model, updates):
    """A file of ours as torch has it."""
    return {name: torch.tensor(value) for name, value in file_tensors(Adapter.of(updates), form, model).items()}


def in_peft_names(state):
    """What diffusers makes of a file before it gives it to peft: `<part>.<layer>.lora_A.weight`."""
    parts = {}
    for name, value in state.items():
        part, _, inner = name.partition(".")
        parts.setdefault(part, {})[inner] = value
    for part, inner in parts.items():
        if part == "unet":
            converted = state_dict_utils.convert_unet_state_dict_to_peft(inner)
        else:
            converted = state_dict_utils.convert_state_dict_to_peft(
                state_dict_utils.convert_state_dict_to_diffusers(inner)
            )
        parts[part] = converted
    return {f"{part}.{name}": value for part, inner in parts.items() for name, value in inner.items()}


def assert_same(found, factors):
    assert found.keys() == {f"{layer}.{end}" for layer in factors for end in ("lora_A.weight", "lora_B.weight")}
    for layer, own in factors.items():
        assert np.array_equal(found[f"{layer}.lora_A.weight"].numpy(), own.down), layer
        assert np.array_equal(found[f"{layer}.lora_B.weight"].numpy(), own.up), layer


def read(state, model):
    """Our reading of a file of torch tensors."""
    plan = recognise_lora({name: tuple(value.shape) for name, value in state.items()}, "a file", [model])
    return {layer: Update(own) for layer, own in plan.read(lambda name: state[name].numpy()).items()}


class TestDiffusers:
    @pytest.mark.parametrize("form", [LoraFormat.KOHYA, LoraFormat.KOHYA_DIFFUSERS], ids=["native", "diffusers layers"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_takes_kohyas_names_and_alphas(self, family, form):
        model = SMALL[family]
        factors = random_factors(
            model, lambda layer: ".attentions." in layer or ".resnets." in layer or "text" in layer
        )
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
            tensors(form, model, factors),
            unet_config=SimpleNamespace(layers_per_block=model.unet.layers_per_block),
        )
        assert_same(in_peft_names(state), factors)
        assert sorted(alphas.values()) == sorted(layer.alpha for layer in factors.values())

    @pytest.mark.parametrize(
        "form", [LoraFormat.DIFFUSERS, LoraFormat.DIFFUSERS_PROCESSORS], ids=["current", "processors"]
    )
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_takes_its_own_names(self, family, form):
        model = SMALL[family]
        factors = random_factors(model, lambda layer: layer.endswith(ATTENTION) or "text" in layer)
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors(form, model, factors))
        assert alphas is None
        assert_same(in_peft_names(state), factors)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_names_it_shares_with_peft_are_the_public_ones(self, family):
        model = SMALL[family]
        factors = random_factors(model, lambda layer: True)
        assert_same(tensors(LoraFormat.DIFFUSERS_PEFT, model, factors), factors)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_we_take_what_it_writes_for_kohya(self, family):
        """Its alpha is always the rank, and its first text encoder always "te1"."""
        model = SMALL[family]
        factors = random_factors(model, lambda layer: layer.endswith(ATTENTION) or "text" in layer)
        state = state_dict_utils.convert_state_dict_to_kohya(tensors(LoraFormat.DIFFUSERS_PEFT, model, factors))
        found = read(state, model)
        assert found.keys() == factors.keys()
        for layer, own in found.items():
            assert own.alpha == RANK
            assert np.array_equal(own.down, factors[layer].down)
            assert np.array_equal(own.up, factors[layer].up)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_we_take_what_its_scripts_write(self, family):
        model = SMALL[family]
        factors = random_factors(model, lambda layer: layer.endswith(ATTENTION) or ".self_attn." in layer)
        peft = tensors(LoraFormat.DIFFUSERS_PEFT, model, factors)
        state = {}
        for part in {name.partition(".")[0] for name in peft}:
            own = {name.removeprefix(f"{part}."): value for name, value in peft.items() if name.startswith(f"{part}.")}
            converted = state_dict_utils.convert_state_dict_to_diffusers(own)
            state |= {f"{part}.{name}": value for name, value in converted.items()}
        assert not state.keys() & peft.keys()
        found = read(state, model)
        assert found.keys() == factors.keys()
        assert all(np.array_equal(found[layer].up, own.up) for layer, own in factors.items())


@pytest.fixture(scope="module", params=["unet", "text_encoder"])
def adapted(request):
    """A small network with an adapter of peft in every kind of layer."""
    model = SMALL["sd15"]
    if request.param == "unet":
        config = write_unet_config(model.unet) | {"norm_num_groups": 1, "attention_head_dim": 1}
        network = UNet2DConditionModel.from_config(config)
        targets = ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "time_emb_proj"]
    else:
        network = CLIPTextModel(CLIPTextConfig(**write_text_config(model.text_encoder, 8)))
        targets = ["q_proj", "fc2"]
    torch.manual_seed(0)
    adapted = get_peft_model(network, LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False))
    return SimpleNamespace(network=adapted, part=request.param, model=model)


class TestPeft:
    @pytest.mark.parametrize("with_adapter", [False, True], ids=["saved", "in memory"])
    def test_we_take_its_names(self, adapted, with_adapter):
        saved = get_peft_model_state_dict(adapted.network)
        state = {name: value for name, value in adapted.network.state_dict().items() if ".lora_" in name}
        assert state.keys().isdisjoint(saved)
        found = read(state if with_adapter else saved, adapted.model)
        assert {layer.partition(".")[0] for layer in found} == {adapted.part}
        assert 2 * len(found) == len(saved)
        for layer, own in found.items():
            name = f"base_model.model.{layer.removeprefix(adapted.part + '.')}"
            assert np.array_equal(own.down, saved[f"{name}.lora_A.weight"].numpy())
            assert np.array_equal(own.up, saved[f"{name}.lora_B.weight"].numpy())

    def test_it_takes_our_names(self, adapted):
        saved = {name: value.clone() for name, value in get_peft_model_state_dict(adapted.network).items()}
        doubled = {layer: lora_update(2 * own.down, 2 * own.up) for layer, own in read(saved, adapted.model).items()}
        written = tensors(LoraFormat.PEFT, adapted.model, doubled)
        assert written.keys() == saved.keys()
        result = set_peft_model_state_dict(adapted.network, written)
        assert not result.unexpected_keys
        assert not [name for name in result.missing_keys if ".lora_" in name]
        now = get_peft_model_state_dict(adapted.network)
        assert all(torch.equal(now[name], 2 * saved[name]) for name in saved)
        set_peft_model_state_dict(adapted.network, saved)

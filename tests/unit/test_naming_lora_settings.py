"""Rank and alpha beside the tensors mean what they mean to peft."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dreambooth_ms.adapters.peft_settings import lora_settings, settings_alpha
from dreambooth_ms.errors import WeightError


def network():
    return torch.nn.ModuleDict(
        {"first": torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8), "to_k": torch.nn.Linear(8, 8)})}
        | {"second": torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})}
    )


def scales_in_peft(config):
    """Layer -> (rank, factor on B A)."""
    model = get_peft_model(network(), config)
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "scaling")
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"to_q": 3}},
        {"alpha_pattern": {"first.to_q": 3, "to_q": 5}, "rank_pattern": {"second.to_q": 2}},
        {"rank_pattern": {"to_k": 1}},
    ],
    ids=["plain", "rank-stabilised", "by ending", "by layer", "by rank"],
)
def test_the_scale_is_pefts(options):
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["to_q", "to_k"], **options)
    written = json.loads(json.dumps(config.to_dict(), default=list))
    for layer, (rank, scale) in scales_in_peft(config).items():
        assert settings_alpha(written, layer, rank, "a file") / rank == pytest.approx(scale)


def test_peft_takes_what_we_write():
    layers = {"first.to_q": (4, 4.0), "first.to_k": (4, 8.0), "second.to_q": (2, 4.0)}
    settings = lora_settings(layers)
    assert (settings["r"], settings["lora_alpha"]) == (4, 4.0)
    assert settings["target_modules"] == ["to_k", "to_q"]
    assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({"second.to_q": 2}, {"to_k": 8.0})
    scales = scales_in_peft(LoraConfig(**settings))
    assert scales == {layer: (rank, alpha / rank) for layer, (rank, alpha) in layers.items()}
    for layer, (rank, alpha) in layers.items():
        assert settings_alpha(settings, layer, rank, "a file") == alpha


def test_settings_that_say_nothing_leave_the_alpha_open():
    assert settings_alpha({}, "first.to_q", 4, "a file") is None
    assert settings_alpha({"lora_alpha": None, "alpha_pattern": None}, "first.to_q", 4, "a file") is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_alpha": "8"}, "lora_alpha '8' is not a number"),
        ({"lora_alpha": True}, "lora_alpha True is not a number"),
        ({"lora_alpha": math.inf}, "lora_alpha inf is not a number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "is not the name of a layer"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern is not an object"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(settings, said):
    with pytest.raises(WeightError) as error:
        settings_alpha(settings, "first.to_q", 4, "x.safetensors")
    assert "x.safetensors: " in str(error.value)
    assert said in str(error.value)

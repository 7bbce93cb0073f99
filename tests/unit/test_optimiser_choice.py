"""Flags become the optimiser that they name, with its hyperparameters and what text encoders have of their own."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.training.flat_vectors import AdamW8bit, Prodigy
from dreambooth_ms.training.methods import Trainable, choose_optimiser
from dreambooth_ms.training.optimisers import Adafactor, AdamW, Hyperparameters

REQUIRED = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "dog", "--instance_prompt", "a sks dog"]
BETAS = ["--adam_beta1", "0.8", "--adam_beta2", "0.95", "--adam_epsilon", "1e-6", "--adam_weight_decay", "0.1"]


def chosen(*flags):
    """The optimiser of one weight of the UNet and one of a text encoder."""
    weights = [Parameter(Tensor(np.zeros(2, np.float32)), name=name) for name in ("unet", "text")]
    trainables = [Trainable(weight, kind) for weight, kind in zip(weights, ("unet", "text_encoder"), strict=True)]
    return choose_optimiser(load(TrainConfig, [*REQUIRED, *flags], lambda note: None), trainables)


@pytest.mark.parametrize(
    ("flags", "kind", "hyperparameters"),
    [
        ([], AdamW, Hyperparameters()),
        (BETAS, AdamW, Hyperparameters(0.8, 0.95, 0.1, 1e-6)),
        (["--use_8bit_adam", *BETAS], AdamW8bit, Hyperparameters(0.8, 0.95, 0.1, 1e-6)),
        (["--optimizer", "adamw"], AdamW, Hyperparameters()),
        (["--optimizer", "adafactor"], Adafactor, Hyperparameters()),
        (
            ["--optimizer", "adafactor", "--adafactor_scale_parameter", "--adam_weight_decay", "0"],
            Adafactor,
            Hyperparameters(weight_decay=0.0, scale_parameter=True),
        ),
        (["--optimizer", "prodigy"], Prodigy, Hyperparameters()),
        (
            ["--optimizer", "prodigy", *BETAS, "--prodigy_beta3", "0.7"],
            Prodigy,
            Hyperparameters(0.8, 0.95, 0.1, 1e-6, 0.7),
        ),
        (["--optimizer", "prodigy", "--no-prodigy_decouple"], Prodigy, Hyperparameters(decouple=False)),
        (
            ["--optimizer", "prodigy", "--prodigy_use_bias_correction", "False"],
            Prodigy,
            Hyperparameters(use_bias_correction=False),
        ),
        (
            ["--optimizer", "prodigy", "--no-prodigy_safeguard_warmup"],
            Prodigy,
            Hyperparameters(safeguard_warmup=False),
        ),
    ],
)
def test_flags_choose_the_optimiser_and_its_hyperparameters(flags, kind, hyperparameters):
    optimiser = chosen(*flags)
    assert (type(optimiser), optimiser.hyperparameters) == (kind, hyperparameters)


OF_TEXT = [
    *("--train_text_encoder", "--learning_rate", "1e-3", "--adam_weight_decay", "0.1"),
    *("--adam_weight_decay_text_encoder", "0.02"),
]


@pytest.mark.parametrize("kind", ["AdamW", "adafactor"])
def test_text_encoders_have_a_rate_and_a_decay_of_their_own(kind):
    optimiser = chosen("--optimizer", kind, *OF_TEXT, "--text_encoder_lr", "2e-4")
    assert optimiser.rate_factors == pytest.approx((1, 0.2))
    decays = optimiser.decays if kind == "adafactor" else [0.1 * factor for factor in optimiser.decay_factors]
    assert decays == pytest.approx((0.1, 0.02))


def test_of_prodigy_text_encoders_have_a_decay_of_their_own():
    assert [vector.decay for vector in chosen("--optimizer", "prodigy", *OF_TEXT).vectors] == pytest.approx([0.1, 0.02])


def test_of_8bit_adamw_text_encoders_have_a_rate_and_a_decay_of_their_own():
    vectors = chosen("--use_8bit_adam", *OF_TEXT, "--text_encoder_lr", "2e-4").vectors
    assert [(vector.rate_factor, vector.decay_factor) for vector in vectors] == [
        pytest.approx((1, 1)),
        pytest.approx((0.2, 0.2)),
    ]

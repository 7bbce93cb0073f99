"""With --gradient_checkpointing the gradients are those without, and activations are computed again.

PyNative mode needs no compilation, so that most are compared there.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import ParameterTuple, Tensor, nn

from dreambooth_ms.adapters.cross_attention import free_cross_attention
from dreambooth_ms.adapters.layer_updates import LayerUpdate
from dreambooth_ms.adapters.lora import (
    DropoutState,
    adaptable_layers,
    initialise_lora,
    inject,
    inject_lora,
    lora_trainables,
)
from dreambooth_ms.models.clip import CLIPTextModel
from dreambooth_ms.models.parameters import initialise, public_parameters
from dreambooth_ms.models.specs import ClipTextSpec
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.models.unet import Segments, UNet2DConditionModel
from dreambooth_ms.ops import SumOfSquares
from dreambooth_ms.runtime.device import set_up_device
from dreambooth_ms.training.methods import TextConditioned
from dreambooth_ms.training.step import DiffusionLoss, loss_and_gradients
from tests.tiny_model import POOLED, SDXL_TEXT, SDXL_TEXT_2, SDXL_UNET, TEXT, UNET, of_levels

ROWS, TOKENS, WORDS = 2, 5, 7
SIDE = 8
SMALL_UNET = of_levels(UNET, 1)
DEEP_SDXL = of_levels(replace(SDXL_UNET, transformer_layers_per_block=(1, 2)), 1)
"""Transformers of two layers, each of which is a segment of its own."""

KINDS = (
    ("to_q", LayerUpdate("dora", 2, 3.0)),
    ("to_k", LayerUpdate("loha", 2, 3.0)),
    ("to_v", LayerUpdate("lokr", 1, 3.0, -1)),
    ("to_out.0", LayerUpdate("oft", 2, 3.0, 4)),
    ("conv1", LayerUpdate("locon", 2, 3.0, has_middle=True)),
    ("conv2", LayerUpdate("dora", 2, 3.0)),
    ("q_proj", LayerUpdate("lora", 2, 3.0, is_principal=True)),
    ("v_proj", LayerUpdate("loha", 2, 3.0)),
)
"""The ends of layers' names, and their updates."""


def trained_network(unet_spec, method, with_text, dropout=0.0):
    """A denoiser, its trainables, and its segments."""
    unet = UNet2DConditionModel(unet_spec)
    networks, text_encoders = [unet], None
    if with_text:
        words = {"vocab_size": WORDS, "max_position_embeddings": TOKENS}
        is_sdxl = unet_spec.addition_embed_type is not None
        first = CLIPTextModel(ClipTextSpec(transformer=SDXL_TEXT if is_sdxl else TEXT, **words), last_layer=not is_sdxl)
        second = CLIPTextModel(ClipTextSpec(transformer=SDXL_TEXT_2, projection_dim=POOLED, **words))
        text_encoders = TextEncoders({"text_encoder": first} | ({"text_encoder_2": second} if is_sdxl else {}))
        networks += text_encoders.networks().values()
    trainables = []
    for number, network in enumerate(networks):
        initialise(network, number)
        if method == "custom_diffusion":
            if network is unet:
                free_cross_attention(unet, "crossattn")
                trainables += [parameter for parameter in unet.get_parameters() if parameter.requires_grad]
            else:
                network.add_words(np.ones((2, network.spec.transformer.hidden_size), np.float32))
                public_parameters(network)  # Gives each its name.
                trainables.append(network.text_model.embeddings.token_embedding.new_rows)
            continue
        if method == "full":
            trainables += [public.parameter for public in public_parameters(network).values()]
            continue
        if method == "all kinds":
            # Of two of the UNet's segments, so that most of the backward pass is that of other tests.
            names = [name for name in adaptable_layers(network) if network is not unet or "down_blocks.0" in name]
            updates = [(name, own) for name in names for end, own in KINDS if name.endswith(end)]
            layers = inject(network, {name: own.layer for name, own in updates}, None)
            initialise_lora(layers, number)
            rng = np.random.default_rng(number)
            for part in (part for layer in layers.values() for part in layer.parts.values()):
                part.write(part.read() + 0.1 * rng.standard_normal(part.shape))
            trainables += lora_trainables(layers)
            continue
        targets = ["to_q", "to_k", "to_v", "to_out.0"] if network is unet else ["q_proj", "v_proj"]
        state = DropoutState(dropout, 0) if dropout else None
        layers = inject_lora(network, 2, 2.0, targets, state)
        rng = np.random.default_rng(number)
        for layer in layers.values():
            layer.set_factors(*(rng.standard_normal(factor.shape).astype(np.float32) for factor in layer.factors()))
        trainables += lora_trainables(layers)
    denoiser = TextConditioned(unet, text_encoders) if with_text else unet
    if with_text and is_sdxl:
        # What SDXL does not read of its first encoder has no gradient.
        unread = {
            id(parameter)
            for name, parameter in first.parameters_and_names()
            if not text_encoders.is_read("text_encoder", name)
        }
        trainables = [parameter for parameter in trainables if id(parameter) not in unread]
    return denoiser, trainables, Segments(unet, text_encoders)


def inputs(unet_spec, with_text, extras=(), words=WORDS):
    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, ROWS, 4, SIDE, SIDE)).astype(np.float32)
    is_sdxl = unet_spec.addition_embed_type is not None
    ids = rng.integers(words, size=(ROWS, TOKENS * (2 if is_sdxl else 1))).astype(np.int32)
    ends = np.eye(TOKENS, dtype=np.float32)[[1, 3]]
    text = rng.standard_normal((ROWS, TOKENS, unet_spec.cross_attention_dim)).astype(np.float32)
    pooled = rng.standard_normal((ROWS, POOLED)).astype(np.float32)
    sizes = rng.integers(64, size=(ROWS, 6)).astype(np.float32)
    conditioning = [ids, ends, sizes] if with_text else [text, pooled, sizes]
    signal, sigma = (np.array(values, np.float32).reshape(-1, 1, 1, 1) for values in ([0.8, 0.6], [0.6, 0.8]))
    sample, timestep = signal * latents + sigma * noise, np.array([3, 700], np.float32)
    shapes = {"mask": latents.shape, "huber_c": ROWS}
    read = [rng.random(shapes[name], np.float32) for name in extras]
    rows = [noise, np.array([1.0, 0.5], np.float32), *read, sample, timestep]
    return [Tensor(value) for value in rows + conditioning[: 3 if is_sdxl else 1]]


class Gradients(nn.Cell):
    """Loss, rows' errors and gradients, one compiled cell as in a step."""

    def __init__(self, loss_cell, trainables, segments, penalty=None):
        super().__init__(auto_prefix=False)
        self.loss_cell = loss_cell
        self.differentiate = loss_and_gradients(loss_cell, ParameterTuple(trainables), None, segments, penalty)

    def construct(self, *rows):
        return self.differentiate(*rows)


class SumOfSquaresOf(nn.Cell):
    """Stands for a penalty: it has another way from the trainables than the prediction."""

    def __init__(self, trainables):
        super().__init__(auto_prefix=False)
        self.trainables = ParameterTuple(trainables)
        self.sum_of_squares = SumOfSquares([one.shape for one in trainables])

    def construct(self):
        return 0.1 * self.sum_of_squares(self.trainables)


def both(unet_spec, method, with_text, dropout=0.0, extras=(), penalised=False):
    """(loss, errors, *gradients) without and with recomputation."""
    denoiser, trainables, segments = trained_network(unet_spec, method, with_text, dropout)
    penalty = SumOfSquaresOf(trainables) if penalised else None
    words = WORDS + 2 * (method == "custom_diffusion")
    rows, results = inputs(unet_spec, with_text, extras, words), []
    for recomputed in (None, segments):
        (_, loss, errors), gradients = Gradients(DiffusionLoss(denoiser, extras), trainables, recomputed, penalty)(
            *rows
        )
        results.append([value.asnumpy() for value in (loss, errors, *gradients)])
    assert len(results[0]) == 2 + len(trainables)
    return results


@pytest.mark.parametrize(
    ("unet_spec", "method"),
    [(UNET, "lora"), (SMALL_UNET, "all kinds"), (DEEP_SDXL, "full"), (DEEP_SDXL, "custom_diffusion")],
    ids=["SD lora", "SD all kinds", "SDXL full", "SDXL custom_diffusion"],
)
def test_gradients_of_unet_and_text_encoders_are_the_same(pynative, unet_spec, method):
    """But for the last bits: where a value has many readers, their gradients are added in another order.

    Beside the largest gradient, because those of keys' biases are zero but for rounding; measured 1.7e-6 of it.
    """
    plain, recomputed = both(unet_spec, method, with_text=True, penalised=method == "lora")
    largest = max(np.abs(gradient).max() for gradient in plain[2:])
    for value, again in zip(plain, recomputed, strict=True):
        np.testing.assert_allclose(again, value, rtol=1e-5, atol=5e-6 * largest)
        assert np.abs(value).max() > 0


@pytest.fixture
def few_calls_deep():
    """The compiler gives up at 1000 calls within each other; SDXL has seven times as many segments as this UNet."""
    ms.set_recursion_limit(120)
    yield
    ms.set_recursion_limit(1000)


@pytest.mark.usefixtures("few_calls_deep")
def test_compiled_with_dropout_and_mask_the_gradients_of_a_lora_are_bit_for_bit_the_same():
    extras = ("mask", "huber_c")
    plain, recomputed = both(SMALL_UNET, "lora", with_text=False, dropout=0.5, extras=extras, penalised=True)
    for value, again in zip(plain, recomputed, strict=True):
        assert np.array_equal(again, value)


def operations(folder):
    """How often each operation is in the graph of a LoRA step that is computed again.

    In a process of its own, because MindSpore reads the switches of its dump once.
    """
    dump = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(folder), "MS_DEV_DUMP_IR_PASSES": "graph_build"}
    command = [sys.executable, "-m", "tests.unit.test_gradient_checkpointing"]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ | dump, check=True, capture_output=True)
    (executed,) = folder.glob("graph_build_*.ir")
    return Counter(re.findall(r" = PrimFunc_(\w+)\(", executed.read_text(encoding="utf-8")))


def test_what_is_computed_again_is_not_merged_with_the_forward_pass(tmp_path):
    counts = operations(tmp_path)
    # Four transformers with two attentions: forward, again, and in the attention's own backward pass. The feed-forward
    # part's own result is read by nothing on the way back, so that it is computed in the first and the last alone.
    assert (counts["Softmax"], counts["Erf"]) == (3 * 8, 2 * 4)


if __name__ == "__main__":
    set_up_device("CPU", 0)
    its_denoiser, its_trainables, its_segments = trained_network(SMALL_UNET, "lora", with_text=False)
    Gradients(DiffusionLoss(its_denoiser), its_trainables, its_segments)(*inputs(SMALL_UNET, with_text=False))

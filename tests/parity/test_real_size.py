"""The published sizes, with random weights: every network computes what the reference does.

Each test holds at most two copies of one network: 860 M parameters are 3.5 GB a copy. Of the UNet of SDXL, 2.6 B
parameters and 10.3 GB, there is one at a time: each side draws its weights by their names.
"""

import gc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVae
from diffusers import UNet2DConditionModel as ReferenceUNet
from mindspore import ParameterTuple, Tensor, nn, ops
from peft import LoraConfig
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as ReferenceText
from transformers import CLIPTextModelWithProjection as ReferenceProjectedText

from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
from dreambooth_ms.formats.model_config import read_unet_config
from dreambooth_ms.models.clip import CLIPTextModel, end_positions
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.specs import (
    CLIP_L_TEXT,
    OPENCLIP_BIGG_TEXT,
    OPENCLIP_H_TEXT,
    SD_15_UNET,
    SD_21_UNET,
    SD_VAE,
    SDXL_REFINER_UNET,
    SDXL_UNET,
    SDXL_VAE,
)
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.weights.bundle import BUFFERS, load_strict
from tests.parity.reference import disturbed, normal, relative_error, weights_of
from tools.bench_step import IF_1_M

pytestmark = pytest.mark.real

# Float32 sums of up to ten thousand products in another order, through some hundred layers.
TOLERANCE = 1e-4

ATTENTION_DOWN, ATTENTION_UP = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
# The same forward and backward; relative to the largest gradient of each matrix.
GRADIENT_TOLERANCE = 1e-3
RANK, TARGETS = 4, ["to_q", "to_k", "to_v", "to_out.0"]

# As in the config.json of the published models.
PUBLISHED_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*ATTENTION_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *ATTENTION_UP),
    "layers_per_block": 2,
}
PUBLISHED_15 = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
PUBLISHED_21 = {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "use_linear_projection": True,
}
PUBLISHED_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
PUBLISHED_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
PUBLISHED_OPENCLIP_H = PUBLISHED_CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


PUBLISHED_OPENCLIP_BIGG = PUBLISHED_CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "eos_token_id": 49407,
}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "layers_per_block": 2,
    "sample_size": 128,
    "use_linear_projection": True,
}
PUBLISHED_SDXL = ADDED | {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *ATTENTION_DOWN[:2]),
    "up_block_types": (*ATTENTION_UP[:2], "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED_REFINER = ADDED | {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", *ATTENTION_DOWN[:2], "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *ATTENTION_UP[:2], "UpBlock2D"),
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}


class LoraGradients(nn.Cell):
    """Gradients of the mean squared prediction with respect to the adapters."""

    def __init__(self, unet, trainables):
        super().__init__(auto_prefix=False)
        self.differentiate = ops.value_and_grad(self.loss, None, ParameterTuple(trainables))
        self.unet = unet

    def loss(self, latents, timesteps, text):
        prediction = self.unet(latents, timesteps, text)
        return (prediction * prediction).mean()

    def construct(self, latents, timesteps, text):
        return self.differentiate(latents, timesteps, text)[1]


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """The networks of one test are gone before the next begins."""
    torch.manual_seed(0)
    yield
    gc.collect()


def assert_close(name, ours, expected):
    error = relative_error(ours, expected)
    print(f"{name}: {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ("spec", "published"), [(SD_15_UNET, PUBLISHED_15), (SD_21_UNET, PUBLISHED_21)], ids=["sd15", "sd21"]
)
def test_the_unet_at_256_pixels_is_diffusers(spec, published):
    latents, timesteps = normal(1, 4, 32, 32), np.array([501], np.int32)
    text = normal(1, 77, spec.cross_attention_dim)
    reference = ReferenceUNet(**PUBLISHED_UNET, **published).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(latents), torch.tensor(timesteps), torch.tensor(text)).sample.numpy()
    network = UNet2DConditionModel(spec)
    load_strict(network, weights_of(reference), "diffusers")
    del reference
    gc.collect()
    assert_close("UNet", network(Tensor(latents), Tensor(timesteps), Tensor(text)), expected)


@pytest.mark.parametrize(
    ("spec", "published"),
    [(SDXL_UNET, PUBLISHED_SDXL), (SDXL_REFINER_UNET, PUBLISHED_REFINER)],
    ids=["base", "refiner"],
)
def test_the_unet_of_sdxl_at_256_pixels_is_diffusers(spec, published):
    ids = np.array([[1024, 768, 0, 17, 512, 640][: spec.num_add_time_ids(1280)]], np.float32)
    text, pooled = normal(1, 77, spec.cross_attention_dim), normal(1, 1280)
    inputs = normal(1, 4, 32, 32), np.array([501], np.int32), text, pooled, ids

    with torch.device("meta"):
        reference = ReferenceUNet(**published)
    reference = reference.to_empty(device="cpu").eval()
    shapes = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.from_numpy(drawn_weight(name, shapes[name])))
        latents, timesteps, *conditions = map(torch.tensor, inputs)
        added = {"text_embeds": conditions[1], "time_ids": conditions[2]}
        expected = reference(latents, timesteps, conditions[0], added_cond_kwargs=added).sample.numpy()
    del reference, parameter
    gc.collect()

    network = UNet2DConditionModel(spec)
    weights = public_parameters(network)
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    for name, weight in weights.items():
        weight.write(drawn_weight(name, shapes[name]))
    assert_close("UNet", network(*map(Tensor, inputs)), expected)


def test_the_first_unet_of_if_is_diffusers():
    pictures, timesteps, text = normal(1, 3, 64, 64), np.array([501], np.int32), normal(1, 77, 4096)
    reference = disturbed(ReferenceUNet(**IF_1_M).eval())
    with torch.no_grad():
        expected = reference(torch.tensor(pictures), torch.tensor(timesteps), torch.tensor(text)).sample.numpy()
    network = UNet2DConditionModel(read_unet_config(dict(reference.config)))
    assert sum(weight.size for weight in network.get_parameters()) == 371_605_830
    load_strict(network, weights_of(reference), "diffusers")
    del reference
    gc.collect()
    assert_close("UNet", network(Tensor(pictures), Tensor(timesteps), Tensor(text)), expected)


def drawn_weight(name, shape):
    """A weight by its name, of the size that PyTorch's layers start from."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * rng.standard_normal(
            shape, np.float32
        )
    weight = rng.random(shape, np.float32)
    weight -= 0.5
    weight *= 2 / np.sqrt(np.float32(np.prod(shape[1:])))
    return weight


def test_the_lora_gradients_of_the_sd15_unet_at_256_pixels_are_pefts():
    latents, timesteps, text = normal(1, 4, 32, 32), np.array([501], np.int32), normal(1, 77, 768)
    reference = ReferenceUNet(**PUBLISHED_UNET, **PUBLISHED_15).requires_grad_(False)
    reference.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False))
    trained = {n.replace(".default.", "."): p for n, p in reference.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().numpy().copy() for name, parameter in trained.items()}
    prediction = reference(torch.tensor(latents), torch.tensor(timesteps), torch.tensor(text)).sample
    (prediction**2).mean().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in trained.items()}
    base = {n.replace(".base_layer.", "."): w for n, w in weights_of(reference).items() if ".lora_" not in n}
    del reference, trained, prediction
    gc.collect()

    network = UNet2DConditionModel(SD_15_UNET)
    load_strict(network, base, "diffusers")
    del base
    trainables = lora_trainables(inject_lora(network, RANK, RANK, TARGETS))
    assert (len(trainables), sum(p.size for p in trainables)) == (256, 797_184)
    for parameter in trainables:
        parameter.set_data(Tensor(start[parameter.name]))
    gradients = LoraGradients(network, trainables)(Tensor(latents), Tensor(timesteps), Tensor(text))
    errors = {p.name: relative_error(g, expected[p.name]) for p, g in zip(trainables, gradients, strict=True)}
    print(f"LoRA gradients: {max(errors.values()):.1e} at worst")
    assert max(errors.values()) < GRADIENT_TOLERANCE


def test_the_autoencoder_at_256_pixels_is_diffusers():
    """SDXL's is of the same size; only the scaling of its latents, which it does not do itself, is another."""
    assert replace(SDXL_VAE, scaling_factor=SD_VAE.scaling_factor) == SD_VAE
    pictures, latents = normal(1, 3, 256, 256), normal(1, 4, 32, 32)
    reference = ReferenceVae(**PUBLISHED_VAE).eval()
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(pictures)).latent_dist
        decoded = reference.decode(torch.tensor(latents)).sample
    network = AutoencoderKL(SD_VAE)
    load_strict(network, weights_of(reference), "diffusers")
    del reference
    gc.collect()
    mean, log_variance = CellMethod(network.encode)(Tensor(pictures))
    assert_close("mean", mean, posterior.mean)
    assert_close("log-variance", log_variance, posterior.logvar)
    assert_close("decoded", CellMethod(network.decode)(Tensor(latents)), decoded)


@pytest.mark.parametrize(
    ("spec", "published"),
    [(CLIP_L_TEXT, PUBLISHED_CLIP_L), (OPENCLIP_H_TEXT, PUBLISHED_OPENCLIP_H)],
    ids=["clip-l", "openclip-h"],
)
def test_the_text_encoder_is_transformers(spec, published):
    ids = np.random.default_rng(0).integers(0, 49408, (2, 77)).astype(np.int32)
    reference = ReferenceText(CLIPTextConfig(**published)).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).last_hidden_state.numpy()
    network = CLIPTextModel(spec)
    load_strict(network, weights_of(reference), "transformers", ignore_unexpected=BUFFERS)
    del reference
    gc.collect()
    assert_close("text encoder", network(Tensor(ids)), expected)


def test_the_second_text_encoder_of_sdxl_is_transformers():
    ids = np.random.default_rng(0).integers(0, 49406, (2, 77)).astype(np.int32)
    ids[0, 20:], ids[1, 76] = 49407, 49407
    reference = ReferenceProjectedText(CLIPTextConfig(**PUBLISHED_OPENCLIP_BIGG)).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(ids).long(), output_hidden_states=True)
    network = CLIPTextModel(OPENCLIP_BIGG_TEXT)
    load_strict(network, weights_of(reference), "transformers", ignore_unexpected=BUFFERS)
    del reference
    gc.collect()
    penultimate, pooled = network(Tensor(ids), Tensor(end_positions(ids, OPENCLIP_BIGG_TEXT.eos_token_id)))
    assert_close("states before the last layer", penultimate, expected.hidden_states[-2])
    assert_close("pooled text", pooled, expected.text_embeds)


def test_the_first_text_encoder_of_sdxl_is_transformers_before_its_last_layer():
    ids = np.random.default_rng(0).integers(0, 49408, (2, 77)).astype(np.int32)
    reference = ReferenceText(CLIPTextConfig(**PUBLISHED_CLIP_L)).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(ids).long(), output_hidden_states=True).hidden_states[-2]
    network = CLIPTextModel(CLIP_L_TEXT, last_layer=False)
    load_strict(network, weights_of(reference), "transformers", ignore_unexpected=BUFFERS)
    assert_close("states before the last layer", Penultimate(network)(Tensor(ids)), expected)


class Penultimate(nn.Cell):
    """What SDXL reads of its first text encoder, as a cell that can be compiled."""

    def __init__(self, text_encoder):
        super().__init__(auto_prefix=False)
        self.text_encoder = text_encoder

    def construct(self, ids):
        return self.text_encoder.read(ids, (), 0)[0]

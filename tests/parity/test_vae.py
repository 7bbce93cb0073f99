"""The autoencoder computes what diffusers' does on the same weights, under their present and their old names."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor
from safetensors.numpy import save_file

from dreambooth_ms.formats.model_config import read_vae_config
from dreambooth_ms.models import vae
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.models.parameters import read_parameters
from dreambooth_ms.models.vae import AutoencoderKL, BandedDecoder, band_height
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.weights.bundle import load_strict, open_bundle
from tests.parity.reference import normal, relative_error, small_vae, weights_of
from tests.tiny_model import write_random_model
from tools.formulation import use_formulation

# Float32 sums in another order, through some fifteen layers: measured below 1e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference():
    return small_vae()


@pytest.fixture(scope="module")
def ours(reference):
    network = AutoencoderKL(read_vae_config(dict(reference.config)))
    load_strict(network, weights_of(reference), "diffusers")
    return network


def test_encoding_is_diffusers(reference, ours):
    pictures = normal(2, 3, 16, 24)
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(pictures)).latent_dist
    mean, log_variance = CellMethod(ours.encode)(Tensor(pictures))
    errors = relative_error(mean, posterior.mean), relative_error(log_variance, posterior.logvar)
    print("mean and log-variance", *(f"{error:.1e}" for error in errors))
    assert max(errors) < TOLERANCE


def test_decoding_is_diffusers(reference, ours):
    latents = normal(2, 4, 8, 12)
    with torch.no_grad():
        expected = reference.decode(torch.tensor(latents)).sample
    error = relative_error(CellMethod(ours.decode)(Tensor(latents)), expected)
    print(f"decoded {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("max_taps", [1, 30_000, 1 << 24], ids=["rows", "bands", "one band"])
@pytest.mark.parametrize("formulation", Formulation)
def test_decoding_in_bands_is_decoding(reference, formulation, max_taps, monkeypatch):
    monkeypatch.setattr(vae, "MAX_TAPS", max_taps)
    with use_formulation(formulation):
        network = AutoencoderKL(read_vae_config(dict(reference.config)))
        load_strict(network, weights_of(reference), "diffusers")
        # Bright as the pictures of no trained model are, so that a norm's mean counts.
        latents = normal(1, 4, 7, 10) + np.float32(0.5)
        decoded = BandedDecoder(network)(Tensor(latents))
    with torch.no_grad():
        expected = reference.decode(torch.tensor(latents)).sample
    error = relative_error(Tensor(decoded), expected)
    print(f"decoded in bands {error:.1e}")
    assert error < TOLERANCE


def test_one_direction_alone_is_loaded_and_computes_the_same(tmp_path):
    folder = open_bundle(write_random_model(tmp_path))
    whole, decoder, encoder = folder.codec.load(), folder.codec.load(encodes=False), folder.codec.load(decodes=False)
    names = {parameter.name for parameter in whole.get_parameters()}
    halves = [{parameter.name for parameter in half.get_parameters()} for half in (decoder, encoder)]
    assert halves[0] | halves[1] == names
    assert not halves[0] & halves[1]
    latents, pictures = Tensor(normal(1, 4, 8, 8)), Tensor(normal(1, 3, 16, 16))
    assert np.array_equal(CellMethod(decoder.decode)(latents).asnumpy(), CellMethod(whole.decode)(latents).asnumpy())
    for ours, expected in zip(CellMethod(encoder.encode)(pictures), CellMethod(whole.encode)(pictures), strict=True):
        assert np.array_equal(ours.asnumpy(), expected.asnumpy())


@given(height=st.integers(1, 300), most=st.integers(-3, 400))
def test_bands_are_of_one_height_and_cover_the_picture(height, most):
    rows = band_height(height, most)
    assert height % rows == 0
    assert rows == 1 or rows <= most


def test_the_log_variance_is_clipped_as_in_diffusers(reference, ours, pynative):
    """The last convolution's bias alone drives it out of range, up in some channels and down in the others."""
    channels = reference.config.latent_channels
    extreme = np.array([-100, 100] * (channels // 2), np.float32)
    weights = weights_of(reference) | {"quant_conv.bias": np.concatenate([np.zeros(channels, np.float32), extreme])}
    network = AutoencoderKL(ours.spec)
    load_strict(network, weights, "diffusers")
    _, log_variance = network.encode(Tensor(normal(1, 3, 16, 16)))
    limits = log_variance.asnumpy().reshape(channels, -1)
    assert (limits == np.where(extreme > 0, 20, -30)[:, None]).all()


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@pytest.mark.parametrize("stored_as", [(), (1, 1)], ids=["(O,I)", "(O,I,1,1)"])
def test_attention_weights_under_their_old_names_are_understood(reference, tmp_path, stored_as):
    weights, renamed = weights_of(reference), {}
    for name, value in weights.items():
        for new, old in OLD_NAMES.items():
            if "attentions" in name and new in name:
                name = name.replace(new, old)
                value = value.reshape(value.shape + stored_as) if value.ndim == 2 else value
        renamed[name] = value
    assert len(renamed.keys() - weights.keys()) == 16  # four weights and four biases in each half
    write_folder(tmp_path, dict(reference.config), renamed)

    loaded = read_parameters(open_bundle(tmp_path).codec.load())
    assert loaded.keys() == weights.keys()
    assert all(np.array_equal(loaded[name], weights[name]) for name in weights)


def write_folder(path, vae_config, vae_weights):
    """A model folder with this autoencoder."""
    write_random_model(path)
    (path / "vae" / "config.json").write_text(json.dumps(vae_config, default=list))
    save_file(vae_weights, path / "vae" / "diffusion_pytorch_model.safetensors")

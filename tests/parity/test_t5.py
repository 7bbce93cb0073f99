"""The encoder of T5 v1.1 computes what transformers' does on the same weights."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from dreambooth_ms.adapters.lora import inject_lora
from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.model_config import read_config, read_t5_config
from dreambooth_ms.models import t5
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.specs import T5Spec
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.weights.bundle import load_strict
from tests.parity.reference import (
    ValueAndGradients,
    gradients_of,
    normal,
    public_gradients,
    relative_error,
    small_t5,
    weights_of,
    worst_gradient_error,
)
from tests.tiny_model import write_t5_config
from tools.formulation import use_formulation

# Float32 sums in another order, through two layers: measured below 1e-6.
FORWARD = 1e-5
GRADIENT = 1e-4
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "vocab_size": 32128}

IDS = np.random.default_rng(0).integers(2, 60, (2, 14)).astype(np.int32)
IDS[0, 9:] = [1, 0, 0, 0, 0]
"""The first text is filled up by token 0."""


def ours(reference, use_attention_mask=False):
    network = t5.T5EncoderModel(read_t5_config(reference.config.to_dict()), use_attention_mask)
    load_strict(network, weights_of(reference), "transformers")
    return network


def mask_of(ids):
    return torch.tensor(ids != 0).long()


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_states_and_gradients_are_transformers(masked):
    reference = small_t5()
    sensitivity = normal(2, 14, 32)
    expected = reference(torch.tensor(IDS), mask_of(IDS) if masked else None).last_hidden_state
    (expected * torch.tensor(sensitivity)).sum().backward()

    network = ours(reference, masked)
    result, gradients = ValueAndGradients(network, of_inputs=False)(Tensor(sensitivity), Tensor(IDS))
    forward = relative_error(result, expected)
    backward, name = worst_gradient_error(public_gradients(network, gradients), gradients_of(reference))
    print(f"T5: forward {forward:.1e}, gradients {backward:.1e} ({name})")
    assert forward < FORWARD
    assert backward < GRADIENT, name
    with torch.no_grad():
        otherwise = reference(torch.tensor(IDS), None if masked else mask_of(IDS)).last_hidden_state
    assert relative_error(result, otherwise) > 1e-2, "the mask makes no difference here"


def test_the_other_formulation_gives_the_same(pynative):
    reference = small_t5()
    with use_formulation(Formulation.ASCEND), torch.no_grad():
        states = ours(reference, use_attention_mask=True)(Tensor(IDS))
        assert relative_error(states, reference(torch.tensor(IDS), mask_of(IDS)).last_hidden_state) < FORWARD


@pytest.mark.parametrize(("count", "distance"), [(32, 128), (8, 20)])
def test_buckets_of_distances_are_transformers(count, distance):
    places = torch.arange(200)
    expected = T5Attention._relative_position_bucket(places[None] - places[:, None], True, count, distance)
    found = t5.in_buckets(200, count, distance).asnumpy().argmax(0).reshape(200, 200)
    assert np.array_equal(found, expected.numpy())
    assert not np.array_equal(found, found.T), "before and after are not alike"


def test_float16_does_not_overflow_where_plain_float16_does(pynative):
    """The feed-forward part of the first layer gives numbers of 1e5, as those of the published model do."""
    reference = small_t5()
    with torch.no_grad():
        feed_forward = reference.encoder.block[0].layer[1].DenseReluDense
        feed_forward.wo.weight.mul_(1e4)
        feed_forward.wi_1.weight.mul_(100)
        expected = reference(torch.tensor(IDS)).last_hidden_state
        largest = reference(torch.tensor(IDS), output_hidden_states=True).hidden_states[1].abs().max()
    assert largest > np.finfo(np.float16).max
    network = ours(reference)
    reader = TextEncoders({"text_encoder": network})
    for parameter in network.get_parameters():
        parameter.requires_grad = False
    compute_in(reader, ms.float16)
    (states,) = reader(Tensor(IDS))
    assert network.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == ms.float16
    assert states.dtype == ms.float32
    error = relative_error(states, expected)
    print(f"T5 in float16: {error:.1e}")
    assert error < 5e-3


def test_new_words_are_read_behind_the_vocabulary(pynative):
    network = ours(small_t5())
    table, rows = network.shared.weight.asnumpy(), normal(2, 32)
    network.add_words(rows)
    found = TextEncoders({"text_encoder": network})
    assert np.array_equal(found.new_rows()["text_encoder"].asnumpy(), rows)
    known = network(Tensor(IDS)).asnumpy()
    table[IDS[1, 3]] = rows[1]
    ids = np.where(IDS[1, 3] == IDS, 61, IDS)
    other = small_t5()
    other.shared.weight.data = torch.tensor(table)
    with torch.no_grad():
        expected = other(torch.tensor(IDS)).last_hidden_state
    assert relative_error(network(Tensor(ids)), expected) < FORWARD
    assert relative_error(known, expected) > 1e-2


def test_lora_stands_beside_the_projections():
    network = ours(small_t5())
    layers = inject_lora(network, 2, 2.0, ["q", "k", "v", "o"])
    assert sorted(layers)[:4] == [f"encoder.block.0.layer.0.SelfAttention.{name}" for name in "koqv"]
    assert len(layers) == 8
    assert set(weights_of(small_t5())) < set(public_parameters(network))


def test_the_configuration_comes_back_and_is_transformers(tmp_path):
    spec = read_t5_config(small_t5().config.to_dict())
    assert read_t5_config(write_t5_config(spec)) == spec
    written = T5Config(**write_t5_config(spec))
    names = {name for name, _ in T5EncoderModel(written).named_parameters()}
    assert names == set(public_parameters(t5.T5EncoderModel(spec)))
    assert (written.dense_act_fn, written.is_gated_act) == ("gelu_new", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj: expected gated-gelu, got 'relu'"),
        ({"feed_forward_proj": ...}, "feed_forward_proj: expected gated-gelu, got 'relu'"),
        ({"d_kv": ...}, "'d_kv' is missing"),
        ({"pad_token_id": 3}, "pad_token_id: expected 0, got 3"),
        ({"relative_attention_num_buckets": 10}, "relative_attention_num_buckets 10 is not a multiple"),
        ({"rotary": True}, "rotary True is not known"),
    ],
)
def test_another_t5_is_refused(tmp_path, change, message):
    config = write_t5_config(T5Spec(**XXL, num_layers=24)) | change
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(WeightError, match=message):
        read_config(tmp_path / "config.json", config, read_t5_config)


@pytest.mark.real
def test_a_layer_of_the_published_width_is_transformers():
    """193 M parameters, and a table of 64 tokens."""
    torch.manual_seed(0)
    sizes = XXL | {"vocab_size": 64, "num_layers": 1}
    reference = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()
    ids = np.random.default_rng(0).integers(2, 64, (1, 77)).astype(np.int32)
    ids[0, 30:] = 0
    with torch.no_grad():
        expected = reference(torch.tensor(ids), mask_of(ids)).last_hidden_state
    error = relative_error(ours(reference, use_attention_mask=True)(Tensor(ids)), expected)
    print(f"a layer of T5-XXL: {error:.1e}")
    assert error < 1e-4

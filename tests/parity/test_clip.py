"""Both towers of CLIP compute what transformers' do on the same weights."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import CLIPTextModelWithProjection as ReferenceWithProjection

from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.model_config import read_clip_config, read_projected_text_config, read_text_config
from dreambooth_ms.models.clip import (
    CLIPModel,
    CLIPTextModel,
    end_positions,
)
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.weights.bundle import BUFFERS, load_strict
from tests.parity.reference import (
    ValueAndGradients,
    gradients_of,
    normal,
    public_gradients,
    relative_error,
    small_clip,
    small_text_encoder,
    weights_of,
    worst_gradient_error,
)

# Float32 sums in another order, through two layers: measured below 1e-6.
FORWARD = 1e-5
GRADIENT = 1e-4

BEGIN, LARGEST = 58, 59


def test_the_hidden_states_and_gradients_of_the_text_encoder_are_transformers():
    reference = small_text_encoder()
    ids = np.random.default_rng(0).integers(0, 60, (2, 12)).astype(np.int32)
    sensitivity = normal(2, 12, 24)
    expected = reference(torch.tensor(ids)).last_hidden_state
    (expected * torch.tensor(sensitivity)).sum().backward()

    network = CLIPTextModel(read_text_config(reference.config.to_dict()))
    load_strict(network, weights_of(reference), "transformers", ignore_unexpected=BUFFERS)
    result, gradients = ValueAndGradients(network, of_inputs=False)(Tensor(sensitivity), Tensor(ids))
    forward = relative_error(result, expected)
    backward, name = worst_gradient_error(public_gradients(network, gradients), gradients_of(reference))
    print(f"text encoder: forward {forward:.1e}, gradients {backward:.1e} ({name})")
    assert forward < FORWARD
    assert backward < GRADIENT, name


@pytest.mark.parametrize(
    ("end", "ids"),
    [(2, [[BEGIN, 4, 2, LARGEST, 0, 0], [BEGIN, 2, 9, 3, 11, LARGEST]]), (40, [[BEGIN, 4, 40, 0, 40, 0]] * 2)],
    ids=["largest id", "end token"],
)
def test_sdxl_reads_the_states_before_the_last_layer_of_both_encoders_and_the_pooled_text_of_the_second(end, ids):
    """The two tokenizers fill short prompts with different tokens, so each encoder has its own ids."""
    first = small_text_encoder()
    second = small_text_encoder(1, ReferenceWithProjection, projection_dim=20, hidden_act="gelu", eos_token_id=end)
    ids_2 = np.array(ids, np.int32)
    ids_1 = np.where(ids_2 == 0, LARGEST, ids_2)
    expected = [
        encoder(torch.tensor(tokens).long(), output_hidden_states=True)
        for encoder, tokens in ((first, ids_1), (second, ids_2))
    ]
    states = torch.cat([one.hidden_states[-2] for one in expected], 2)
    sensitivity = normal(2, 6, 48)
    (states * torch.tensor(sensitivity)).sum().backward()

    ours = CLIPTextModel(read_text_config(first.config.to_dict()), last_layer=False)
    projected = CLIPTextModel(read_projected_text_config(second.config.to_dict()))
    for network, reference in ((ours, first), (projected, second)):
        load_strict(network, weights_of(reference), "transformers", ignore_unexpected=BUFFERS)
    encoders = TextEncoders({"text_encoder": ours, "text_encoder_2": projected})
    ends = end_positions(ids_2, projected.spec.eos_token_id)
    text, pooled = encoders(Tensor(np.concatenate([ids_1, ids_2], 1)), Tensor(ends))
    errors = relative_error(text, states), relative_error(pooled, expected[1].text_embeds)
    print("states and pooled text", *(f"{error:.1e}" for error in errors))
    assert max(errors) < FORWARD

    names = {name for cell in (ours, projected) for name in (p.name for p in cell.get_parameters())}
    assert len(names) == len(list(encoders.get_parameters())), "names of both encoders must differ"
    unread = {name for name, p in first.named_parameters() if p.grad is None}
    assert len(unread) == 18
    assert {name for name, _ in first.named_parameters() if not encoders.is_read("text_encoder", name)} == unread


def test_clip_skip_leaves_out_layers_as_diffusers_pipelines_do(pynative):
    """SD 1 normalises what is left; SDXL, which leaves out one layer anyway, does not, and pools after all layers."""
    first = small_text_encoder(num_hidden_layers=3)
    second = small_text_encoder(1, ReferenceWithProjection, projection_dim=20, num_hidden_layers=3)
    alone, ours = (CLIPTextModel(read_text_config(first.config.to_dict()), last_layer=last) for last in (True, False))
    projected = CLIPTextModel(read_projected_text_config(second.config.to_dict()))
    for network, reference in ((alone, first), (ours, first), (projected, second)):
        load_strict(network, weights_of(reference), "transformers", ignore_unexpected=BUFFERS)
    ids = np.array([[BEGIN, 4, 9, LARGEST, 0, 0]], np.int32)
    with torch.no_grad():
        states, states_2 = (one(torch.tensor(ids).long(), output_hidden_states=True) for one in (first, second))
        expected = first.text_model.final_layer_norm(states.hidden_states[-2])
        expected_xl = torch.cat([one.hidden_states[-3] for one in (states, states_2)], 2)

    (text,) = TextEncoders({"text_encoder": alone}).with_clip_skip(1)(Tensor(ids))
    both = TextEncoders({"text_encoder": ours, "text_encoder_2": projected}).with_clip_skip(1)
    text_xl, pooled = both(Tensor(np.concatenate([ids, ids], 1)), Tensor(end_positions(ids, LARGEST)))
    assert relative_error(text, expected) < FORWARD
    assert relative_error(text_xl, expected_xl) < FORWARD
    assert relative_error(pooled, states_2.text_embeds) < FORWARD
    with pytest.raises(ConfigError, match="--clip_skip: expected 0 to 1, as its text encoders have layers, got 2"):
        TextEncoders({"text_encoder": ours, "text_encoder_2": projected}).with_clip_skip(2)


@pytest.mark.parametrize(
    ("hidden_act", "eos_token_id", "ids"),
    [
        # Written before 2 was corrected: the end token is the largest id, and what follows it does not count.
        ("quick_gelu", 2, [[BEGIN, 4, 2, LARGEST, LARGEST, 7], [BEGIN, 2, 9, 3, 11, LARGEST]]),
        # The end token is 40, which is not the largest, and comes more than once.
        ("gelu", 40, [[BEGIN, 4, 40, LARGEST, 40, 7], [BEGIN, 2, 9, 3, LARGEST, 40]]),
    ],
)
def test_the_embeddings_of_texts_and_pictures_are_transformers(hidden_act, eos_token_id, ids):
    reference = small_clip(hidden_act, eos_token_id)
    ids, pictures = np.array(ids, np.int32), normal(2, 3, 20, 20)
    with torch.no_grad():
        expected = reference(torch.tensor(ids).long(), torch.tensor(pictures))

    network = CLIPModel(read_clip_config(reference.config.to_dict()))
    load_strict(network, weights_of(reference), "transformers", ignore_unexpected=BUFFERS)
    end = end_positions(ids, network.spec.text.eos_token_id)
    text, image = network(Tensor(ids), Tensor(end), Tensor(pictures))
    errors = relative_error(text, expected.text_embeds), relative_error(image, expected.image_embeds)
    print("embeddings of texts and pictures", *(f"{error:.1e}" for error in errors))
    assert max(errors) < FORWARD


def test_the_end_of_a_text_is_its_first_end_token():
    ids = np.array([[49406, 320, 49407, 49407], [49406, 320, 321, 49407]])
    for eos_token_id in (2, 49407):
        assert end_positions(ids, eos_token_id).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert end_positions(ids, 320).tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]

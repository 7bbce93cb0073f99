"""Custom Diffusion and embeddings as diffusers makes them draw the same pictures here as there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import save_file

from dreambooth_ms.sampling.model import Rows, SamplingModel
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import normal, relative_error
from tests.parity.test_adapter_file import LATENTS, NOISE, REQUEST, assert_same_picture, pipeline_of, sample
from tests.tiny_model import write_random_model, write_random_sdxl

PROMPT, WIDTH = "a photo of a <new1> star", 24

# Float32 sums in another order through one layer of the text encoder.
STATES = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), levels=1)


def set_processors(unet, whole):
    """What diffusers' script puts on a UNet: with new weights for cross-attention, none for self-attention."""
    processors, rng = {}, torch.Generator().manual_seed(0)
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        crosses = ".attn2." in name
        own = CustomDiffusionAttnProcessor(
            train_kv=crosses,
            train_q_out=whole and crosses,
            hidden_size=layer.to_q.in_features,
            cross_attention_dim=layer.to_k.in_features if crosses else None,
        )
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
        processors[name] = own
    unet.set_attn_processor(processors)


def new_word(folder, name="<new1>.safetensors", rows=None):
    save_file({"<new1>": torch.tensor(normal(WIDTH, seed=5) if rows is None else rows)}, folder / name)
    return folder / name


def drawn(model, **changes):
    """Our latents and picture of the prompt."""
    request = replace(REQUEST, prompts=(PROMPT,), **changes)
    rows = model.rows(request)
    ((number, latents),) = model.latents(request, Rows(NOISE, rows.prompts, rows.negative))
    return type("Drawn", (), {"latents": latents, "picture": model.picture(latents, number)})


@pytest.mark.parametrize("whole", [False, True], ids=["crossattn_kv", "crossattn"])
def test_a_folder_of_the_script_draws_the_same_picture_and_nothing_at_strength_0(model, tmp_path, whole):
    pipeline = pipeline_of(model)
    set_processors(pipeline.unet, whole)
    pipeline.unet.save_attn_procs(tmp_path)
    pipeline.load_textual_inversion(new_word(tmp_path))
    ours = SamplingModel(open_bundle(model), [tmp_path], keep_text_encoders=True)
    first = drawn(ours)
    assert_same_picture(first, pipeline, prompt=PROMPT)
    plain = pipeline_of(model)
    plain.load_textual_inversion(tmp_path / "<new1>.safetensors")
    base = sample(plain, prompt=PROMPT)[0]
    assert relative_error(drawn(ours, lora_scales=(0.0,)).latents, base) < LATENTS
    assert relative_error(first.latents, base) > 0.1


def test_its_pickle_is_the_same_as_its_safetensors(model, tmp_path):
    pipeline = pipeline_of(model)
    set_processors(pipeline.unet, True)
    opened = []
    for safe in (True, False):
        folder = tmp_path / str(safe)
        pipeline.unet.save_attn_procs(folder, safe_serialization=safe)
        bundle = open_bundle(model)
        opened.append(SamplingModel(bundle, [folder]).adapters.opened[0].parts["unet"])
    assert opened[0].keys() == opened[1].keys()
    for layer, own in opened[0].items():
        for name, value in own.tensors().items():
            assert np.array_equal(value, opened[1][layer].tensors()[name]), (layer, name)


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_gives_the_same_states_of_text(model, tmp_path, count):
    file = new_word(tmp_path, "cat.safetensors", normal(count, WIDTH, seed=6))
    pipeline = pipeline_of(model)
    pipeline.load_textual_inversion(file)
    # diffusers rewrites a word before it is read, if a blank or the end follows it.
    prompts = (PROMPT, "<new1>", "<new1>, <NEW1> and <new1> star")
    ours = SamplingModel(open_bundle(model), words=[file]).embeddings(replace(REQUEST, prompts=prompts))
    for prompt in prompts:
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        assert relative_error(ours[prompt].text, expected[0]) < STATES, prompt
    with torch.no_grad():
        plain, _ = pipeline_of(model).encode_prompt(PROMPT, "cpu", 1, False)
    assert relative_error(ours[PROMPT].text, plain[0]) > 0.1


def test_an_embedding_of_sdxl_gives_the_same_states_of_both_text_encoders(tmp_path):
    folder = write_random_sdxl(tmp_path / "sdxl", levels=1)
    vectors = {"clip_l": torch.tensor(normal(2, 24, seed=6)), "clip_g": torch.tensor(normal(2, 16, seed=7))}
    save_file(vectors, tmp_path / "<new1>.safetensors")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    towers = ((pipeline.text_encoder, pipeline.tokenizer), (pipeline.text_encoder_2, pipeline.tokenizer_2))
    for rows, (tower, tokenizer) in zip(vectors.values(), towers, strict=True):
        pipeline.load_textual_inversion({"<new1>": rows}, text_encoder=tower, tokenizer=tokenizer)
    model = SamplingModel(open_bundle(folder), words=[tmp_path / "<new1>.safetensors"])
    ours = model.embeddings(replace(REQUEST, prompts=(PROMPT,)))[PROMPT]
    with torch.no_grad():
        expected, _, pooled, _ = pipeline.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    assert relative_error(ours.text, expected[0]) < STATES
    assert relative_error(ours.pooled, pooled[0]) < STATES

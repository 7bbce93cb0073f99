"""What the page's sampling process does with the toolkit, on models of a few thousand weights."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from demo.messages import ModelChoice, Phase, Picture, PictureRequest, Start, Step
from demo.sampler import Sampler, keeps_text_encoders
from dreambooth_ms.errors import WeightError
from dreambooth_ms.models.specs import T5Spec
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import open_bundle
from tests.tiny_model import write_random_model, write_random_sdxl
from tests.whole_loras import write_run_lora

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def lora(folder, seed):
    normal = np.random.default_rng(seed).standard_normal
    factors = {LAYER: (normal((2, 16), np.float32), normal((16, 2), np.float32))}
    return str(write_run_lora(folder, {"unet": factors}, 1).parent)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    base = str(write_random_model(folder / "base", levels=0))
    return ModelChoice(base, (lora(folder / "one", 1), lora(folder / "two", 2)))


@pytest.fixture(scope="module")
def sampler(model):
    return Sampler(model, lambda message: None, 1)


def request(model, **settings):
    settings = {
        "width": 32,
        "height": 32,
        "num_inference_steps": 4,
        "lora_scales": (1.0,) * len(model.loras),
    } | settings
    return PictureRequest(model, "a photo of a star", **settings)


def sampled(sampler, asked, cancelled=lambda: False):
    """Whether it was finished, and the messages by kind."""
    sent = []
    finished = sampler.sample(Start(1, asked), sent.append, cancelled)
    return finished, {kind: [one for one in sent if isinstance(one, kind)] for kind in (Phase, Step, Picture)}


def test_pairs_are_sampled_with_progress_and_previews(sampler, model):
    finished, sent = sampled(sampler, request(model, count=2, compare=True))
    assert finished
    assert [(p.side, p.number) for p in sent[Picture]] == [("adapted", 0), ("adapted", 1), ("base", 0), ("base", 1)]
    assert not np.array_equal(sent[Picture][0].pixels, sent[Picture][2].pixels)
    shares = [step.share for step in sent[Step]]
    assert len(shares) == 2 * 2 * 4
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert sent[Step][0].preview.shape == (32, 32, 3)
    assert len(sent[Phase]) == 1
    assert not sampled(sampler, request(model, seed=1))[1][Phase], "compiled already"


def test_each_lora_has_its_own_strength_and_none_is_the_base(sampler, model):
    pictures = {
        scales: sampled(sampler, request(model, lora_scales=scales))[1][Picture][0]
        for scales in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
    }
    pixels = {scales: picture.pixels.tobytes() for scales, picture in pictures.items()}
    assert len(set(pixels.values())) == 4
    alone = sampled(sampler, request(ModelChoice(model.base)))[1][Picture][0]
    assert alone.pixels.tobytes() == pixels[0.0, 0.0]
    assert pictures[1.0, 0.0].settings["lora"] == [model.loras[0]]
    assert alone.settings["lora"] == []


def test_the_command_line_samples_the_same(sampler, model):
    asked = request(model, seed=5, guidance_scale=3.0, lora_scales=(0.5, 1.0))
    theirs = sampler._model.sample(
        SampleRequest(
            prompts=(asked.prompt,), height=32, width=32, seed=5, batch_size=1, num_inference_steps=4,
            guidance_scale=3.0, lora_scales=(0.5, 1.0),
        )
    )  # fmt: skip
    assert np.array_equal(next(theirs).picture, sampled(sampler, asked)[1][Picture][0].pixels)


def test_a_picture_to_start_from_is_kept_the_more_the_weaker(sampler, model):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16] = 255
    far, near = (
        sampled(sampler, request(model, image=image, strength=strength))[1][Picture][0] for strength in (1.0, 0.3)
    )
    assert not np.array_equal(far.pixels, near.pixels)
    assert near.settings["strength"] == 0.3


def test_a_mask_goes_along_with_its_picture(sampler, model):
    image, mask = (np.full((32, 32, 3), level, np.uint8) for level in (90, 255))
    asked = sampler._sample_request(request(model, image=image, mask=mask), "adapted")
    assert [np.array_equal(own, given) for own, given in ((asked.image, image), (asked.mask, mask))] == [True, True]


def test_a_cancellation_ends_it_between_two_steps(sampler, model):
    steps = []

    def cancelled():
        steps.append(1)
        return len(steps) > 3

    finished, sent = sampled(sampler, request(model, num_inference_steps=50), cancelled)
    assert not finished
    assert len(sent[Step]) == 3
    assert not sent[Picture]


def test_text_encoders_stay_in_memory_unless_they_are_the_larger_part(model):
    base = open_bundle(Path(model.base))
    t5 = T5Spec(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    assert keeps_text_encoders(base)
    assert not keeps_text_encoders(replace(base, text=(SimpleNamespace(spec=t5),)))


def test_a_size_that_does_not_fit_is_a_sentence(sampler, model):
    with pytest.raises(WeightError, match="sides must be multiples of"):
        sampled(sampler, request(model, width=33))


def test_the_refiner_finishes_the_pictures_of_the_base(tmp_path):
    base, refiner = (
        write_random_sdxl(tmp_path / name, refiner=name == "refiner", levels=0) for name in ("base", "refiner")
    )
    both = ModelChoice(str(base), refiner=str(refiner))
    sampler = Sampler(both, lambda message: None, 1)
    _, sent = sampled(sampler, request(both, num_inference_steps=5, refiner_start=0.6))
    assert [step.stage for step in sent[Step]] == ["base"] * 3 + ["refiner"] * 2
    assert [step.share for step in sent[Step]] == sorted(step.share for step in sent[Step])
    assert sent[Step][-1].share == 1.0
    (refined,) = sent[Picture]
    assert refined.settings["refiner"] == str(refiner)
    (alone,) = sampled(sampler, request(ModelChoice(str(base)), num_inference_steps=5))[1][Picture]
    assert not np.array_equal(alone.pixels, refined.pixels)

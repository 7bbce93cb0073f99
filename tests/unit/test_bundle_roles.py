"""A bundle needs no autoencoder and no CLIP: whatever plays the roles is a model."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor, nn

from dreambooth_ms.data.conditioning import PromptTokenizer, encode_prompts
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.models.clip import CLIPTextModel
from dreambooth_ms.models.parameters import initialise
from dreambooth_ms.models.specs import ClipTextSpec
from dreambooth_ms.models.text import TextEncoders
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.ops import Embedding
from dreambooth_ms.weights.bundle import Codec, ModelBundle, Role, Schedule, TextReader
from tests.tiny_model import POOLED, SDXL_TEXT_2, UNET

WIDTH, LENGTH, LETTERS = 12, 6, 128


class LetterTokenizer:
    """A letter is a token; no token begins or ends a text."""

    length = LENGTH

    def lost(self, prompt):
        return prompt[LENGTH:] or None

    def num_pieces(self, prompt):
        return max(1, -(-len(prompt) // LENGTH))

    def pieces(self, prompt, count):
        return np.array([ord(letter) for letter in prompt[: count * LENGTH].ljust(count * LENGTH)], np.int32).reshape(
            count, LENGTH
        )


class LetterReader(nn.Cell):
    """A state for each letter, whatever stands beside it."""

    most_skipped = 0

    def __init__(self):
        super().__init__()
        self.letters = Embedding(LETTERS, WIDTH)

    def read(self, ids_BS, ends, skip):
        """The states alone."""
        return (self.letters(ids_BS),)

    def is_read(self, parameter, skip):
        """Every letter may be."""
        return True


@dataclass(frozen=True)
class PixelSpec:
    """The diffusion takes place in the pictures themselves."""

    latent_channels: int = 3
    downsampling: int = 1

    def scaled(self, latents):
        return latents

    def unscaled(self, latents):
        return latents


def filled(cell):
    initialise(cell, 0)
    return cell


UNET_OF_PIXELS = replace(UNET, in_channels=3, out_channels=3, cross_attention_dim=WIDTH)

READER = TextReader(
    name="letters",
    spec=None,
    width=WIDTH,
    adapted_layers=(),
    tokenizer=LetterTokenizer,
    load=lambda: filled(LetterReader()),
    digest=lambda: "letters",
)


@pytest.fixture
def bundle(tmp_path):
    cell = SimpleNamespace(encode=lambda pictures: pictures, decode=lambda latents: latents)
    return ModelBundle(
        path=tmp_path,
        denoiser=Role(UNET_OF_PIXELS, lambda: filled(UNet2DConditionModel(UNET_OF_PIXELS)), lambda: "unet"),
        codec=Codec(PixelSpec(), lambda encodes=True, decodes=True: cell, lambda: "pixels"),
        text=(READER,),
        schedule=Schedule(tmp_path, {}),
    )


def test_a_model_of_pixels_that_reads_letters_fits_and_predicts(bundle, pynative):
    bundle.check()
    assert (bundle.picture_size, bundle.side_multiple, bundle.latent_shape(16, 8)) == (16, 2, (3, 16, 8))
    assert (bundle.num_add_time_ids, bundle.notes) == (0, ())
    encoders = bundle.load_text_encoders()
    assert encoders.networks().keys() == {"letters"}
    assert encoders.is_read("letters", "letters.weight")
    text = dict(encode_prompts(PromptTokenizer(bundle.text), encoders, ["a cat", ""]))
    assert text["a cat"].text.shape == (LENGTH, WIDTH)
    assert text["a cat"].pooled.size == 0
    assert np.array_equal(text["a cat"].text[1], text[""].text[0])
    inputs = np.zeros((1, *bundle.latent_shape(16, 8)), np.float32), np.array([5], np.int32), text["a cat"].text[None]
    predicted = bundle.denoiser.load()(*map(Tensor, inputs))
    assert predicted.shape == (1, 3, 16, 8)


def test_what_is_too_long_for_any_tokenizer_is_told_or_cut_into_pieces(bundle, pynative):
    tokenizer, encoders = PromptTokenizer(bundle.text), bundle.load_text_encoders()
    with pytest.warns(UserWarning, match=f"prompt cut after {LENGTH} tokens; not used: 'cats'"):
        dict(encode_prompts(tokenizer, encoders, ["a few cats"]))
    pieces = tokenizer.num_pieces(["a few cats"])
    assert pieces == 2
    ((_, read),) = encode_prompts(tokenizer, encoders, ["a few cats"], pieces=pieces)
    assert read.text.shape == (12, WIDTH)


def test_readers_of_two_kinds_stand_side_by_side(pynative):
    """The states of all, in their order, and the pooled text of the one that pools."""
    spec = ClipTextSpec(transformer=SDXL_TEXT_2, projection_dim=POOLED, vocab_size=LETTERS)
    clip, letters = filled(CLIPTextModel(spec)), filled(LetterReader())
    encoders = TextEncoders({"letters": letters, "text_encoder_2": clip})
    ids = Tensor(np.array([[1, 2, 3]], np.int32))
    end = Tensor(np.array([[0, 0, 1]], np.float32))
    states, pooled = encoders(Tensor(np.array([[1, 2, 3, 1, 2, 3]], np.int32)), end)
    assert np.array_equal(states[..., :WIDTH].asnumpy(), letters.letters(ids).asnumpy())
    expected = clip(ids, end)
    assert np.array_equal(states[..., WIDTH:].asnumpy(), expected[0].asnumpy())
    assert np.array_equal(pooled.asnumpy(), expected[1].asnumpy())
    with pytest.raises(ConfigError, match="--clip_skip: expected 0 to 0"):
        encoders.with_clip_skip(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"codec": Codec(PixelSpec(latent_channels=4), None, None)},
            "its unet takes 3 channels and gives 3, a pict",
        ),
        ({"text": (READER, READER)}, "its unet reads text of width 12, its letters and letters give 24; take both"),
        (
            {"text": (replace(READER, pooled_width=7),)},
            "its unet reads 0 add_time_ids beside the text of its",
        ),
    ],
)
def test_roles_that_do_not_fit_each_other_are_told(bundle, change, said):
    with pytest.raises(WeightError, match=said):
        replace(bundle, **change).check()


def test_its_latents_must_be_halved(bundle):
    with pytest.raises(WeightError, match="15x16 pixels do not fit; sides must be multiples of 2"):
        bundle.latent_shape(16, 15)

"""DINO's vision transformer computes what transformers' ViTModel does, and pictures are cut as its authors cut them."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import CLIPImageProcessor

from dreambooth_ms.evaluation import load_dino_embedder, middle
from dreambooth_ms.formats.folder_layout import write_json
from dreambooth_ms.formats.model_config import read_vit_config
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.models.vit import ViTModel
from dreambooth_ms.weights.bundle import POOLER, load_encoder, load_strict
from tests.parity.reference import normal, relative_error, small_vit, weights_of

PARITY = 1e-4
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def unit_class_token(network, pixels):
    with torch.no_grad():
        token = network(torch.tensor(pixels)).last_hidden_state[:, 0]
    return token / token.norm(dim=1, keepdim=True)


def test_the_class_token_is_transformers():
    theirs, pixels = small_vit(), normal(2, 3, 28, 28)
    ours = ViTModel(read_vit_config(theirs.config.to_dict()))
    assert set(public_parameters(ours)) == set(weights_of(theirs)) - set(POOLER)
    load_strict(ours, weights_of(theirs), "transformers", ignore_unexpected=POOLER)
    error = relative_error(CellMethod(ours.encode_image)(Tensor(pixels)), unit_class_token(theirs, pixels))
    print(f"class token {error:.1e}")
    assert error < PARITY


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_folder_is_read_with_its_preprocessing(tmp_path, safetensors):
    theirs = small_vit()
    theirs.save_pretrained(tmp_path, safe_serialization=safetensors)
    write_json(tmp_path / "preprocessor_config.json", {"image_mean": MEAN, "image_std": DEVIATION, "size": 28})
    loaded = {name: one.read() for name, one in public_parameters(load_encoder(tmp_path, ViTModel)).items()}
    assert all(np.array_equal(one, weights_of(theirs)[name]) for name, one in loaded.items())

    pictures = [picture(40, 60), picture(90, 50), picture(28, 28)]
    # DINO's own evaluation (eval_knn.py) takes 224 pixels in the middle of 256; so 28 of 32.
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=28, image_mean=MEAN, image_std=DEVIATION, resample=3
    )
    pixels = np.concatenate([processor(one, return_tensors="np").pixel_values for one in pictures])
    assert relative_error(load_dino_embedder(tmp_path).pictures(pictures), unit_class_token(theirs, pixels)) < PARITY


@pytest.mark.parametrize(("height", "width"), [(40, 60), (91, 50), (20, 20), (32, 32)])
@pytest.mark.parametrize("shorter_side", [28, 32])
def test_the_middle_of_a_picture_is_that_of_clips_preprocessing(height, width, shorter_side):
    processor = CLIPImageProcessor(
        size={"shortest_edge": shorter_side}, crop_size=28, resample=3, do_normalize=False, do_rescale=False
    )
    shown = picture(height, width)
    (expected,) = processor(shown, return_tensors="np").pixel_values
    assert np.array_equal(middle(shown, shorter_side, 28), expected.transpose(1, 2, 0).astype(np.uint8))


def picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)

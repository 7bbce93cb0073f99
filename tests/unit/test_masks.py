"""Where the error counts: masks follow the crop of their picture, and lie on its latents by area."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from PIL import Image, ImageOps

from dreambooth_ms.data.masks import Mask, find_mask, mask_of_latents
from dreambooth_ms.data.pictures import Frame, frame_of
from dreambooth_ms.errors import DataError
from dreambooth_ms.training.step import WeightedError

SIZE = (48, 32)


def write(path, pixels, mode="L"):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).convert(mode).save(path)
    return path


def half(width=48, height=32):
    """White at the left, black at the right."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = 255
    return pixels


def test_a_mask_lies_on_latents_by_its_share_of_their_area(tmp_path):
    mask = find_mask(tmp_path / "dog.jpg", write(tmp_path / "masks" / "dog.png", half()).parent, SIZE)
    frame = Frame((32, 32), SIZE, 0, 4)
    found = mask_of_latents(mask, frame, False, (4, 4), 0.0)
    shares = np.array([1, 1, 0.5, 0])
    assert found.dtype == np.float32 and found == pytest.approx(np.tile(shares / shares.mean(), (4, 1)))
    assert np.array_equal(mask_of_latents(mask, frame, True, (4, 4), 0.0), found[:, ::-1])
    counts = 0.2 + 0.8 * shares
    assert mask_of_latents(mask, frame, False, (4, 4), 0.2) == pytest.approx(np.tile(counts / counts.mean(), (4, 1)))


def test_a_crop_beside_its_mask_teaches_nothing(tmp_path):
    mask = find_mask(tmp_path / "dog.jpg", write(tmp_path / "masks" / "dog.png", half(96)).parent, (96, 32))
    assert not mask_of_latents(mask, Frame((32, 32), (96, 32), 0, 60), False, (4, 4), 0.0).any()
    assert (mask_of_latents(mask, Frame((32, 32), (96, 32), 0, 60), False, (4, 4), 0.3) == 1).all()


def test_opacity_is_a_mask_upright_as_its_picture(tmp_path):
    pixels = np.zeros((*SIZE, 4), np.uint8)
    pixels[: SIZE[0] // 2, :, 3] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 8  # Lies on its right side.
    image.save(tmp_path / "dog.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "dog.png"))
    mask = find_mask(tmp_path / "dog.png", None, upright.size)
    assert mask.is_alpha
    found = mask_of_latents(mask, frame_of(upright.size, (32, 32)), False, (2, 2), 0.0)
    expected = (
        np.asarray(upright.getchannel("A").resize((48, 32)).crop((8, 0, 40, 32))).reshape(2, 16, 2, 16).mean((1, 3))
    )
    assert found == pytest.approx(expected / expected.mean())


@pytest.mark.parametrize(
    ("pixels", "size", "message"),
    [
        (None, SIZE, r"dog.jpg: no mask in .*masks, expected dog.png; make one, or remove the picture"),
        (half(), (48, 40), "dog.png: 48x32 pixels, its picture 48x40; make both the same size"),
        (np.zeros((32, 48)), SIZE, "dog.png: black everywhere, so nothing would count"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_by_name(tmp_path, pixels, size, message):
    (tmp_path / "masks").mkdir()
    if pixels is not None:
        write(tmp_path / "masks" / "dog.png", pixels)
    with pytest.raises(DataError, match=message):
        find_mask(tmp_path / "dog.jpg", tmp_path / "masks", size)


def test_a_picture_without_opacity_has_none(tmp_path):
    write(tmp_path / "dog.png", half())
    with pytest.raises(DataError, match="--alpha_mask, but it has no alpha channel"):
        find_mask(tmp_path / "dog.png", None, SIZE)


def test_the_masked_error_is_torchs(tmp_path, pynative):
    """Of each row the squares, weighted by the mask over the sum of the mask; 1e-6."""
    rng = np.random.default_rng(0)
    prediction, target = rng.standard_normal((2, 3, 4, 4, 6)).astype(np.float32)
    masks = [
        mask_of_latents(
            Mask(write(tmp_path / f"{n}.png", rng.integers(0, 256, (32, 48))), "", False),
            Frame((48, 32), (48, 32), 0, 0), False, (6, 4), rest,
        )
        for n, rest in enumerate((0.0, 0.1, 0.7))
    ]  # fmt: skip
    rows = np.stack([np.broadcast_to(mask, (4, 4, 6)) for mask in masks])
    weights = np.array([0.5, 1.0, 2.0], np.float32)
    loss, errors = WeightedError(("mask",))(*map(Tensor, (prediction, target, weights, rows)))
    squares, counts = (torch.tensor(prediction) - torch.tensor(target)) ** 2, torch.tensor(rows).double()
    expected = (squares * counts).sum((1, 2, 3)) / counts.sum((1, 2, 3))
    assert errors.asnumpy() == pytest.approx(expected.numpy(), rel=1e-6)
    assert float(loss.asnumpy()) == pytest.approx(float((expected * torch.tensor(weights)).sum()), rel=1e-6)

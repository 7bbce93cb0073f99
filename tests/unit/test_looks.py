"""What is measured of pictures: which resemble each other, and which are blurred."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from dreambooth_ms.data.looks import BLURRED, NEAR, NOT_MEASURED, Looks, looks_of, near_duplicates


def scene(seed, size=(320, 240)):
    """Discs of many sizes and greys, with a grain as photographs have."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[: size[1], : size[0]]
    levels = np.full(across.shape, rng.uniform(0, 255))
    for _ in range(40):
        x, y, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(5, 80)
        levels[(across - x) ** 2 + (down - y) ** 2 < radius**2] = rng.uniform(0, 255)
    levels += rng.normal(0, 8, levels.shape)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).convert("RGB")


def as_jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file)


def differing(one, other):
    signs = [np.frombuffer(looks.signs, np.int8) for looks in (one, other)]
    return int((signs[0] != signs[1]).sum())


SAME = {
    "smaller": lambda image: image.resize((160, 120)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "compressed": as_jpeg,
    "cut by a pixel at each side": lambda image: image.crop((1, 1, image.width - 1, image.height - 1)),
}


@pytest.mark.parametrize("change", SAME)
def test_a_picture_resembles_itself_changed(change):
    for seed in range(5):
        image = scene(seed)
        assert differing(looks_of(image), looks_of(SAME[change](image))) <= NEAR


def test_other_pictures_and_its_own_mirror_image_do_not_resemble_it():
    looks = [looks_of(scene(seed)) for seed in range(12)]
    assert near_duplicates(looks) == {}
    assert differing(looks[0], looks_of(scene(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > NEAR


def cosine_transform(levels):
    """DCT-II of the first axis, but for a factor of all, as the Fourier transform of the mirrored signal."""
    count = len(levels)
    mirrored = np.fft.fft(np.concatenate([levels, levels[::-1]]), axis=0)[:count]
    return (np.exp(-0.5j * np.pi * np.arange(count) / count)[:, None] * mirrored).real


def test_the_hash_is_of_the_lowest_frequencies_of_a_cosine_transform():
    image = scene(3, (32, 32))
    low = cosine_transform(cosine_transform(np.asarray(image.convert("L"), np.float64)).T).T[:8, :8]
    assert looks_of(image).signs == np.where(low > np.median(low), 1, -1).astype(np.int8).tobytes()


def test_sharpness_is_the_variance_of_the_laplacian():
    levels = np.random.default_rng(0).integers(0, 256, (40, 50)).astype(np.uint8)
    own = levels.astype(int)
    expected = [
        own[y - 1, x] + own[y + 1, x] + own[y, x - 1] + own[y, x + 1] - 4 * own[y, x]
        for y in range(1, 39)
        for x in range(1, 49)
    ]
    assert looks_of(Image.fromarray(levels)).sharpness == pytest.approx(np.var(expected), rel=1e-5)


def test_what_is_out_of_focus_falls_below_the_threshold_at_any_size():
    for size in ((320, 240), (1600, 1200)):
        image = scene(1, size)
        assert looks_of(image).sharpness > 3 * BLURRED
        blurred = image.filter(ImageFilter.GaussianBlur(3 * size[0] / 320))
        assert looks_of(blurred).sharpness < BLURRED


@pytest.mark.parametrize("size", [(8, 8), (8, 160), (3, 3), (5000, 300)])
def test_every_size_and_a_plain_colour_can_be_measured(size):
    plain = looks_of(Image.new("RGB", size, "red"))
    assert len(plain.signs) == 64 and plain.sharpness == 0


def test_what_resembles_a_left_out_picture_alone_stays():
    """Of a row of pictures that each resemble the next, every second one at least is another."""
    signs = np.ones((4, 64), np.int8)
    for row in range(1, 4):
        signs[row:, (row - 1) * NEAR : row * NEAR] = -1
    looks = [Looks(row.tobytes(), 100.0) for row in signs]
    assert near_duplicates(looks) == {1: 0, 3: 2}
    assert near_duplicates([]) == {}
    assert near_duplicates([NOT_MEASURED, NOT_MEASURED]) == {}


@given(st.lists(st.binary(min_size=8, max_size=8), max_size=12))
def test_those_that_stay_resemble_none_and_the_others_one_of_them(rows):
    signs = [np.unpackbits(np.frombuffer(row, np.uint8)).astype(np.int8) * 2 - 1 for row in rows]
    found = near_duplicates([Looks(row.tobytes(), 1.0) for row in signs])
    near = [[int((one != other).sum()) <= NEAR for other in signs] for one in signs]
    kept = [at for at in range(len(rows)) if at not in found]
    assert all(not near[one][other] for one in kept for other in kept if one != other)
    assert all(of in kept and of < at and near[at][of] for at, of in found.items())

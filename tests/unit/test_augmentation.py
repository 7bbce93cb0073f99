"""Custom Diffusion's rows: a subject smaller or nearer, words that fit, and where on the latents its error counts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth_ms.data.augmentation import FAR, NEAR, augmented
from dreambooth_ms.data.cache import ContentCache, posterior_lookup
from dreambooth_ms.data.captions import Wording
from dreambooth_ms.data.masks import Mask, mask_of_latents
from dreambooth_ms.data.pictures import Frame, covering_size, resize_and_crop
from dreambooth_ms.data.plan import Framing, Plan, View
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record

SIDES = st.integers(8, 2000)
WHOLE = st.sampled_from([32, 64, 512, 1024])


def drawn(picture, whole, seed, center_crop=False):
    return augmented(picture, (whole, whole), np.random.default_rng(seed), center_crop)


@given(SIDES, SIDES, WHOLE, st.integers(0, 2**32), st.booleans())
def test_a_square_of_the_picture_is_pasted_whole_or_more_than_fills_the_crop(width, height, whole, seed, center_crop):
    frame, said = drawn((width, height), whole, seed, center_crop)
    side = min(frame.resized)
    assert frame.size == (whole, whole)
    assert frame.resized == covering_size((width, height), (side, side)), "keeps its proportions"
    assert 0 <= frame.top <= frame.highest[0] and 0 <= frame.left <= frame.highest[1]
    if frame.place:
        assert whole // 3 <= side <= whole
        assert all(0 <= one <= whole - side for one in frame.place)
        assert said in (FAR if side < 0.6 * whole else ("",))
        if center_crop:
            assert (frame.top, frame.left) == tuple(round(most / 2) for most in frame.highest)
    else:
        assert int(1.2 * whole) <= side < int(1.4 * whole)
        assert said in NEAR


def test_the_shares_are_those_of_the_published_script():
    """Of 20,000 rows at 512 px; 5 deviations of each share are at most 0.018."""
    rng, count = np.random.default_rng(0), 20_000
    found = [augmented((600, 512), (512, 512), rng, False) for _ in range(count)]
    sides = np.array([min(frame.resized) for frame, _ in found])
    said = Counter(words for _, words in found)
    far = 0.66 * (np.ceil(0.6 * 512) - 170) / (513 - 170)
    assert (sides <= 512).mean() == pytest.approx(0.66, abs=0.018)
    assert [said[words] / count for words in FAR] == pytest.approx([far / 2] * 2, abs=0.018)
    assert [said[words] / count for words in NEAR] == pytest.approx([0.17] * 2, abs=0.018)
    assert (sides.min(), sides.max(), sides[sides > 512].min()) == (170, 715, 614)
    places = np.array([frame.place for frame, _ in found if frame.place and min(frame.resized) == 300])
    assert places.min() >= 0 and places.max() <= 212 and 80 < places.mean() < 132


def concepts():
    records = tuple(Record(Path(f"{n}.png"), str(n), (96, 64), ("a photo of a <new1> cat",)) for n in range(3))
    of_class = tuple(Record(Path(f"c{n}.png"), f"c{n}", (64, 64), ("a photo of a cat",)) for n in range(3))
    return Concept(INSTANCE, records, group=INSTANCE), Concept(CLASS, of_class, group=CLASS)


@given(st.integers(0, 2**64 - 1), st.integers(1, 4), st.integers(0, 30))
def test_rows_are_a_function_of_seed_and_number_and_a_class_is_as_it_is(seed, size, step):
    framing = Framing(((64, 64),), False, True, augments=True)
    plan, single = Plan(concepts(), size, framing, seed), Plan(concepts(), 1, framing, seed)
    rows = plan.rows(step)
    assert rows[:size] == [single.rows(step * size + n)[0] for n in range(size)]
    for row in rows[size:]:
        assert row.view.frame.place is None and min(row.view.frame.resized) == 64
        assert row.view.prompt == "a photo of a cat"
    for row in rows[:size]:
        side, said = min(row.view.frame.resized), row.view.prompt.removesuffix("a photo of a <new1> cat")
        assert said in (FAR if side < 0.6 * 64 else NEAR if side > 64 else ("",))
        assert row.view.frame.place is None or row.view.corner == (0, 0)


def test_without_augmentation_rows_are_what_they_were():
    plain = Plan(concepts(), 2, Framing(((64, 64),), False, True), 7)
    assert all(row.view.frame.place is None and row.view.frame.resized == (96, 64) for row in plain.rows(3)[:2])


def test_a_row_that_reads_the_empty_prompt_reads_no_words_of_size():
    (subject, _), framing = concepts(), Framing(((64, 64),), False, False, augments=True)
    dropping = Concept(INSTANCE, subject.records, group=INSTANCE, wording=Wording(dropout=1 - 1e-9))
    assert {row.view.prompt for step in range(40) for row in Plan((dropping,), 1, framing, 0).rows(step)} == {""}


def picture(width=96, height=64):
    pixels = np.random.default_rng(3).integers(1, 120, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("flip", [False, True])
def test_a_smaller_picture_lies_on_grey_and_is_mirrored_with_it(flip):
    image, frame = picture(), Frame((64, 64), (36, 24), 0, 5, place=(30, 8))
    found = np.asarray(resize_and_crop(image, frame, "bilinear", flip))
    found = found[:, ::-1] if flip else found
    own = np.asarray(image.resize((36, 24), Image.Resampling.BILINEAR).crop((5, 0, 29, 24)))
    assert np.array_equal(found[30:54, 8:32], own)
    around = np.ones((64, 64), bool)
    around[30:54, 8:32] = False
    assert (found[around] == 128).all()


def test_an_enlarged_picture_is_a_part_of_it():
    image, frame = picture(), Frame((64, 64), (120, 80), 11, 40)
    own = image.resize((120, 80), Image.Resampling.BILINEAR).crop((40, 11, 104, 75))
    assert np.array_equal(np.asarray(resize_and_crop(image, frame, "bilinear")), np.asarray(own))


@pytest.mark.parametrize(
    "frame",
    [
        Frame((64, 64), (36, 24), 0, 13, place=(0, 0)),
        Frame((64, 64), (36, 24), 1, 0, place=(0, 0)),
        Frame((64, 64), (24, 24), 0, 0, place=(0, 0)),
        Frame((64, 64), (120, 80), 17, 0),
        Frame((64, 64), (120, 90), 0, 0),
    ],
)
def test_a_frame_of_another_picture_is_refused(frame):
    with pytest.raises(ValueError, match="is outside a picture"):
        resize_and_crop(picture(), frame, "bilinear")


@given(st.integers(0, 2**32), WHOLE, st.booleans())
def test_the_error_counts_where_the_published_script_lets_it_count(seed, whole, flip):
    """Rows top // f + 1 to (top + side) // f - 1, columns likewise, f = 8, where the picture lies in the end."""
    frame, _ = drawn((640, 480), whole, seed)
    found = mask_of_latents(None, frame, flip, (whole // 8, whole // 8), 0.5)
    assert found.mean() == pytest.approx(1, abs=1e-6) and found.dtype == np.float32
    if frame.place is None:
        assert (found == 1).all()
        return
    side, (top, left) = min(frame.resized), frame.place
    left = whole - side - left if flip else left
    expected, rim = np.zeros_like(found), 1 if side >= 32 else 0
    expected[top // 8 + rim : (top + side) // 8 - rim, left // 8 + rim : (left + side) // 8 - rim] = 1
    assert expected.any()
    assert np.array_equal(found > 0, expected > 0)


def test_a_picture_s_own_mask_counts_within_what_is_pasted(tmp_path):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, :32] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask, frame = Mask(tmp_path / "mask.png", "x"), Frame((64, 64), (40, 40), 0, 0, place=(8, 16))
    found = mask_of_latents(mask, frame, False, (8, 8), 0.0)
    assert np.array_equal(np.unique(np.nonzero(found)[0]), [2, 3, 4])
    assert np.array_equal(np.unique(np.nonzero(found)[1]), [3, 4])
    rest = mask_of_latents(mask, frame, False, (8, 8), 0.5)
    assert np.array_equal(np.unique(np.nonzero(rest)[1]), [3, 4, 5])


def test_the_cache_tells_frames_apart(tmp_path):
    record = Record(Path("x.png"), "digest", (96, 64), ("a",))
    lookup = posterior_lookup(ContentCache(tmp_path), "encoder", "lanczos", lambda: None, lambda views: views)
    frames = [
        Frame((64, 64), (96, 64), 0, 5),
        Frame((64, 64), (60, 40), 0, 5, place=(0, 0)),
        Frame((64, 64), (60, 40), 0, 5, place=(0, 1)),
        Frame((64, 64), (63, 42), 0, 5, place=(0, 0)),
        Frame((64, 64), (120, 80), 0, 5),
        Frame((64, 64), (121, 81), 0, 5),
    ]
    keys = [lookup.keys(View(record, "a", frame, False)) for frame in frames]
    assert len(set(keys)) == len(frames)

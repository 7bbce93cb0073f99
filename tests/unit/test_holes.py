"""The holes of rows: drawn as diffusers' script draws its masks, and a function of the row."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth_ms.data.cache import ContentCache, posterior_lookup
from dreambooth_ms.data.holes import Hole, beside_noise, draw_hole, masked, middle_hole
from dreambooth_ms.data.pictures import digest, to_array
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record
from dreambooth_ms.randomness import generator

SIZE = (48, 32)


@given(st.integers(0, 2**32), st.sampled_from([(48, 32), (33, 65), (512, 512)]))
def test_a_hole_lies_in_its_crop(seed, size):
    hole = draw_hole(size, np.random.default_rng(seed))
    left, top, right, bottom = hole.box
    assert 0 <= left <= right <= size[0]
    assert 0 <= top <= bottom <= size[1]
    # From a centre as far in either direction.
    assert (right - left) % 2 == (bottom - top) % 2 == 0
    mask = hole.mask(size)
    assert (mask.shape, mask.dtype) == (size[::-1], bool)
    # As with the published script: without an extent it may lie beyond the last pixel, and an ellipse has none.
    is_point = hole.is_ellipse and (left, top) == (right, bottom)
    assert mask.any() or left == size[0] or top == size[1] or is_point


def test_holes_have_every_size_and_both_kinds():
    holes = [draw_hole(SIZE, generator(0, "hole", row)) for row in range(3000)]
    widths = np.array([hole.box[2] - hole.box[0] for hole in holes])
    # Widths are drawn evenly from 0 to 48, and made even: 0 has (0, 1), 48 has itself alone.
    counts = np.bincount(widths, minlength=49)[::2]
    assert len(counts) == 25
    assert np.abs(counts[:-1] / 3000 - 2 / 49).max() < 0.02
    assert counts[-1] / 3000 == pytest.approx(1 / 49, abs=0.01)
    assert np.mean([hole.is_ellipse for hole in holes]) == pytest.approx(0.5, abs=0.05)
    centres = np.array([(hole.box[0] + hole.box[2]) / 2 for hole in holes])
    assert centres.mean() == pytest.approx(24, abs=1)


def test_a_mask_is_the_rectangle_or_the_ellipse_in_its_box():
    rectangle = Hole(False, (3, 2, 10, 7)).mask(SIZE)
    assert np.argwhere(rectangle).min(0).tolist() == [2, 3]
    assert np.argwhere(rectangle).max(0).tolist() == [7, 10]
    assert rectangle.sum() == 8 * 6
    ellipse = Hole(True, (3, 2, 10, 7)).mask(SIZE)
    assert (ellipse <= rectangle).all()
    assert 0.6 < ellipse.sum() / rectangle.sum() < 0.95
    assert Hole(False, (0, 0, 48, 32)).mask(SIZE).all()
    middle = middle_hole(SIZE).mask(SIZE)
    assert middle.mean() == 0.25
    assert np.array_equal(middle, middle[::-1, ::-1])


def test_what_stands_behind_the_noisy_latents():
    """The mask as torch's nearest neighbour makes it small, then the latents."""
    mask = np.random.default_rng(0).random((32, 48)) < 0.5
    latents = np.random.default_rng(1).standard_normal((4, 8, 12), np.float32)
    beside = beside_noise(mask, latents)
    small = torch.nn.functional.interpolate(torch.tensor(mask).float()[None, None], size=(8, 12))
    assert (beside.shape, beside.dtype) == ((5, 8, 12), np.float32)
    assert np.array_equal(beside[0], small[0, 0])
    assert np.array_equal(beside[1:], latents)
    picture = np.ones((3, 32, 48), np.float32)
    assert np.array_equal(masked(picture, mask), np.broadcast_to(~mask, (3, 32, 48)))


def concept(name, count):
    return Concept(name, tuple(Record(Path(f"{name}{i}.png"), f"{name}{i}", (50, 40), ("a",)) for i in range(count)))


def plan_of(batch_size, parts=1, inpaints=True):
    framing = Framing((SIZE,), False, True, inpaints=inpaints)
    return Plan((concept(INSTANCE, 3), concept(CLASS, 2)), batch_size, framing, 7, parts)


def test_a_hole_is_the_rows_own_however_rows_are_cut_into_batches():
    views = {
        form: {
            (row.concept.name, row.number): row.view for batch in range(batches) for row in plan_of(*form).rows(batch)
        }
        for form, batches in (((1, 1), 12), ((3, 1), 4), ((2, 3), 6))
    }
    first, *others = views.values()
    assert all(other == first for other in others)
    assert len({view.hole for view in first.values()}) == len(first) == 24


def test_without_inpainting_a_row_is_what_it_was():
    plain, holed = ([row.view for row in plan_of(2, inpaints=own).rows(3)] for own in (False, True))
    assert [replace(view, hole=None) for view in holed] == plain
    assert [view.encoded for view in plain] == [(view,) for view in plain]
    assert [view.encoded for view in holed] == [(own, view) for own, view in zip(plain, holed, strict=True)]


def test_the_masked_picture_is_encoded_under_a_key_of_its_own(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    record = Record(path, digest(path), (50, 40), ("a",))
    plan = replace(plan_of(1), concepts=(Concept(INSTANCE, (record,)),))
    seen = []

    def encode(pixels):
        seen.append(pixels[0])
        return pixels[:, :2, ::2, ::2]

    lookup = posterior_lookup(ContentCache(tmp_path / "c"), "e", "lanczos", lambda: encode, lambda views: views)
    whole, left = next(row.view for step in range(9) for row in plan.rows(step) if row.view.flip).encoded
    lookup.prepare([whole, left])
    assert len({lookup.keys(view) for view in (whole, left, replace(left, hole=middle_hole(SIZE)))}) == 3
    hole = left.hole.mask(SIZE)
    assert (seen[1][:, hole] == 0).all()
    assert np.array_equal(seen[1][:, ~hole], seen[0][:, ~hole])
    assert seen[0].shape == to_array(Image.open(path)).transpose(2, 0, 1)[:, :32, :48].shape

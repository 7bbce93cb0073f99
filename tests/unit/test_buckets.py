"""Sizes of several aspect ratios: which there are, which a picture takes, and which lose least if there may be few."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_ms.data.plan import least_losing, lost_area, nearest, sizes_of


def test_at_512_they_are_the_19_of_the_guide():
    sizes = sizes_of(512)
    assert len(sizes) == 19
    assert sizes[0] == (256, 1024) and sizes[9] == (512, 512) and sizes[-1] == (1024, 256)
    assert {(height, width) for width, height in sizes} == set(sizes)


def test_at_1024_they_are_the_40_of_sdxls_report():
    sizes = sizes_of(1024)
    assert len(sizes) == 40
    assert {(512, 2048), (704, 1344), (832, 1216), (1024, 1024), (1344, 768), (2048, 512)} <= set(sizes)
    assert (1344, 704) not in sizes, "the report has no mirror of 704 x 1344"
    areas = np.array([width * height for width, height in sizes])
    assert (areas.min(), areas.max()) == (960 * 1024 - 36864, 1024 * 1024)


@pytest.mark.parametrize("resolution", [32, 64, 96, 256, 384, 640, 768, 2048])
def test_at_others_they_have_about_the_area_of_the_square(resolution):
    sizes = sizes_of(resolution)
    assert (resolution, resolution) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert all(width % 8 == height % 8 == 0 for width, height in sizes)
    assert all(width * height <= resolution**2 for width, height in sizes)
    assert sizes[0][0] / sizes[0][1] <= 0.5


def test_a_picture_takes_the_size_that_loses_least_of_it_whatever_its_own_size():
    sizes = [(24, 40), (32, 32), (40, 24)]
    pictures = [(300, 500), (3000, 3001), (1000, 600), (100, 2000), (5, 4)]
    assert nearest(sizes, pictures).tolist() == [0, 1, 2, 0, 1]
    assert lost_area(sizes, pictures).min(1) == pytest.approx([0, 1 / 3001, 0, 1 - 0.05 / 0.6, 0.2])


@given(st.lists(st.tuples(st.integers(10, 99), st.integers(10, 99)), min_size=1, max_size=8), st.integers(1, 5))
def test_few_sizes_are_those_that_lose_least(pictures, at_most):
    """Beside all choices of so many."""
    sizes = [(8, 32), (16, 24), (16, 16), (24, 16), (32, 8), (40, 8)]
    chosen = least_losing(sizes, pictures, at_most)
    best = min(lost_area(some, pictures).min(1).sum() for some in combinations(sizes, at_most))
    assert 1 <= len(chosen) <= at_most
    assert lost_area(chosen, pictures).min(1).sum() == pytest.approx(best)

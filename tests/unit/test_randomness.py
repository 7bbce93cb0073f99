"""Every draw is a function of its name: seed, purpose, step and row."""

import itertools

import numpy as np
import pytest

from dreambooth_ms.randomness import generator, standard_normal

SIZE = 10_000
# Five standard deviations of the correlation of independent draws.
UNCORRELATED = 5 / np.sqrt(SIZE)

NAME = {"seed": 7, "purpose": "noise", "step": 3, "row": 2}
OTHERS = [
    NAME | change
    for change in (
        {"seed": 8},
        {"purpose": "timestep"},
        {"purpose": "noise "},
        {"step": 4},
        {"row": 3},
        {"step": 2, "row": 3},  # step and row are not added up or exchanged
        {"step": 0, "row": 0},
    )
]


def test_the_same_name_draws_the_same_numbers():
    assert np.array_equal(standard_normal((4, 5), **NAME), standard_normal((4, 5), **NAME))


def test_these_numbers_stay_the_same_in_every_version():
    """A resumed run and a published seed rely on it."""
    first = [-0.1427842, 1.3306088, 0.1919278]
    assert standard_normal((3,), 42, "scene", 5, 1).tolist() == pytest.approx(first, abs=1e-6)


def test_draws_of_different_names_are_uncorrelated():
    draws = [standard_normal((SIZE,), **name) for name in (NAME, *OTHERS)]
    for first, second in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < UNCORRELATED


def test_draws_are_standard_normal():
    draws = standard_normal((SIZE,), **NAME)
    assert draws.dtype == np.float32
    assert abs(draws.mean()) < UNCORRELATED
    assert abs(draws.std() - 1) < UNCORRELATED


def test_a_long_draw_never_runs_into_the_next_rows():
    """No block of the long one is the beginning of another row's or step's."""
    long = generator(**NAME).integers(0, 2**63, 50_000)
    starts = [generator(**(NAME | change)).integers(0, 2**63) for change in ({"row": 3}, {"row": 4}, {"step": 4})]
    assert not np.isin(starts, long).any()


def test_a_row_draws_the_same_whatever_the_size_of_the_batch():
    """One process with four rows, two with two, and four with one, in any order."""
    together = np.stack([standard_normal((6,), 0, "noise", 9, row) for row in range(4)])
    by_process = {
        row: standard_normal((6,), 0, "noise", 9, row) for process in (1, 0) for row in (2 * process + 1, 2 * process)
    }
    assert all(np.array_equal(together[row], by_process[row]) for row in range(4))


def test_a_draw_leaves_no_trace():
    """What is drawn in between, and numpy's global state, do not matter."""
    expected = standard_normal((3,), **NAME)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    generator(**NAME).standard_normal(1000)
    standard_normal((5,), **OTHERS[0])
    assert np.array_equal(np.random.get_state()[1], before)
    assert np.array_equal(standard_normal((3,), **NAME), expected)


@pytest.mark.parametrize("seed", [0, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 2])
def test_every_seed_up_to_the_largest_counts(seed):
    """Neighbours differ for every purpose, also where a float64 could not tell them apart."""
    for purpose in ("noise", "timestep", "scene", "initial weights"):
        assert not np.array_equal(standard_normal((4,), seed, purpose), standard_normal((4,), seed + 1, purpose))

"""The norm of gradients: exact enough at every size, and no number where a gradient is none."""

import numpy as np
import pytest
from mindspore import Tensor

from dreambooth_ms.ops import Formulation, SumOfSquares, use_formulation
from dreambooth_ms.ops.sum_of_squares import MAX_JOINED

SMALL, LARGE = [(3,), (4, 5), (2, 3, 2)], [(MAX_JOINED + 1,), (1025, 16), (5, 4, 1024)]


def sum_of(tensors):
    return float(SumOfSquares([tensor.shape for tensor in tensors])(tuple(map(Tensor, tensors))).asnumpy())


@pytest.mark.parametrize("formulation", list(Formulation))
@pytest.mark.parametrize("shapes", [SMALL, LARGE, SMALL + LARGE, SMALL[:1]], ids=["small", "large", "both", "one"])
def test_it_is_numpys(shapes, formulation):
    rng = np.random.default_rng(0)
    tensors = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    with use_formulation(formulation):
        ours = sum_of(tensors)
    assert ours == pytest.approx(sum(float((tensor.astype(np.float64) ** 2).sum()) for tensor in tensors), rel=1e-6)


def test_it_is_right_for_millions_of_numbers(pynative):
    """Where one running sum in float32 would stop to grow: at 2^24."""
    assert sum_of([np.ones((40_000, 1_000), np.float32)]) == pytest.approx(4e7, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1], ids=["joined", "alone"])
def test_what_is_no_number_stays_none(place, bad, pynative):
    tensors = [np.ones(3, np.float32), np.ones((MAX_JOINED, 2), np.float32)]
    tensors[place].reshape(-1)[1] = bad
    assert not np.isfinite(sum_of(tensors))

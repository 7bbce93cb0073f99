"""Norms, activations, linear layers and upsampling are torch's, forward and backward."""

import numpy as np
import pytest
import torch
from mindspore import Tensor, nn

from dreambooth_ms.ops import Dense, Embedding, GatedGelu, Gelu, GroupNorm, LayerNorm, QuickGelu
from dreambooth_ms.ops.layout import (
    add_per_channel,
    average_pool,
    from_public_layout,
    scale_and_shift,
    to_public_layout,
    upsample_nearest,
)
from dreambooth_ms.ops.linear import BiasAdd
from dreambooth_ms.ops.norm import MAX_SMALL_ROWS, TokenGroupNorm
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.weights.bundle import load_strict
from tests.parity.reference import InputGradients, ValueAndGradients, normal, public_gradients, relative_error
from tools.formulation import use_formulation

# Float32 sums of at most some hundred numbers in another order: measured below 2e-6.
TOLERANCE = 5e-6

BOTH_FORMULATIONS = pytest.mark.parametrize("written_for", list(Formulation), ids=lambda chosen: chosen.value)


class OnPublicImage(nn.Cell):
    """A cell on images, between the public layouts, so that formulations can be compared."""

    def __init__(self, make):
        super().__init__()
        self.inner = make()

    def construct(self, x):
        return to_public_layout(self.inner(from_public_layout(x)))


def torch_gradients(function, *arrays):
    """Result, sensitivity and gradients of a torch function of arrays."""
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
    y = function(*inputs)
    sensitivity = normal(*y.shape, seed=9)
    (y * torch.tensor(sensitivity)).sum().backward()
    return y, sensitivity, [x.grad for x in inputs]


def assert_same(cell, x, weights, function, tolerance=TOLERANCE):
    """A cell with `weights` and the torch function of (x, *weights) agree on result and all gradients."""
    load_strict(cell, weights, "the test")
    y, sensitivity, (dx, *gradients) = torch_gradients(function, x, *weights.values())
    result, (input_gradients, weight_gradients) = ValueAndGradients(cell)(Tensor(sensitivity), Tensor(x))
    ours = public_gradients(cell, weight_gradients)
    assert relative_error(result, y) < tolerance
    assert relative_error(input_gradients[0], dx) < tolerance
    for name, gradient in zip(weights, gradients, strict=True):
        assert relative_error(ours[name], gradient) < tolerance, name


def assert_same_without_weights(cell, function, *arrays):
    y, sensitivity, expected = torch_gradients(function, *arrays)
    result, gradients = InputGradients(cell)(*(Tensor(x) for x in (sensitivity, *arrays)))
    assert relative_error(result, y) < TOLERANCE
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE


@BOTH_FORMULATIONS
@pytest.mark.parametrize("act_fn", ["", "silu", "gelu"])
def test_group_norm_is_torchs(written_for, act_fn):
    """Rows and groups of very unlike size, so that statistics of another row or group would show."""

    def reference(x, weight, bias):
        y = torch.nn.functional.group_norm(x, 4, weight, bias, eps=1e-5)
        return getattr(torch.nn.functional, act_fn)(y) if act_fn else y

    x = normal(2, 12, 5, 7) * np.array([1, 4], np.float32)[:, None, None, None]
    x[:, 3:6] *= 10
    weights = {"inner.weight": normal(12), "inner.bias": normal(12, seed=1)}
    with use_formulation(written_for):
        assert_same(OnPublicImage(lambda: GroupNorm(4, 12, eps=1e-5, act_fn=act_fn)), x, weights, reference)


@BOTH_FORMULATIONS
def test_group_norm_of_tokens_is_torchs(written_for):
    def reference(x, weight, bias):
        return torch.nn.functional.group_norm(x.transpose(1, 2), 4, weight, bias, eps=1e-5).transpose(1, 2)

    x = normal(2, 7, 12) * np.array([1, 4], np.float32)[:, None, None]
    x[..., 3:6] *= 10
    with use_formulation(written_for):
        cell = TokenGroupNorm(4, 12, eps=1e-5)
        assert_same(cell, x, {"weight": normal(12), "bias": normal(12, seed=1)}, reference)


def test_group_norm_adds_eps_to_the_variance():
    """An eps of the variance's own size."""
    weights = {"inner.weight": normal(4), "inner.bias": normal(4, seed=1)}
    assert_same(
        OnPublicImage(lambda: GroupNorm(2, 4, eps=1.0)),
        normal(1, 4, 3, 5),
        weights,
        lambda x, w, b: torch.nn.functional.group_norm(x, 2, w, b, eps=1.0),
    )


def test_group_norm_stays_accurate_far_from_zero():
    """Mean 100, deviation 1, against float64: a variance from one pass over the squares would be wrong by 1e-3."""
    x = 100 + normal(2, 8, 16, 16)
    weights = {"inner.weight": normal(8), "inner.bias": normal(8, seed=1)}
    cell = OnPublicImage(lambda: GroupNorm(2, 8, eps=1e-5))
    load_strict(cell, weights, "the test")
    y, sensitivity, (dx, dweight, dbias) = torch_gradients(
        lambda x, w, b: torch.nn.functional.group_norm(x, 2, w, b, eps=1e-5),
        *(array.astype(np.float64) for array in (x, *weights.values())),
    )
    result, (input_gradients, (ours_dweight, ours_dbias)) = ValueAndGradients(cell)(Tensor(sensitivity), Tensor(x))
    errors = {
        "result": relative_error(result, y),
        "input": relative_error(input_gradients[0], dx),
        "weight": relative_error(ours_dweight, dweight),
        "bias": relative_error(ours_dbias, dbias),
    }
    print({name: f"{error:.1e}" for name, error in errors.items()})
    # The scale's gradient is the difference of two sums about 100 times its size: measured 5e-5, the others below 1e-6.
    assert errors.pop("weight") < 2e-4
    assert max(errors.values()) < TOLERANCE


@BOTH_FORMULATIONS
@pytest.mark.parametrize("images", [2, 300], ids=["by the library's kernel", "by operations"])
def test_layer_norm_is_torchs(images, written_for):
    x = normal(images, 5, 24) * np.array([1, 10, 1, 0.1, 1], np.float32)[None, :, None] + 1
    assert (x.size <= MAX_SMALL_ROWS) == (images == 2)
    weights = {"weight": normal(24), "bias": normal(24, seed=1)}
    with use_formulation(written_for):
        layer_norm = LayerNorm(24)
    assert_same(layer_norm, x, weights, lambda x, w, b: torch.nn.functional.layer_norm(x, (24,), w, b, 1e-5))


def test_layer_norm_adds_eps_to_the_variance():
    weights = {"weight": normal(8), "bias": normal(8, seed=1)}
    assert_same(
        LayerNorm(8, eps=1.0),
        normal(3, 8),
        weights,
        lambda x, w, b: torch.nn.functional.layer_norm(x, (8,), w, b, 1.0),
    )


@pytest.mark.parametrize("has_bias", [True, False], ids=["with bias", "without"])
def test_a_linear_layer_is_torchs(has_bias):
    weights = {"weight": normal(5, 8)} | ({"bias": normal(5)} if has_bias else {})
    assert_same(Dense(8, 5, has_bias), normal(2, 3, 8), weights, torch.nn.functional.linear)


def test_adding_a_bias_is_torchs():
    assert_same_without_weights(BiasAdd(), torch.add, normal(6, 5), normal(5))


def test_an_embedding_is_a_row_of_its_table(pynative):
    cell, table, ids = Embedding(7, 4), normal(7, 4), np.array([[6, 0, 6], [1, 2, 3]], np.int32)
    load_strict(cell, {"weight": table}, "the test")
    assert np.array_equal(cell(Tensor(ids)).asnumpy(), table[ids])


ACTIVATIONS = {
    "exact": (Gelu, torch.nn.functional.gelu),
    "quick": (QuickGelu, lambda x: x * torch.sigmoid(1.702 * x)),
}


@pytest.mark.parametrize(("cell", "function"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_gelu_is_torchs(cell, function):
    """From far in the one tail to far in the other."""
    assert_same_without_weights(cell(), function, np.linspace(-12, 12, 481, dtype=np.float32).reshape(13, 37))


def test_gated_gelu_multiplies_the_first_half_by_the_gelu_of_the_second():
    def reference(x):
        value, gate = x.chunk(2, 1)
        return value * torch.nn.functional.gelu(gate)

    assert_same_without_weights(GatedGelu(), reference, 4 * normal(7, 10))


@BOTH_FORMULATIONS
def test_upsampling_repeats_every_pixel(written_for):
    with use_formulation(written_for):
        assert_same_without_weights(
            OnPublicImage(upsample_nearest),
            lambda x: torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"),
            normal(2, 3, 4, 5),
        )


@BOTH_FORMULATIONS
def test_pooling_is_the_mean_of_every_square(written_for):
    with use_formulation(written_for):
        pool = OnPublicImage(average_pool)
        assert_same_without_weights(pool, lambda x: torch.nn.functional.avg_pool2d(x, 2), normal(2, 3, 4, 6))


class ScaledAndShifted(nn.Cell):
    def construct(self, x, by):
        return to_public_layout(scale_and_shift(from_public_layout(x), by))


@BOTH_FORMULATIONS
def test_every_channel_is_scaled_and_shifted(written_for):
    def reference(x, by):
        scale, shift = by[:, :, None, None].chunk(2, 1)
        return x * (1 + scale) + shift

    with use_formulation(written_for):
        assert_same_without_weights(ScaledAndShifted(), reference, normal(2, 3, 4, 5), normal(2, 6))


@BOTH_FORMULATIONS
def test_a_number_per_channel_is_added_to_every_pixel_of_its_row(written_for, pynative):
    x, bias = normal(2, 3, 4, 5), normal(2, 3)
    with use_formulation(written_for):
        result = to_public_layout(add_per_channel(from_public_layout(Tensor(x)), Tensor(bias)))
    assert np.array_equal(result.asnumpy(), x + bias[:, :, None, None])

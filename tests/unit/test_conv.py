"""A convolution is torch's, however it is written and however it is cut."""

import numpy as np
import pytest
import torch
from mindspore import Tensor, nn

from dreambooth_ms.ops import Conv2d, conv
from dreambooth_ms.ops.layout import from_public_layout, to_public_layout
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.weights.bundle import load_strict
from tests.parity.reference import ValueAndGradients, normal, public_gradients, relative_error
from tools.formulation import use_formulation

# Float32 sums of at most some hundred products in another order: measured below 1e-6.
TOLERANCE = 5e-6

IN_CHANNELS, OUT_CHANNELS = 3, 5


class PublicConv(nn.Cell):
    """A convolution between images in the public layout, so that formulations can be compared."""

    def __init__(self, **options):
        super().__init__()
        self.conv = Conv2d(IN_CHANNELS, OUT_CHANNELS, **options)

    def construct(self, x):
        return to_public_layout(self.conv(from_public_layout(x)))


def torch_convolution(image, weights, sensitivity, stride=1, padding=(0, 0, 0, 0)):
    """Result, and gradients of the image and of every weight."""
    top, bottom, left, right = padding
    x = torch.tensor(image, requires_grad=True)
    parameters = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    y = torch.nn.functional.conv2d(padded, parameters["conv.weight"], parameters.get("conv.bias"), stride)
    (y * torch.tensor(sensitivity)).sum().backward()
    return y, x.grad, {name: parameter.grad for name, parameter in parameters.items()}


def compare(height, width, kernel_size, stride=1, padding=None, has_bias=True):
    """Worst relative error of result, input gradient and weight gradients, in the present formulation."""
    weights = {"conv.weight": normal(OUT_CHANNELS, IN_CHANNELS, kernel_size, kernel_size)}
    if has_bias:
        weights["conv.bias"] = normal(OUT_CHANNELS)
    network = PublicConv(kernel_size=kernel_size, stride=stride, padding=padding, has_bias=has_bias)
    load_strict(network, weights, "the test")

    top, bottom, left, right = padding or (kernel_size // 2,) * 4
    shape = ((height + top + bottom - kernel_size) // stride + 1, (width + left + right - kernel_size) // stride + 1)
    image, sensitivity = normal(2, IN_CHANNELS, height, width), normal(2, OUT_CHANNELS, *shape, seed=1)
    y, dx, gradients = torch_convolution(image, weights, sensitivity, stride, (top, bottom, left, right))

    result, (input_gradients, weight_gradients) = ValueAndGradients(network)(Tensor(sensitivity), Tensor(image))
    ours = public_gradients(network, weight_gradients)
    assert ours.keys() == gradients.keys()
    return max(
        relative_error(result, y),
        relative_error(input_gradients[0], dx),
        *(relative_error(ours[name], gradient) for name, gradient in gradients.items()),
    )


FORMS = {
    "pointwise": {"kernel_size": 1},
    "pointwise with stride": {"kernel_size": 1, "stride": 2},
    "square": {"kernel_size": 3},
    "without bias": {"kernel_size": 3, "has_bias": False},
    "halving": {"kernel_size": 3, "stride": 2},
    "halving, padded below and right": {"kernel_size": 3, "stride": 2, "padding": (0, 1, 0, 1)},
    "four unlike paddings": {"kernel_size": 3, "padding": (0, 1, 2, 3)},
    "patches": {"kernel_size": 4, "stride": 4, "padding": (0, 0, 0, 0), "has_bias": False},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_convolution_and_its_gradients_are_torchs(form):
    assert compare(8, 12, **form) < TOLERANCE


@pytest.mark.parametrize("form", [FORMS["square"], FORMS["halving, padded below and right"]], ids=["square", "halving"])
def test_a_convolution_cut_into_parts_is_the_same(monkeypatch, form):
    """An odd limit on a size of its own, so that the last part is shorter than the others."""
    monkeypatch.setattr(conv, "MAX_TAPS", 700)
    parts = conv._parts(2, 10 * 14, 9 * IN_CHANNELS)
    lengths = {stop - start for start, stop in parts}
    assert len(parts) > 2
    assert len(lengths) == 2
    assert compare(10, 14, **form) < TOLERANCE


def test_every_part_of_a_cut_convolution_keeps_its_taps_below_the_limit(monkeypatch):
    for limit in (1, 100, 1000, 10**6):
        monkeypatch.setattr(conv, "MAX_TAPS", limit)
        parts = conv._parts(2, 35, 27)
        assert [pixel for start, stop in parts for pixel in range(start, stop)] == list(range(35))
        assert all((stop - start) * 2 * 27 <= limit or stop - start == 1 for start, stop in parts)


@pytest.mark.parametrize("name", ["pointwise", "halving, padded below and right", "four unlike paddings", "patches"])
def test_the_native_convolution_of_ascend_is_the_same(name):
    with use_formulation(Formulation.ASCEND):
        assert isinstance(Conv2d(3, 5).convolve, conv._NativeConvolution)
        assert compare(8, 12, **FORMS[name]) < TOLERANCE


def test_pynative_computes_the_same(pynative):
    assert compare(8, 12, **FORMS["halving, padded below and right"]) < TOLERANCE


def test_a_pixel_outside_the_image_counts_as_zero():
    """All taps of a corner but four lie outside."""
    network = PublicConv(kernel_size=3, has_bias=False)
    load_strict(network, {"conv.weight": np.ones((OUT_CHANNELS, IN_CHANNELS, 3, 3), np.float32)}, "the test")
    result = network(Tensor(np.ones((1, IN_CHANNELS, 4, 5), np.float32))).asnumpy()
    assert (result[0, :, 0, 0] == 4 * IN_CHANNELS).all()
    assert (result[0, :, 0, 1] == 6 * IN_CHANNELS).all()
    assert (result[0, :, 1, 1] == 9 * IN_CHANNELS).all()

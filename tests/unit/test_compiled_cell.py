"""A compiled cell that is called again runs the right graph, with what its parameters hold by then."""

import gc
import weakref

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.runtime.compile_cache import use_compile_cache
from dreambooth_ms.runtime.compiled_cell import CompiledCell


class Scaled(CompiledCell):
    """x times a parameter, and one more in training; counts how often MindSpore was asked to compile."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(2.0, ms.float32), name="weight")
        self.asked = 0

    def compile(self, *args, **kwargs):
        self.asked += 1
        super().compile(*args, **kwargs)

    def construct(self, x, added=0):
        y = x * self.weight.astype(x.dtype) + added
        if self.training:
            y = y + 1
        return y, ops.shape(x)


@pytest.fixture
def cell():
    with use_compile_cache(None):
        yield Scaled()


def tensor(*shape, dtype=np.float32):
    return Tensor(np.arange(np.prod(shape)).reshape(shape).astype(dtype))


def test_it_is_compiled_once_for_each_shape_and_dtype(cell):
    inputs = [tensor(3), tensor(2, 2), tensor(3, dtype=np.float16)]
    for x in (*inputs, *inputs, *inputs):
        y, shape = cell(x)
        np.testing.assert_array_equal(y.asnumpy(), 2 * x.asnumpy())
        assert (y.dtype, shape) == (x.dtype, x.shape)
    assert cell.asked == len(inputs)


def test_training_is_another_graph(cell):
    x = tensor(3)
    for training in (False, True, False, True):
        cell.set_train(training)
        np.testing.assert_array_equal(cell(x)[0].asnumpy(), 2 * x.asnumpy() + training)
    assert cell.asked == 2


def test_new_values_of_a_parameter_are_seen_and_old_results_stay(cell):
    first = cell(tensor(3))[0]
    cell.weight.set_data(Tensor(5.0, ms.float32))
    second = cell(tensor(3))[0]
    np.testing.assert_array_equal(first.asnumpy(), [0, 2, 4])
    np.testing.assert_array_equal(second.asnumpy(), [0, 5, 10])


def test_inputs_that_are_no_tensors_are_constants(cell):
    for added in (1, 2, 1):
        np.testing.assert_array_equal(cell(tensor(3), added)[0].asnumpy(), np.arange(3) * 2 + added)
        np.testing.assert_array_equal(cell(tensor(3), added=added)[0].asnumpy(), np.arange(3) * 2 + added)


def test_a_parameter_may_be_an_input(cell):
    for value in (1.0, 3.0):
        added = Parameter(Tensor([value], ms.float32), name="added")
        np.testing.assert_array_equal(cell(added)[0].asnumpy(), [2 * value])


def test_without_graph_mode_it_is_computed_operation_by_operation(cell):
    cell(tensor(3))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        cell.weight.set_data(Tensor(7.0, ms.float32))
        np.testing.assert_array_equal(cell(tensor(3))[0].asnumpy(), [0, 7, 14])
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    assert cell.asked == 1


class Owner(nn.Cell):
    def __init__(self):
        super().__init__()
        self.dense = nn.Dense(2, 3)

    def twice(self, x, y):
        return self.dense(x) + self.dense(y)


def test_a_compiled_method_of_a_network_does_not_keep_the_network():
    """An autoencoder that pictures were encoded with is no longer in memory while a UNet is trained."""
    owner = Owner()
    with use_compile_cache(None):
        CellMethod(owner.twice)(tensor(4, 2), tensor(4, 2))
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None

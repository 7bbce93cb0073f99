"""What every test shares: the device, the compile cache, and both execution modes."""

import gc
import os

import mindspore as ms
import pytest
import torch

from dreambooth_ms.runtime.device import set_up_device


@pytest.fixture(scope="session", autouse=True)
def device(tmp_path_factory):
    """Graph mode on CPU, once for the whole run.

    As for users the compile cache is on, in a folder that starts empty: the tests, and the commands that they start,
    compile a graph once between them. Tests of the cache name a folder of their own.
    """
    temporary = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        temporary = temporary.parent
    os.environ["XDG_CACHE_HOME"] = str(temporary / "cache")
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    set_up_device("CPU", 0)


@pytest.fixture(scope="module", autouse=True)
def given_back(device):
    """A file's graphs are gone before the next file's are compiled.

    MindSpore keeps graphs with their weights, 8 GB of them after a whole run, looks through all at each compilation,
    and has all objects collected before: a third of the time at the end (measured). What stays is not looked at again.
    """
    yield
    gc.collect()
    ms.ms_memory_recycle()
    gc.freeze()


@pytest.fixture(autouse=True)
def graph_mode(device):
    """What a command in this process left, such as by `--ms_mode 1`, is not the next test's."""
    yield
    if ms.get_context("mode") != ms.GRAPH_MODE:
        set_up_device("CPU", 0)


@pytest.fixture
def pynative(device):
    """PyNative (`--ms_mode 1`) for one test."""
    set_up_device("CPU", 1)

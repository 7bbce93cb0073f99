"""What every test shares: the device, and both execution modes."""

import os

import pytest
import torch

from dreambooth_ms.ops import set_up_device


@pytest.fixture(scope="session", autouse=True)
def device():
    """Graph mode on CPU, once for the whole run; tests of the compile cache name a folder of their own."""
    os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"
    torch.set_num_threads(2)
    set_up_device("CPU", 0)


@pytest.fixture
def compile_once(device, monkeypatch, tmp_path):
    """For one test, what is compiled again comes from the compile cache."""
    with monkeypatch.context() as patch:
        patch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
        patch.setenv("MS_COMPILER_CACHE_PATH", str(tmp_path / "compiled"))
        yield
    set_up_device("CPU", 0)


@pytest.fixture
def pynative(device):
    """PyNative (`--ms_mode 1`) for one test."""
    set_up_device("CPU", 1)
    yield
    set_up_device("CPU", 0)

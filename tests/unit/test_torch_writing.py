"""PyTorch's files that we write are what PyTorch writes, to PyTorch and to ourselves."""

import numpy as np
import pytest
import torch

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file, read_metadata, write_as_named
from dreambooth_ms.formats.files.stored import Container, StoredTensor
from dreambooth_ms.formats.files.torch_writing import write_torch

VALUES = {
    "three": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "scalar": np.array(3.0, np.float32),
    "none": np.zeros((0, 3), np.float16),
    "<new1>": np.arange(300),
}


@pytest.fixture
def path(tmp_path):
    content = {name: StoredTensor.of(values) for name, values in VALUES.items()}
    half = StoredTensor.of(VALUES["three"]).cast_to(DType.BF16)
    write_torch(tmp_path / "x.bin", {**content, "empty": None, "half": half}, {"steps": "5"})
    return tmp_path / "x.bin"


def test_torch_reads_it_with_weights_only(path):
    found = torch.load(path, weights_only=True)
    assert [*found] == [*VALUES, "empty", "half"]
    for name, values in VALUES.items():
        assert found[name].is_contiguous()
        assert found[name].dtype == torch.from_numpy(values).dtype
        assert np.array_equal(found[name].numpy(), values)
    assert found["empty"] == {}
    assert torch.equal(found["half"], torch.from_numpy(VALUES["three"]).bfloat16())
    assert torch.equal(torch.load(path, mmap=True)["three"], found["three"])


def test_we_read_it_with_its_notes(path):
    file = open_tensor_file(path)
    assert file.container is Container.TORCH_ZIP
    assert file.metadata == read_metadata(path) == {"steps": "5"}
    for name, values in VALUES.items():
        assert np.array_equal(file.tensors[name].read(), values)


def test_what_torch_writes_of_it_reads_the_same(path, tmp_path):
    torch.save(torch.load(path, weights_only=True), tmp_path / "again.bin")
    again, file = open_tensor_file(tmp_path / "again.bin"), open_tensor_file(path)
    assert {n: (t.shape, t.dtype) for n, t in again.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in file.tensors.items()
    }


def test_nothing_is_left_of_what_cannot_be_written(tmp_path):
    broken = StoredTensor.of(np.array([np.nan], np.float32), label="its source")
    with pytest.raises(WeightError, match="its source: holds NaN or infinity"):
        write_as_named(tmp_path / "x.bin", {"a": broken}, {})
    assert not list(tmp_path.iterdir())


def test_notes_that_are_too_long_are_passed_over(tmp_path):
    write_torch(tmp_path / "x.bin", {"a": StoredTensor.of(VALUES["scalar"])}, {"long": "x" * 1001, "short": "y"})
    assert read_metadata(tmp_path / "x.bin") == {"short": "y"}

"""Tensors go into files and come out of them with every bit, one at a time, and files appear whole or not at all."""

import errno
import io
import json
import os
import shutil
import struct
from collections import namedtuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files import mindspore_ckpt, stored
from dreambooth_ms.formats.files.dtypes import DType, cast
from dreambooth_ms.formats.files.mindspore_ckpt import write_mindspore_ckpt
from dreambooth_ms.formats.files.open import open_tensor_file, read_tensors
from dreambooth_ms.formats.files.safetensors_file import write_safetensors, write_sharded_safetensors
from dreambooth_ms.formats.files.stored import Container, StoredTensor
from tests.stored_tensors import RNG, SHAPES, numbers, one_of_each, random_tensor, same


class TestRoundTrips:
    def test_safetensors(self, tmp_path):
        tensors = one_of_each()
        write_safetensors(tmp_path / "file", tensors, {"key": "välue", "": '"'})
        file = open_tensor_file(tmp_path / "file")
        assert (file.container, file.metadata) == (Container.SAFETENSORS, {"key": "välue", "": '"'})
        assert same(file.tensors, tensors)

    def test_mindspore(self, tmp_path):
        tensors = one_of_each()
        write_mindspore_ckpt(tmp_path / "file", tensors)
        file = open_tensor_file(tmp_path / "file")
        assert (file.container, file.metadata) == (Container.MINDSPORE, {})
        assert same(file.tensors, tensors)
        assert list(file.tensors) == list(tensors)

    def test_a_sharded_set(self, tmp_path):
        tensors = one_of_each()
        paths = write_sharded_safetensors(tmp_path, "model", tensors, {"a": "b"}, max_shard_bytes=100)
        index, *shards = paths
        assert index.name == "model.safetensors.index.json"
        assert [path.name for path in shards] == [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
        assert len(shards) > 3
        assert sorted(tmp_path.iterdir()) == sorted(paths)
        assert json.loads(index.read_text())["metadata"] == {"total_size": sum(t.byte_count for t in tensors.values())}
        file = open_tensor_file(index)
        assert (file.container, file.metadata) == (Container.SHARDED, {"a": "b"})
        assert same(file.tensors, tensors)
        for shard in shards:
            held = open_tensor_file(shard, Container.SAFETENSORS).tensors
            assert len(held) == 1 or sum(tensor.byte_count for tensor in held.values()) <= 100

    def test_what_fits_one_file_gets_one_file(self, tmp_path):
        assert write_sharded_safetensors(tmp_path, "model", {"a": numbers(3)}) == [tmp_path / "model.safetensors"]
        assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]

    @pytest.mark.parametrize("write", [write_safetensors, write_mindspore_ckpt])
    def test_arrays_that_are_turned_or_of_other_byte_order(self, tmp_path, write):
        values = RNG.standard_normal((3, 4))
        write(tmp_path / "file", {"a": StoredTensor.of(values.T), "b": StoredTensor.of(values.astype(">f8"))})
        tensors = open_tensor_file(tmp_path / "file").tensors
        assert np.array_equal(tensors["a"].read(), values.T)
        assert np.array_equal(tensors["b"].read(), values)

    def test_no_tensors_at_all(self, tmp_path):
        write_safetensors(tmp_path / "file", {})
        assert open_tensor_file(tmp_path / "file").tensors == {}

    def test_bfloat16_is_widened_where_arrays_are_wanted(self, tmp_path):
        write_safetensors(tmp_path / "file", {"a": numbers(5).cast_to(DType.BF16), "b": numbers(2).cast_to(DType.F16)})
        tensors, _ = read_tensors(tmp_path / "file")
        assert (tensors["a"].dtype, tensors["b"].dtype) == (np.float32, np.float16)
        stored = open_tensor_file(tmp_path / "file", Container.SAFETENSORS).tensors["a"]
        assert np.array_equal(tensors["a"], cast(stored.read(), DType.BF16, DType.F32))

    def test_a_large_parameter_is_written_in_parts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mindspore_ckpt, "SLICE_BYTES", 16)
        tensors, written = {"a": numbers(4), "b": numbers(5, 3), "c": numbers(0, 2)}, []
        write_mindspore_ckpt(tmp_path / "file", tensors, written.append)
        assert same(open_tensor_file(tmp_path / "file", Container.MINDSPORE).tensors, tensors)
        assert written == [16, 16, 16, 16, 12, 0]


class TestTheLibrary:
    """safetensors' own code reads what we write, and the other way round; bfloat16 is compared beside PyTorch."""

    ARRAYS = {
        f"{dtype.value} {shape}": random_tensor(dtype, shape).read()
        for dtype in DType
        for shape in SHAPES
        if dtype is not DType.BF16
    }

    def test_it_reads_ours(self, tmp_path):
        write_safetensors(tmp_path / "file", {name: StoredTensor.of(values) for name, values in self.ARRAYS.items()})
        found = load_file(tmp_path / "file")
        assert found.keys() == self.ARRAYS.keys()
        for name, values in self.ARRAYS.items():
            assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
            assert found[name].tobytes() == values.tobytes()

    def test_we_read_its(self, tmp_path):
        save_file(self.ARRAYS, tmp_path / "file", {"format": "np"})
        file = open_tensor_file(tmp_path / "file", Container.SAFETENSORS)
        assert file.metadata == {"format": "np"}
        assert same(file.tensors, {name: StoredTensor.of(values) for name, values in self.ARRAYS.items()})

    def test_the_same_tensors_in_its_order_give_the_same_bytes(self, tmp_path):
        save_file(self.ARRAYS, tmp_path / "its", {"format": "np"})
        its = open_tensor_file(tmp_path / "its", Container.SAFETENSORS)
        write_safetensors(tmp_path / "ours", its.tensors, its.metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "its").read_bytes()


class TestStreaming:
    """One tensor is in memory at a time; files appear whole or not at all."""

    WRITERS = [
        lambda folder, tensors, **more: write_safetensors(folder / "file", tensors, **more),
        lambda folder, tensors, **more: write_mindspore_ckpt(folder / "file", tensors, **more),
        lambda folder, tensors, **more: write_sharded_safetensors(folder, "model", tensors, max_shard_bytes=20, **more),
    ]
    every_writer = pytest.mark.parametrize("write", WRITERS, ids=["safetensors", "mindspore", "sharded"])

    @every_writer
    def test_each_tensor_is_asked_for_once_and_after_the_one_before_is_written(self, tmp_path, write):
        events = []

        def tensor(name):
            return StoredTensor((3,), DType.F32, lambda: events.append(name) or np.zeros(3, np.float32))

        write(tmp_path, {name: tensor(name) for name in "bac"}, progress=events.append)
        assert events == ["b", 12, "a", 12, "c", 12]

    @every_writer
    @pytest.mark.parametrize("failure", [WeightError, KeyboardInterrupt])
    def test_a_failure_in_between_leaves_what_was_there(self, tmp_path, write, failure):
        write(tmp_path, {"a": numbers(3), "b": numbers(3)})
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}

        def fail():
            raise failure

        with pytest.raises(failure):
            write(tmp_path, {"a": numbers(3), "b": StoredTensor((3,), DType.F32, fail)})
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    @every_writer
    def test_a_disk_that_is_full_in_between_leaves_what_was_there(self, tmp_path, write, monkeypatch):
        write(tmp_path, {"a": numbers(3), "b": numbers(3)})
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}

        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WeightError, match=r"No space left on device.*free some space"):
            write(tmp_path, {"a": numbers(3), "b": numbers(3)})
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    @every_writer
    def test_a_disk_without_room_is_refused_before_anything_is_read(self, tmp_path, write, monkeypatch):
        usage = namedtuple("usage", "total used free")(10**12, 10**12 - 3 * 10**9, 3 * 10**9)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

        def never():
            raise AssertionError("must not be read")

        half = StoredTensor((1735, 10**6), DType.F16, never)
        with pytest.raises(WeightError, match=r"6\.94 GB are needed, 3\.00 GB are free\); free some space"):
            write(tmp_path / "new folder", {"a": half, "b": half})
        assert list(tmp_path.iterdir()) == []

    @every_writer
    def test_the_room_that_is_asked_for_is_what_the_file_takes(self, tmp_path, write, monkeypatch):
        tensors = one_of_each()
        write(tmp_path, tensors)
        size = max(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".json")
        free = shutil.disk_usage(tmp_path)

        def room(free_bytes):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=free_bytes))

        if write is not self.WRITERS[2]:
            room(size)
            write(tmp_path, tensors)
            room(size - 1)
        else:
            room(sum(tensor.byte_count for tensor in tensors.values()) - 1)
        with pytest.raises(WeightError, match="No space left on device"):
            write(tmp_path, tensors)

    @pytest.mark.parametrize("write", [write_safetensors, write_mindspore_ckpt])
    def test_a_file_that_was_replaced_since_it_was_opened_is_not_read(self, tmp_path, write):
        write(tmp_path / "file", {"a": numbers(3)})
        tensor = open_tensor_file(tmp_path / "file").tensors["a"]
        write(tmp_path / "file", {"a": numbers(3)})
        with pytest.raises(WeightError, match=r"file: changed while it was being read; try again"):
            tensor.read()
        (tmp_path / "file").unlink()
        with pytest.raises(WeightError, match=r"file: cannot be read \(No such file"):
            tensor.read()

    def test_values_begin_at_a_multiple_of_their_size(self, tmp_path):
        """Wide ones come first, whatever order they are given in; otherwise the order stays."""
        tensors = {name: random_tensor(dtype, (3,)) for name, dtype in zip("bacd", DType, strict=False)}
        tensors = {"z": random_tensor(DType.BOOL, (3,)), "y": random_tensor(DType.F16, (3,)), **tensors}
        write_safetensors(tmp_path / "file", tensors)
        content = (tmp_path / "file").read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        assert length % 8 == 0
        assert all(entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0 for name, entry in header.items())
        assert list(header) == ["b", "a", "y", "c", "d", "z"]


class TestCopiedBytes:
    """Tensors that a file holds as they are go from file to file by way of a buffer."""

    @pytest.fixture
    def written(self, tmp_path):
        write_safetensors(tmp_path / "first", one_of_each())
        return open_tensor_file(tmp_path / "first", Container.SAFETENSORS).tensors

    def test_they_are_the_same(self, tmp_path, written, monkeypatch):
        monkeypatch.setattr(stored, "_COPIED", 5)
        assert all(tensor.ranges for tensor in written.values())
        write_safetensors(tmp_path / "second", written)
        assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()

    def test_a_full_disk_is_the_targets_and_not_the_sources(self, written):
        class Full(io.BytesIO):
            def write(self, content):
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError, match="No space left on device"):
            written["F32 (7,)"].write_to(Full())

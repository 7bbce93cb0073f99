"""A file that is damaged, or no weights at all, is refused with the reason and what to do."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.mindspore_ckpt import write_mindspore_ckpt
from dreambooth_ms.formats.files.open import open_tensor_file, recognise
from dreambooth_ms.formats.files.safetensors_file import write_safetensors, write_sharded_safetensors
from dreambooth_ms.formats.files.stored import Container
from tests.stored_tensors import RNG, numbers


def header_file(header, values=b"", length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + values


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED_SAFETENSORS = {
    "header that ends early": (header_file({"a": entry()}, length=20), "no valid JSON"),
    "header beyond the file": (header_file({}, length=3), "a header of 3 bytes in a file of 10"),
    "header longer than the file": (
        header_file({"a": entry()}, length=10**6),
        "a header of 1,000,000 bytes",
    ),
    "header of 2^63 bytes": (
        header_file({"a": entry()}, length=1 << 63),
        "a header of 9,223,372,036,854,775,808 bytes",
    ),
    "header of 2^64 bytes": (
        header_file({"a": entry()}, length=(1 << 64) - 1),
        "a header of 18,446,744,073,709,551,615 by",
    ),
    "no JSON": (header_file(b"{"), "no valid JSON"),
    "no UTF-8": (header_file(b'{"\xff": 1}'), "no valid JSON"),
    "nested deeply": (header_file(b'{"a":' * 100_000), "nested too deeply"),
    "a long number": (header_file(b'{"a":' + b"9" * 10_000 + b"}"), "impossible number"),
    "a name twice": (
        header_file(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
        "'a' stands in it twice",
    ),
    "a name that is no text": (
        header_file(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), bytes(4)),
        "no valid text",
    ),
    "cut in its values": (header_file({"a": entry()}, bytes(3)), "cut short"),
    "more than its values": (header_file({"a": entry()}, bytes(5)), "bytes after the last tensor"),
    "overlap": (header_file({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "tensors overlap"),
    "gap": (header_file({"a": entry(0, 4), "b": entry(6, 10)}, bytes(10)), "leave a gap"),
    "gap before the first": (header_file({"a": entry(4, 8)}, bytes(8)), "leave a gap"),
    "end before begin": (header_file({"a": entry(4, 0)}, bytes(4)), "'a' has a size that does not fit"),
    "negative begin": (header_file({"a": entry(-4, 0)}, bytes(4)), "overlap"),
    "size of another shape": (header_file({"a": entry(shape=(2,))}, bytes(4)), "'a' has a size that does not fit"),
    "negative shape": (header_file({"a": entry(0, 4, (-1, -1))}, bytes(4)), r"impossible shape \(-1, -1\)"),
    "shape that is none": (header_file({"a": entry(shape=["1"])}, bytes(4)), "impossible shape"),
    "truth as length": (header_file({"a": entry(shape=[True])}, bytes(4)), "impossible shape"),
    "shape that overflows": (header_file({"a": entry(0, 0, (1 << 40, 1 << 40, 0))}), "impossibly large"),
    "many axes": (header_file({"a": entry(shape=[1] * 33)}, bytes(4)), "impossible shape"),
    "offsets that are none": (header_file({"a": entry("0", "4")}, bytes(4)), "'a' has a size that does not fit"),
    "three offsets": (
        header_file({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8)),
        "the entry of 'a' is damaged",
    ),
    "unknown type": (header_file({"a": entry(dtype="C64")}, bytes(4)), "'a' has the type 'C64', which cannot be"),
    "type that is none": (header_file({"a": entry(dtype=[1])}, bytes(4)), r"'a' has the type \(1\)"),
    "entry that is none": (header_file({"a": 1}), "the entry of 'a' is damaged"),
    "metadata that is no text": (header_file({"__metadata__": {"a": 1}}), "its metadata is not text"),
    "metadata that is half a character": (header_file({"__metadata__": {"a": "\ud800"}}), "its metadata is no valid"),
    "metadata that is a list": (header_file({"__metadata__": []}), "its metadata is not text"),
}


@pytest.mark.parametrize("case", DAMAGED_SAFETENSORS)
def test_a_damaged_safetensors_file_is_refused_with_the_reason(tmp_path, case):
    content, reason = DAMAGED_SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightError, match=f"model.safetensors: not a readable safetensors file .*{reason}") as error:
        open_tensor_file(path, Container.SAFETENSORS)
    assert str(error.value).endswith("; copy or download it again")
    assert len(str(error.value).splitlines()) == 1


# --- MindSpore, by hand ---


def field(number, content):
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def value(tag, dims, content, type_name="Float32"):
    described = b"".join(field(1, length) for length in dims) + field(2, type_name.encode()) + field(3, content)
    return field(1, field(1, tag.encode()) + field(2, described))


class TestMindSporeCheckpoints:
    """Bytes as MindSpore writes them; test_tensor_files_oracles.py asks MindSpore itself."""

    @pytest.fixture
    def read(self, tmp_path):
        def read(*parts):
            (tmp_path / "model.ckpt").write_bytes(b"".join(parts))
            return open_tensor_file(tmp_path / "model.ckpt", Container.MINDSPORE)

        return read

    def test_a_parameter_in_several_parts_is_one(self, read):
        values = RNG.standard_normal((5, 3), dtype=np.float32)
        content = values.tobytes()
        cuts = [content[:16], content[16:30], content[30:]]
        file = read(value("a", (1,), bytes(4)), *(value("b", (5, 3), cut) for cut in cuts), value("c", (1,), bytes(4)))
        assert list(file.tensors) == ["a", "b", "c"]
        assert np.array_equal(file.tensors["b"].read(), values)

    def test_a_number_may_have_the_shape_zero(self, read):
        tensor = read(value("step", (0,), struct.pack("<i", 7), "Int32")).tensors["step"]
        assert (tensor.shape, tensor.read()) == ((), 7)

    def test_texts_are_metadata(self, read):
        file = read(value("a", (1,), bytes(4)), value("note", (0,), "hällo".encode("utf-32-le"), "str"))
        assert (list(file.tensors), file.metadata) == (["a"], {"note": "hällo"})

    def test_a_checksum_at_the_end_is_no_value(self, read):
        assert list(read(value("a", (1,), bytes(4)), b"crc_num", bytes(10)).tensors) == ["a"]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (value("a", (1,), bytes(4))[:-1], "cut short"),
            (value("a", (2,), bytes(4)), "'a' has a size that does not fit its shape"),
            (value("a", (2,), bytes(4)) + value("a", (1,), bytes(4)), "the parts of 'a' differ"),
            (value("a", (1,), bytes(4)) + value("b", (1,), bytes(4)) + value("a", (1,), bytes(4)), "twice"),
            (value("a", ((1 << 64) - 1,), bytes(4)), r"impossible shape \(-1\)"),
            (value("a", (1 << 40, 1 << 40), bytes(4)), "impossibly large shape"),
            (value("a", (1,) * 33, bytes(4)), "impossible shape"),
            (value("a", (1,), bytes(4), "Complex64"), "'a' has the type 'Complex64', which cannot be read"),
            (field(1, field(1, b"a") + field(3, b"")), "'a' is no tensor of numbers"),
            (field(1, field(1, b"a")), "'a' has no values"),
            (field(1, field(1, b"\xff") + field(2, b"")), "a name that is no text"),
            (b"\x0a" + b"\xff" * 11, "a number without an end"),
            (b"\x0a" + varint((1 << 64) - 1) + bytes(9), "cut short"),
            (field(1, field(1, b"a") + b"\x12" + varint(1 << 62) + bytes(4)), "cut short"),
            (field(7, b"abc"), "another structure"),
            (b"\x0b\x0c", "another structure"),
            (b"", "it holds nothing"),
            (value("a", (0,), "hällo".encode("utf-32-le")[:-1], "str"), "'a' is damaged"),
            (value("a", (0,), bytes(40_000), "str"), "'a' is longer than a text can be"),
        ],
    )
    def test_a_damaged_checkpoint_is_refused_with_the_reason(self, read, content, reason):
        with pytest.raises(WeightError, match=f"model.ckpt: not a readable MindSpore checkpoint .*{reason}"):
            read(content)


class TestShardedSets:
    @pytest.fixture
    def index(self, tmp_path):
        index, *_ = write_sharded_safetensors(
            tmp_path, "model", {"a": numbers(3), "b": numbers(3), "c": numbers(3)}, max_shard_bytes=24
        )
        return index

    @staticmethod
    def change(index, **places):
        content = json.loads(index.read_text())
        content["weight_map"] |= places
        index.write_text(json.dumps(content))

    def test_a_missing_part_is_named(self, index):
        index.with_name("model-00002-of-00002.safetensors").unlink()
        with pytest.raises(WeightError, match=r"model-00002-of-00002\.safetensors is missing, which model\.safet.*com"):
            open_tensor_file(index)

    def test_a_damaged_part_is_named(self, index):
        part = index.with_name("model-00002-of-00002.safetensors")
        part.write_bytes(part.read_bytes()[:-1])
        with pytest.raises(WeightError, match=r"model-00002-of-00002\.safetensors: not a readable .* \(cut short\)"):
            open_tensor_file(index)

    @pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "", "a\\b", "C:x", "a\0b", "sub/part"])
    def test_a_part_outside_of_the_folder_is_not_opened(self, index, name, monkeypatch):
        self.change(index, a=name)
        with pytest.raises(WeightError, match="is not the name of a file beside it"):
            open_tensor_file(index)

    def test_a_tensor_in_another_part_than_the_index_says(self, index):
        self.change(index, a="model-00002-of-00002.safetensors")
        with pytest.raises(WeightError, match=r"'a' is in model-00002-of-.*, but it is in model-00001-of-"):
            open_tensor_file(index)

    def test_a_tensor_that_no_part_has(self, index):
        self.change(index, d="model-00002-of-00002.safetensors")
        with pytest.raises(WeightError, match=r"'d' is in model-00002-of-.*, but it is in no file"):
            open_tensor_file(index)

    def test_a_tensor_that_the_index_leaves_out(self, index):
        content = json.loads(index.read_text())
        del content["weight_map"]["b"]
        index.write_text(json.dumps(content))
        with pytest.raises(WeightError, match=r"'b' is in no file, but it is in model-00001-of-"):
            open_tensor_file(index)

    def test_a_tensor_in_two_parts(self, index):
        write_safetensors(index.with_name("model-00002-of-00002.safetensors"), {"a": numbers(3), "c": numbers(3)})
        with pytest.raises(WeightError, match=r"'a' is both in model-00001-of-.* and in model-00002-of-"):
            open_tensor_file(index)

    def test_an_index_of_an_index(self, index):
        self.change(index, a=index.name)
        with pytest.raises(WeightError, match=r"json names it as a part, but it is a sharded model's index"):
            open_tensor_file(index)

    def test_a_second_writing_never_leaves_an_index_with_parts_of_both(self, index, monkeypatch):
        """Killed while the parts take their names."""
        rename = Path.replace

        def killed(path, target):
            if target.name == "model-00002-of-00002.safetensors" and target.parent == index.parent:
                raise SystemExit
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            write_sharded_safetensors(
                index.parent, "model", {"a": numbers(3), "b": numbers(3), "c": numbers(3)}, max_shard_bytes=24
            )
        assert not index.exists()


class TestRecognition:
    @pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.png", "x"])
    def test_the_name_does_not_matter(self, tmp_path, name):
        write_mindspore_ckpt(tmp_path / name, {"conv1.gamma": numbers(3)})
        assert recognise(tmp_path / name) is Container.MINDSPORE
        write_safetensors(tmp_path / name, {"a": numbers(3)})
        assert recognise(tmp_path / name) is Container.SAFETENSORS

    def test_a_checkpoint_that_was_cut_is_still_one(self, tmp_path):
        write_mindspore_ckpt(tmp_path / "file", {"conv1.gamma": numbers(3000)})
        (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:1000])
        with pytest.raises(WeightError, match=r"not a readable MindSpore checkpoint \(cut short"):
            open_tensor_file(tmp_path / "file")

    def test_a_folder_is_no_file(self, tmp_path):
        assert recognise(tmp_path) is Container.FOLDER
        with pytest.raises(WeightError, match="a folder; name a file in it"):
            open_tensor_file(tmp_path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "it is empty"),
            (b"<!DOCTYPE html><html>404", "it is an HTML page: the download failed"),
            (b"\n\n  <html lang='en'>", "it is an HTML page: the download failed"),
            (b"<?xml version='1.0'?><Error>", "it is an XML document: the download failed"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "it is a git-lfs pointer, .*; run git lfs pull"),
            (b"\x89PNG\r\n\x1a\n" + bytes(100), "it is a PNG picture"),
            (b"\xff\xd8\xff\xe0" + bytes(100), "it is a JPEG picture"),
            (b"GGUF\x03\0\0\0" + bytes(100), "it is a GGUF file; convert it to safetensors"),
            (b"\x1f\x8b\x08" + bytes(100), "it is a gzip archive; unpack it first"),
            (bytes(257) + b"ustar" + bytes(250), "it is a tar archive; unpack it first"),
            (b"7z\xbc\xaf\x27\x1c" + bytes(9), "it is a 7z archive"),
            (bytes(5000), "it begins with zeros: the download was not finished"),
            (b'{"a": 1}', "it is JSON, and not the index of a sharded model"),
            (b'{"a": ', "no valid JSON"),
            (b"[1, 2]", "it is JSON"),
            (b"Access denied", "it is text"),
            (b"\x80\x04K\x01.", "it is none of the kinds that are known"),
        ],
    )
    def test_what_is_no_weights_is_called_by_its_name(self, tmp_path, content, said):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(WeightError, match=rf"file: not a readable weight file \({said}.*; copy or download it"):
            recognise(tmp_path / "file")

    @pytest.mark.parametrize("name", ["nowhere", "nowhere/below", "x" * 300, "a\0b"])
    def test_a_file_that_is_not_there(self, tmp_path, name):
        with pytest.raises(WeightError, match=r"no such file; check the path|not a readable weight file"):
            recognise(tmp_path / name)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(WeightError, match="not an ordinary file"):
            open_tensor_file(tmp_path / "pipe")

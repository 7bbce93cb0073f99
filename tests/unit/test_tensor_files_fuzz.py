"""Thousands of bent files of every container: each ends in our error or a correct read, soon and in little memory.

A correct read: every tensor has the shape and type that the file says, and reading it does nothing else.
"""

import json
import os
import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.mindspore_ckpt import write_mindspore_ckpt
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import write_safetensors, write_sharded_safetensors
from dreambooth_ms.formats.files.stored import Container, StoredTensor
from tests.stored_tensors import numbers
from tests.torch_checkpoints import dict_of, legacy_checkpoint, number, tensor, text, zip_checkpoint

GIBIBYTE = 1 << 30
EXAMPLES = 500

TENSORS = {
    "conv.weight": numbers(2, 3),
    "conv.bias": numbers(2).cast_to(DType.BF16),
    "ids": StoredTensor.of(np.arange(3)),
    "scale": numbers(),
}
ROW = np.arange(24, dtype=np.float32).tobytes()
OBJECT = dict_of(
    {
        "state_dict": dict_of({"a": tensor("0", 24, (4, 6)), "b": tensor("0", 24, (6, 4), (1, 6))}),
        "epoch": number(3),
        "name": text("x"),
    }
)

# What is put into files: numbers that are read as lengths and offsets, and operations of pickles.
NUMBERS = [struct.pack("<q", value) for value in (-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, -(2**63))]
OPERATIONS = [
    *(bytes([code]) for code in b"()]}.012NQRabdeilotsu\x81\x82\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94\x97\x98"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"(ios\nsystem\n", b"Vtouch mark\n", b"I7\n", b"F1.5\n", b"S'x'\n"),
    *(b"h\x00", b"j\xff\xff\xff\xff", b"q\x01", b"r\xff\xff\xff\xff", b"\x8a\xff", b"\x8b\xff\xff\xff\x7f", b"\x95"),
    *(b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 8, b"P0\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
]
PIECES = st.one_of(st.binary(max_size=8), st.sampled_from(NUMBERS), st.sampled_from(OPERATIONS))


@pytest.fixture(scope="module", autouse=True)
def one_gibibyte():
    """Whoever asks for more memory than that gets a MemoryError, which is no WeightError."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder, in which a pickle that is run would leave a mark."""
    folder, before = tmp_path_factory.mktemp("files"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    assert not (folder / "mark").exists()


fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    database=None,
)


def read_or_refuse(path, container=None):
    started = time.process_time()
    try:
        file = open_tensor_file(path, container)
        for stored in file.tensors.values():
            values = stored.read()
            assert (values.shape, values.dtype) == (stored.shape, stored.dtype.numpy)
    except WeightError as error:
        assert str(path.parent) in str(error)
        assert len(str(error).splitlines()) == 1
    assert time.process_time() - started < 5


@st.composite
def bent(draw, content):
    """Bytes with one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.sampled_from([0, 0, 1, 1, 1, 2, 4, 8, 100, 10**9])))
        piece = draw(PIECES)
        change = draw(st.sampled_from(["replace", "overwrite", "flip", "cut", "repeat"]))
        if change == "replace":
            content = content[:begin] + piece + content[end:]
        elif change == "overwrite":
            content = content[:begin] + piece[: len(content) - begin] + content[begin + len(piece) :]
        elif change == "flip" and begin < len(content):
            content = content[:begin] + bytes([content[begin] ^ 1 << draw(st.integers(0, 7))]) + content[begin + 1 :]
        elif change == "cut":
            content = content[:begin]
        elif change == "repeat":
            content = content[:end] + content[begin:]
    return content


def original(write, *arguments, **more):
    """The bytes that a writer gives, made when the tests are collected."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file", *arguments, **more)
        return (Path(folder) / "file").read_bytes()


SAFETENSORS = original(write_safetensors, TENSORS, {"format": "pt"})
MINDSPORE = original(write_mindspore_ckpt, TENSORS)


@fuzz
@given(content=bent(SAFETENSORS))
def test_safetensors(folder, content):
    (folder / "file").write_bytes(content)
    read_or_refuse(folder / "file", Container.SAFETENSORS)
    read_or_refuse(folder / "file")


VALUES = st.one_of(
    st.sampled_from(
        [-1, 0, 1, 4, 8, 24, 25, 2**31, 2**62, 2**64, 1e300, None, True, "F32", "F64", "BOOL", "F8", "\ud800"]
    ),
    st.lists(st.sampled_from([-1, 0, 1, 2, 3, 24, 2**32, 2**62, None, "1"]), max_size=3),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), st.integers(-1, 30), max_size=3),
)


@st.composite
def bent_headers(draw):
    """A header whose entries were changed, removed or added; the values stay."""
    (length,) = struct.unpack_from("<Q", SAFETENSORS)
    header = json.loads(SAFETENSORS[8 : 8 + length])
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*header, "new", "", "\n", "\ud800"]))
        if draw(st.booleans()) and isinstance(header.get(name), dict):
            part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "format"]))
            header[name] = header[name] | {part: draw(VALUES)}
        elif draw(st.booleans()):
            header.pop(name, None)
        else:
            header[name] = draw(VALUES)
        if not header:
            break
    content = json.dumps(header).encode()
    claimed = draw(st.sampled_from([len(content)] * 5 + [0, 2**40, 2**63, len(content) - 1, len(content) + 30]))
    return struct.pack("<Q", claimed) + content + SAFETENSORS[8 + length :]


@fuzz
@given(content=bent_headers())
def test_safetensors_with_another_header(folder, content):
    (folder / "file").write_bytes(content)
    read_or_refuse(folder / "file", Container.SAFETENSORS)


@fuzz
@given(content=bent(MINDSPORE))
def test_mindspore_checkpoints(folder, content):
    (folder / "file").write_bytes(content)
    read_or_refuse(folder / "file", Container.MINDSPORE)
    read_or_refuse(folder / "file")


@fuzz
@given(
    content=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]).flatmap(
        lambda compression: bent(zip_checkpoint(OBJECT, {"0": ROW}, compression))
    )
)
def test_zip_archives(folder, content):
    (folder / "file").write_bytes(content)
    read_or_refuse(folder / "file", Container.TORCH_ZIP)


@fuzz
@given(value=bent(OBJECT))
def test_pickles_in_sound_archives(folder, value):
    (folder / "file").write_bytes(zip_checkpoint(value, {"0": ROW}))
    read_or_refuse(folder / "file")


@fuzz
@given(content=bent(legacy_checkpoint(OBJECT, {"0": (24, ROW)})))
def test_old_checkpoints(folder, content):
    (folder / "file").write_bytes(content)
    read_or_refuse(folder / "file", Container.TORCH_LEGACY)
    read_or_refuse(folder / "file")


@pytest.fixture(scope="module")
def index(folder):
    index, *_ = write_sharded_safetensors(folder / "set", "model", TENSORS, max_shard_bytes=24)
    return index, index.read_bytes()


@fuzz
@given(data=st.data())
def test_indices_of_sharded_models(index, data):
    path, content = index
    path.write_bytes(data.draw(bent(content)))
    read_or_refuse(path, Container.SHARDED)
    read_or_refuse(path)


@fuzz
@given(content=st.binary(max_size=300))
def test_anything(folder, content):
    (folder / "file").write_bytes(content)
    read_or_refuse(folder / "file")

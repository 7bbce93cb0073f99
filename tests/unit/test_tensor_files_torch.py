"""PyTorch's pickles are read without PyTorch; whatever else they name is neither imported nor called."""

import struct
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.open import open_tensor_file
from tests.torch_checkpoints import (
    call,
    dict_of,
    legacy_checkpoint,
    list_of,
    named,
    number,
    pickle_of,
    storage,
    tensor,
    text,
    tuple_of,
    zip_checkpoint,
)

ROW = np.arange(24, dtype=np.float32)
PLAIN = tensor("0", 24, (4, 6))


@pytest.fixture(params=["zip", "legacy"])
def opened(request, tmp_path):
    """Opens a checkpoint of a value whose only storage, "0", is `ROW`, in both of PyTorch's forms."""

    def opened(value, row=ROW):
        if request.param == "zip":
            content = zip_checkpoint(value, {"0": row.tobytes()})
        else:
            content = legacy_checkpoint(value, {"0": (row.size, row.tobytes())})
        (tmp_path / "model.ckpt").write_bytes(content)
        return open_tensor_file(tmp_path / "model.ckpt")

    return opened


class TestTensors:
    @pytest.mark.parametrize(
        ("shape", "strides", "offset", "expected"),
        [
            ((24,), (1,), 0, ROW),
            ((4, 6), (6, 1), 0, ROW.reshape(4, 6)),
            ((6, 4), (1, 6), 0, ROW.reshape(4, 6).T),
            ((2, 3), (6, 2), 7, ROW.reshape(4, 6)[1:3, 1::2]),
            ((2, 1, 3), (6, 99, 1), 12, ROW[12:].reshape(2, 6)[:, None, :3]),
            ((), (), 5, ROW[5]),
            ((0, 3), (3, 1), 24, np.zeros((0, 3), np.float32)),
            ((3, 2), (0, 1), 4, np.stack([ROW[4:6]] * 3)),
            ((1,), (2**61,), 23, ROW[23:]),
        ],
        ids=["row", "plain", "turned", "slice", "axis of one", "number", "empty", "repeated", "wide stride"],
    )
    def test_a_view_is_read_as_its_own_array(self, opened, shape, strides, offset, expected):
        tensors = opened(dict_of({"a": tensor("0", 24, shape, strides, offset)})).tensors
        found = tensors["a"].read()
        assert (tensors["a"].shape, found.shape, found.dtype) == (shape, shape, np.float32)
        assert np.array_equal(found, expected)
        assert found.flags.c_contiguous

    def test_several_names_may_share_a_storage(self, opened):
        tensors = opened(dict_of({"a": PLAIN, "b": PLAIN, "c": tensor("0", 24, (6,), offset=6)})).tensors
        assert np.array_equal(tensors["a"].read(), tensors["b"].read())
        assert np.array_equal(tensors["c"].read(), ROW[6:12])

    @pytest.mark.parametrize(
        "function", ["_rebuild_parameter", "_rebuild_parameter_with_state"], ids=["parameter", "with state"]
    )
    def test_a_parameter_is_its_tensor(self, opened, function):
        parameter = call(named("torch._utils", function), PLAIN, b"\x88", dict_of({}), dict_of({}))
        assert np.array_equal(opened(dict_of({"a": parameter})).tensors["a"].read(), ROW.reshape(4, 6))

    def test_the_other_byte_order(self, tmp_path):
        path, value = tmp_path / "file", dict_of({"a": PLAIN})
        swapped = ROW.astype(">f4").tobytes()
        for content in (
            zip_checkpoint(value, {"0": swapped}, more={"byteorder": b"big"}),
            legacy_checkpoint(value, {"0": (24, swapped)}, little_endian=False),
        ):
            path.write_bytes(content)
            assert np.array_equal(open_tensor_file(path).tensors["a"].read(), ROW.reshape(4, 6))

    def test_an_archive_that_was_packed_again_with_compression(self, tmp_path):
        """The values are compressible, but not into less than one byte each."""
        large = np.arange(300_000) % 1000
        storages = {"0": ROW.tobytes(), "1": large.tobytes()}
        value = dict_of(
            {
                "a": PLAIN,
                "part": tensor("1", large.size, (5,), offset=250_000, kind="LongStorage"),
                "whole": tensor("1", large.size, (300, 1000), kind="LongStorage"),
            }
        )
        (tmp_path / "file").write_bytes(zip_checkpoint(value, storages, zipfile.ZIP_DEFLATED))
        assert (tmp_path / "file").stat().st_size < large.nbytes / 2
        tensors = open_tensor_file(tmp_path / "file").tensors
        assert np.array_equal(tensors["a"].read(), ROW.reshape(4, 6))
        assert np.array_equal(tensors["part"].read(), large[250_000:250_005])
        assert np.array_equal(tensors["whole"].read(), large.reshape(300, 1000))


class TestWhatIsFound:
    def test_the_dictionary_with_most_tensors_wins_and_the_others_are_counted(self, opened):
        file = opened(
            dict_of(
                {
                    "state_dict": dict_of({"a": PLAIN, "b": PLAIN, "note": text("x")}),
                    "ema": dict_of({"deep": dict_of({"c": PLAIN})}),
                    "epoch": number(3),
                    "lr": b"G" + struct.pack(">d", 0.5),
                    "version": text("1.5"),
                    "nothing": b"N",
                    "mean": PLAIN,
                }
            )
        )
        assert list(file.tensors) == ["a", "b"]
        assert file.left_out == {"ema.deep": 1, "top": 1}
        assert file.metadata == {"epoch": "3", "lr": "0.5", "version": "1.5"}

    @pytest.mark.parametrize("value", [number(3), list_of(PLAIN), PLAIN, dict_of({}), b"N", dict_of({"a": b"N"})])
    def test_a_file_without_named_tensors_is_none(self, opened, value):
        with pytest.raises(WeightError, match="it holds no tensors by name"):
            opened(value)

    def test_half_a_character_is_no_metadata_and_no_name(self, opened):
        half = b"X\x03\x00\x00\x00\xed\xa0\x80"
        value = b"}(" + text("note") + half + half + number(1) + text("a") + PLAIN + b"u"
        assert opened(value).metadata == {}
        with pytest.raises(WeightError, match=r"the name '\\ud800' is no valid text"):
            opened(b"}(" + half + PLAIN + b"u")

    def test_groups_whose_places_look_the_same_are_both_seen(self, opened):
        value = dict_of({"a.b": dict_of({"x": PLAIN}), "a": dict_of({"b": dict_of({"y": PLAIN, "z": PLAIN})})})
        assert list(opened(value).tensors) == ["y", "z"]

    def test_a_program_is_no_weights(self, tmp_path):
        content = zip_checkpoint(dict_of({"a": PLAIN}), {"0": ROW.tobytes()}, more={"constants.pkl": b""})
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(WeightError, match="it is a TorchScript program, not weights; save its state_dict"):
            open_tensor_file(tmp_path / "model.pt")

    def test_keys_that_are_no_text_are_passed_over(self, opened):
        value = b"}(" + number(1) + PLAIN + text("a") + PLAIN + tuple_of(number(1)) + PLAIN + b"u"
        assert list(opened(value).tensors) == ["a"]


class TestNothingIsRun:
    """The pickle names things that would leave a mark, in every way that a pickle can name, make and fill an object."""

    WAYS = {
        "call": lambda function, argument: function + tuple_of(argument) + b"R",
        "object": lambda function, argument: function + tuple_of(argument) + b"\x81",
        "object with names": lambda function, argument: function + tuple_of(argument) + b"}\x92",
        "old object": lambda function, argument: b"(" + function + argument + b"o",
        "state": lambda function, argument: function + b")R" + argument + b"b",
        "items": lambda function, argument: function + b")R" + argument + argument + b"s",
        "append": lambda function, argument: function + b")R" + argument + b"a",
        "set": lambda function, argument: b"\x8f(" + function + tuple_of(argument) + b"R\x90",
        "frozen set": lambda function, argument: b"(" + function + tuple_of(argument) + b"R\x91",
        "key": lambda function, argument: b"}" + function + tuple_of(argument) + b"R" + argument + b"s",
        "persistent": lambda function, argument: function + tuple_of(argument) + b"RQ",
        "within a tensor": lambda function, argument: call(
            named("torch._tensor", "_rebuild_from_type_v2"), function, function, tuple_of(argument), b"N"
        ),
        "function of a function": lambda function, argument: function + tuple_of(argument) + b"R" + b")R",
    }
    NAMES = {
        "system": (named("os", "system"), "touch {mark}"),
        "system by another name": (named("posix", "system"), "touch {mark}"),
        "from the stack": (text("os") + text("system") + b"\x93", "touch {mark}"),
        "eval": (named("builtins", "eval"), "open({mark!r}, 'w')"),
        "exec": (named("__builtin__", "exec"), "open({mark!r}, 'w')"),
        "getattr": (named("builtins", "getattr"), "{mark}"),
        "a path": (named("pathlib", "Path"), "{mark}"),
        "a module that leaves a mark": (named("module_with_a_mark", "Thing"), "{mark}"),
        "a name with dots": (named("os", "path.os.system"), "touch {mark}"),
    }

    @pytest.fixture
    def mark(self, tmp_path, monkeypatch):
        mark = tmp_path / "mark"
        (tmp_path / "module_with_a_mark.py").write_text(f"open({str(mark)!r}, 'w')\nclass Thing: pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield mark
        assert "module_with_a_mark" not in sys.modules

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", NAMES)
    def test_a_thing_by_name(self, opened, mark, way, name):
        function, argument = self.NAMES[name]
        bad = self.WAYS[way](function, text(argument.format(mark=str(mark))))
        file = opened(dict_of({"bad": bad, "a": PLAIN, "also bad": list_of(bad, bad)}))
        assert np.array_equal(file.tensors["a"].read(), ROW.reshape(4, 6))
        assert list(file.tensors) == ["a"]
        assert not mark.exists()

    def test_a_thing_by_name_and_arguments_at_once(self, opened, mark):
        bad = b"(" + text(f"touch {mark}") + b"ios\nsystem\n"
        assert list(opened(dict_of({"bad": bad, "a": PLAIN})).tensors) == ["a"]
        assert not mark.exists()

    @pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
    def test_a_thing_by_its_number(self, opened, code):
        assert list(opened(dict_of({"bad": code, "a": PLAIN})).tensors) == ["a"]

    def test_the_test_would_see_it(self, mark):
        """Python's own reader does run it."""
        import pickle

        pickle.loads(pickle_of(call(named("os", "system"), text(f"touch {mark}"))))
        assert mark.exists()

    def test_what_such_an_object_holds_is_still_found(self, opened):
        foreign = call(named("lightning.fancy", "Dict")) + b"(" + text("a") + PLAIN + b"u"
        assert list(opened(dict_of({"state_dict": foreign})).tensors) == ["a"]


def doubled(start, times):
    """A tuple of two of the one before, so many times: small, but walking through it takes 2^times steps."""
    return start + b"2\x86" * times


class TestBounds:
    """What takes a machine down takes this reader neither long nor much memory."""

    CASES = {
        "a deep list": (dict_of({"x": b"]" * 100_000 + b"a" * 99_999, "a": PLAIN}), False),
        "a deep dictionary": (
            dict_of({"x": (b"}" + text("k")) * 50_000 + b"N" + b"s" * 50_000, "a": PLAIN}),
            False,
        ),
        "a list in itself": (dict_of({"x": b"]q\x00h\x00a", "a": PLAIN}), False),
        "a dictionary in itself": (b"}q\x00" + text("x") + b"h\x00s" + text("a") + PLAIN + b"s", False),
        "a doubled key": (b"}" + doubled(number(1), 1000) + b"Ns" + text("a") + PLAIN + b"s", False),
        "a doubled identifier": (dict_of({"x": doubled(number(1), 1000) + b"Q", "a": PLAIN}), False),
        "a doubled shape": (
            dict_of({"a": PLAIN.replace(tuple_of(number(4), number(6)), doubled(number(1), 1000))}),
            True,
        ),
        "a far memo": (dict_of({"x": b"Nr\xff\xff\xff\xff", "a": PLAIN}), False),
        "a memo that is empty": (dict_of({"x": b"j\xff\xff\xff\xff", "a": PLAIN}), True),
        "a long text": (dict_of({"x": b"\x8d" + b"\xff" * 7 + b"\x7f", "a": PLAIN}), True),
        "long bytes": (dict_of({"x": b"\x8e" + b"\xff" * 7 + b"\x7f", "a": PLAIN}), True),
        "long bytes in place": (dict_of({"x": b"\x96" + b"\xff" * 7 + b"\x7f", "a": PLAIN}), True),
        "a long number": (dict_of({"x": b"\x8b\xff\xff\xff\x7f", "a": PLAIN}), True),
        "a large number": (dict_of({"x": b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6, "a": PLAIN}), False),
        "digits": (dict_of({"x": b"I" + b"9" * 10**6 + b"\n", "a": PLAIN}), True),
        "a stack that ends": (b"0" * 10, True),
        "a mark that is not there": (b"t", True),
        "a huge tensor": (dict_of({"a": tensor("0", 24, (2**40, 2**10), (0, 0))}), True),
        "an impossible tensor": (dict_of({"a": tensor("0", 24, (2**60, 2**60), (0, 0))}), True),
        "a tensor beyond its storage": (dict_of({"a": tensor("0", 24, (4, 6), (6, 1), 1)}), True),
        "a tensor with strides beyond it": (dict_of({"a": tensor("0", 24, (4, 6), (7, 1))}), True),
        "a negative offset": (dict_of({"a": tensor("0", 24, (4,), (1,), -1)}), True),
        "a negative stride": (dict_of({"a": tensor("0", 24, (4,), (-1,), 10)}), True),
        "a negative shape": (dict_of({"a": tensor("0", 24, (-1,), (1,))}), True),
        "strides of another number": (dict_of({"a": tensor("0", 24, (4,), (1, 1))}), True),
        "many axes": (dict_of({"a": tensor("0", 24, (1,) * 40)}), True),
        "a storage of negative length": (dict_of({"a": tensor("0", -24, (4,))}), True),
        "a storage longer than the file": (dict_of({"a": tensor("0", 2**58, (4,))}), True),
        "a storage that is not there": (dict_of({"a": tensor("1", 24, (4,))}), True),
        "two storages of one key": (dict_of({"a": PLAIN, "b": tensor("0", 24, (4,), kind="HalfStorage")}), True),
        "a storage of an unknown kind": (dict_of({"a": tensor("0", 24, (4,), kind="NewStorage")}), True),
        "complex numbers": (dict_of({"a": tensor("0", 24, (4,), kind="ComplexFloatStorage")}), True),
        "no storage": (dict_of({"a": tensor("0", 24, (4,)).replace(storage("0", 24), b"N")}), True),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_of_what_a_pickle_builds(self, opened, case):
        value, refused = self.CASES[case]
        started = time.process_time()
        tracemalloc.start()
        try:
            if refused:
                with pytest.raises(WeightError, match=r"model\.ckpt: not a readable PyTorch checkpoint"):
                    opened(value)
            else:
                assert opened(value).tensors["a"].read().size in (4, 24)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1 << 26
        assert time.process_time() - started < 10

    def test_of_tensors_that_share_their_values(self, tmp_path):
        """Reading all of them would inflate the same bytes again and again."""
        zeros = bytes(1 << 24)
        shared = {str(number): tensor("0", 1 << 22, (1,), offset=number) for number in range(1 << 22, 0, -1 << 14)[1:]}
        (tmp_path / "file").write_bytes(zip_checkpoint(dict_of(shared), {"0": zeros}, zipfile.ZIP_DEFLATED))
        with pytest.raises(WeightError, match="too many of its tensors share their values"):
            open_tensor_file(tmp_path / "file")

    def test_of_what_is_compressed(self, tmp_path):
        (tmp_path / "file").write_bytes(zip_checkpoint(b"}", {"0": bytes(1 << 27)}, zipfile.ZIP_DEFLATED))
        with pytest.raises(WeightError, match="more is compressed in it than weights can be"):
            open_tensor_file(tmp_path / "file")

"""The compile cache gives the same numbers as no cache, and is never in the way."""

import hashlib
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from dreambooth_ms import atomic
from dreambooth_ms.config.train import LossScalingConfig
from dreambooth_ms.ops import Dense
from dreambooth_ms.runtime import compile_cache, compiled_cell, graph_key
from dreambooth_ms.runtime.compile_cache import CompileCache, Outlook, use_compile_cache
from dreambooth_ms.runtime.compiled_cell import CompiledCell
from dreambooth_ms.training.flat_vectors import AdamW8bit, Prodigy
from dreambooth_ms.training.optimisers import Adafactor, AdamW, Hyperparameters
from dreambooth_ms.training.step import AccumulatingTrainStep, LossScaler, TrainStep

INPUT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


class Affine(CompiledCell):
    """x times a constant of the graph, times a parameter."""

    def __init__(self, factor=0.3, weight=2.0):
        super().__init__()
        self.factor = factor
        self.weight = Parameter(Tensor(np.full(4, weight, np.float32)), name="weight")

    def construct(self, x):
        return ops.exp(x * self.factor) * ops.broadcast_to(self.weight, x.shape)


class Broken(CompiledCell):
    def construct(self, x):
        return ops.matmul(x, x)


def expected(factor=0.3, weight=2.0):
    return np.exp(INPUT * np.float32(factor)) * np.float32(weight)


def computed(cache, *arguments):
    """What a new cell gives."""
    with use_compile_cache(cache):
        return Affine(*arguments)(Tensor(INPUT)).asnumpy()


def entries(cache):
    return sorted(path for path in cache.folder.iterdir() if not path.name.startswith(atomic.TEMPORARY_PREFIX))


@pytest.fixture
def cache(tmp_path):
    return CompileCache(tmp_path / "graphs")


@pytest.fixture
def kept(cache):
    """A cache with the graph of `Affine()`."""
    computed(cache)
    assert (cache.found, cache.kept) == (0, 1)
    return cache


def test_a_graph_is_taken_from_the_cache_with_the_parameters_of_the_cell_at_hand(kept):
    np.testing.assert_array_equal(computed(kept, 0.3, 5.0), computed(None, 0.3, 5.0))
    np.testing.assert_allclose(computed(kept, 0.3, 5.0), expected(weight=5.0), rtol=1e-5)
    assert (kept.found, kept.kept) == (2, 1)


def test_graphs_are_found_in_any_order(kept):
    """MindSpore alone would take the first graph for the second."""
    computed(kept, 0.7)
    for factor in (0.7, 0.3, 0.7):
        np.testing.assert_array_equal(computed(kept, factor), computed(None, factor))
    assert (kept.found, kept.kept) == (3, 2)


def test_another_shape_is_another_graph_of_the_same_cell(kept):
    with use_compile_cache(kept):
        cell = Affine()
        assert [cell(Tensor(INPUT[:rows])).shape for rows in (3, 2, 3)] == [(3, 4), (2, 4), (3, 4)]
    assert (kept.found, kept.kept) == (1, 2)


@pytest.fixture
def outlooks(monkeypatch):
    """What is known of each compilation when it begins."""
    seen = []

    def watch(title, outlook):
        seen.append((title, outlook))
        return nullcontext()

    monkeypatch.setattr(compiled_cell, "_watch", watch)
    return seen


def test_what_the_same_kind_took_before_is_known_when_a_compilation_begins(cache, outlooks):
    for factor in (0.3, 0.7, 0.3):
        computed(cache, factor)
    with use_compile_cache(cache):
        Affine()(Tensor(INPUT[:2]))
    assert {title for title, _ in outlooks} == {"a network"}
    first, same_kind, found, other_shape = (outlook for _, outlook in outlooks)
    assert first == other_shape == Outlook()
    assert not same_kind.is_kept and 0 < same_kind.seconds < 60
    assert found == Outlook(is_kept=True)


def test_what_it_took_is_unknown_without_a_cache_or_where_nobody_can_read_it(kept, outlooks):
    computed(None)
    for entry in entries(kept):
        digest, _, *rest = entry.read_bytes().split(b"\n", 2)
        entry.write_bytes(b"\n".join((digest, b"long", *rest)))
    computed(kept, 0.7)
    assert [outlook for _, outlook in outlooks] == [Outlook(), Outlook()]


def with_other_byte(entry, place):
    return bytes([byte ^ (number == place) for number, byte in enumerate(entry.read_bytes())])


DAMAGES = {
    "cut": lambda entry: os.truncate(entry, entry.stat().st_size // 2),
    "one bit": lambda entry: entry.write_bytes(with_other_byte(entry, 500)),
    "one bit of the digest": lambda entry: entry.write_bytes(with_other_byte(entry, 3)),
    "empty": lambda entry: os.truncate(entry, 0),
    "cut in the first line": lambda entry: os.truncate(entry, 20),
    "other contents": lambda entry: entry.write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_again(kept, damage):
    (entry,) = entries(kept)
    damage(entry)
    np.testing.assert_array_equal(computed(kept), computed(None))
    assert (kept.found, kept.kept) == (0, 2)
    np.testing.assert_array_equal(computed(kept), computed(None))
    assert (kept.found, kept.kept) == (1, 2)


def test_what_mindspore_cannot_read_is_made_again_although_its_digest_holds(kept):
    (entry,) = entries(kept)
    _, seconds, name, graph = entry.read_bytes().split(b"\n", 3)
    content = b"\n".join((seconds, name, graph[:200]))
    entry.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    np.testing.assert_array_equal(computed(kept), computed(None))
    np.testing.assert_array_equal(computed(kept), computed(None))
    assert (kept.found, kept.kept) == (1, 2)


def test_a_graph_that_does_not_compile_fails_as_without_the_cache_and_spoils_nothing(kept, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MindSpore leaves its analysis there.
    for _ in range(2):
        with use_compile_cache(kept), pytest.raises(RuntimeError, match="must be equal"):
            Broken()(Tensor(INPUT))
        np.testing.assert_array_equal(computed(kept, 0.5), computed(None, 0.5))
        np.testing.assert_array_equal(computed(kept), computed(None))
    assert len(entries(kept)) == 2


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "taken").write_text("a file")
    cache = CompileCache(tmp_path / "taken" / "graphs")
    with pytest.warns(UserWarning, match=r"compiled graphs are not kept: .*taken"):
        np.testing.assert_array_equal(computed(cache), computed(None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(computed(cache, 0.5), computed(None, 0.5))


def test_a_full_disk_leaves_no_entry(cache, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.warns(UserWarning, match="No space left"):
        np.testing.assert_array_equal(computed(cache), computed(None))
    assert list(cache.folder.iterdir()) == []


def test_an_entry_that_another_process_wrote_meanwhile_stays(kept, monkeypatch):
    (entry,) = entries(kept)
    before = entry.read_bytes()
    monkeypatch.setattr(CompileCache, "_copy_to_mindspore", lambda self, entry: {})
    computed(kept)
    assert [path.name for path in kept.folder.iterdir()] == [entry.name]
    assert entry.read_bytes() == before


def test_the_entries_used_last_are_kept_and_nobodys_leftovers_removed(kept):
    size = entries(kept)[0].stat().st_size
    kept.max_bytes = int(2.5 * size)
    abandoned, at_work = (kept.folder / f"{atomic.TEMPORARY_PREFIX}{name}" for name in ("abandoned", "at_work"))
    for number, path in enumerate((abandoned, at_work)):
        path.touch()
        os.utime(path, (time.time() - (1 - number) * 2 * compile_cache.ABANDONED_AFTER,) * 2)
    folder_of_others = kept.folder / "0123"
    folder_of_others.mkdir()
    computed(kept, 0.7)
    long_ago = time.time() - 1000
    for path in entries(kept):
        os.utime(path, (long_ago, long_ago))
    computed(kept, 0.7)
    computed(kept, 0.9)
    assert len(set(entries(kept)) - {folder_of_others}) == 2
    assert (abandoned.exists(), at_work.exists(), folder_of_others.exists()) == (False, True, True)
    found = kept.found
    computed(kept, 0.7)
    assert kept.found == found + 1


# --- What decides the key ---


class Choice(Enum):
    ONE = 1
    TWO = 2


@dataclass(frozen=True)
class Settings:
    rate: float = 0.5


class Various(nn.Cell):
    """A cell with an attribute of every kind that cells here have."""

    def __init__(self):
        super().__init__()
        self.flag, self.number, self.text, self.nothing = True, 1, "text", None
        self.pair, self.mapping = (1, 2.5), {"a": [1, 2]}
        self.choice, self.settings = Choice.ONE, Settings()
        self.constant, self.array = Tensor(INPUT), INPUT.copy()
        self.dtype = ms.float32
        self.product = ops.MatMul(transpose_b=True)
        self.child, self.cells_list = nn.ReLU(), nn.CellList([nn.ReLU()])
        self.weight = Parameter(Tensor(INPUT), name="weight")
        self.several = ParameterTuple([self.weight])
        self.gradient = ops.value_and_grad(self.child, 0, None)


CHANGES = {
    "a switch": lambda cell: setattr(cell, "flag", False),
    "an integer": lambda cell: setattr(cell, "number", 2),
    "its type": lambda cell: setattr(cell, "number", 1.0),
    "a text": lambda cell: setattr(cell, "text", "other"),
    "a new attribute": lambda cell: setattr(cell, "another", 1),
    "inside a tuple": lambda cell: setattr(cell, "pair", (1, 2.6)),
    "inside a mapping": lambda cell: cell.mapping["a"].append(3),
    "an enum": lambda cell: setattr(cell, "choice", Choice.TWO),
    "a dataclass": lambda cell: setattr(cell, "settings", Settings(0.6)),
    "a constant tensor": lambda cell: setattr(cell, "constant", Tensor(INPUT + 1)),
    "an array": lambda cell: cell.array.__setitem__((0, 0), 7),
    "a dtype": lambda cell: setattr(cell, "dtype", ms.float16),
    "a primitive's attribute": lambda cell: setattr(cell, "product", ops.MatMul()),
    "a child's class": lambda cell: setattr(cell, "child", nn.GELU()),
    "a child more": lambda cell: cell.cells_list.append(nn.ReLU()),
    "a child that is another's": lambda cell: setattr(cell, "child", cell.cells_list[0]),
    "a parameter's name": lambda cell: setattr(cell.weight, "name", "other"),
    "a parameter's shape": lambda cell: setattr(cell, "weight", Parameter(Tensor(INPUT[:2]), name="weight")),
    "a parameter's dtype": lambda cell: setattr(
        cell, "weight", Parameter(Tensor(INPUT.astype(np.float16)), name="weight")
    ),
    "whether it is trained": lambda cell: setattr(cell.weight, "requires_grad", False),
    "training": lambda cell: cell.set_train(not cell.training),
    "what is differentiated": lambda cell: setattr(cell, "gradient", ops.value_and_grad(cell.child, 0, cell.several)),
    "how it is differentiated": lambda cell: setattr(
        cell, "gradient", ops.value_and_grad(cell.child, 0, None, has_aux=True)
    ),
    "recomputation": lambda cell: cell.child.recompute(),
}
INPUTS = (Tensor(INPUT), (Tensor(INPUT), 3))


def test_equal_cells_have_the_same_key_whatever_their_weights():
    cell = Various()
    cell.weight.set_data(Tensor(INPUT * 2))
    assert graph_key.graph_key(cell, INPUTS) == graph_key.graph_key(Various(), (Tensor(-INPUT), INPUTS[1]))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_the_graph_hangs_on_changes_the_key(change):
    cell = Various()
    before = graph_key.graph_key(cell, INPUTS)
    change(cell)
    assert graph_key.graph_key(cell, INPUTS) != before


@pytest.mark.parametrize(
    "inputs",
    [
        (Tensor(INPUT[:2]), INPUTS[1]),
        (Tensor(INPUT.astype(np.float16)), INPUTS[1]),
        (Tensor(INPUT), (Tensor(INPUT), 4)),
        (Tensor(INPUT),),
    ],
    ids=["shape", "dtype", "a number", "count"],
)
def test_inputs_change_the_key(inputs):
    assert graph_key.graph_key(Various(), inputs) != graph_key.graph_key(Various(), INPUTS)


def test_surroundings_change_the_key(monkeypatch, tmp_path):
    cell = Various()
    keys = {graph_key.graph_key(cell, INPUTS), graph_key.graph_key(cell, INPUTS, "setting")}
    monkeypatch.setenv("MS_DEV_SOMETHING", "1")
    keys.add(graph_key.graph_key(cell, INPUTS))
    for name, value in (("MS_SCHED_PORT", "8118"), ("MS_COMPILER_CACHE_PATH", "somewhere")):
        monkeypatch.setenv(name, value)
        assert graph_key.graph_key(cell, INPUTS) in keys
    monkeypatch.setattr(graph_key, "PACKAGE", tmp_path)
    for source in ("x = 1", "x = 2"):
        (tmp_path / "module.py").write_text(source)
        # What was imported is no more what is there: MindSpore would parse the one and run the other.
        with pytest.raises(graph_key.NotDescribable, match="changed meanwhile"):
            graph_key.graph_key(cell, INPUTS)
        monkeypatch.setattr(graph_key, "_SOURCES_AT_IMPORT", graph_key.sources())
        keys.add(graph_key.graph_key(cell, INPUTS))
    monkeypatch.setattr(ms, "__version__", "0")
    keys.add(graph_key.graph_key(cell, INPUTS))
    assert len(keys) == 6


def test_a_cell_with_something_unknown_is_compiled_each_time(cache):
    with use_compile_cache(cache):
        cell = Affine()
        cell.unknown = object()
        with pytest.raises(graph_key.NotDescribable):
            graph_key.graph_key(cell, (Tensor(INPUT),))
        np.testing.assert_allclose(cell(Tensor(INPUT)).asnumpy(), expected(), rtol=1e-5)
    assert (cache.found, cache.kept) == (0, 0)


OPTIMISERS = {
    "AdamW": lambda trained: AdamW(trained, Hyperparameters()),
    "AdamW8bit": lambda trained: AdamW8bit(trained, Hyperparameters()),
    "Adafactor": lambda trained: Adafactor(trained, Hyperparameters()),
    "Prodigy": lambda trained: Prodigy(trained, Hyperparameters()),
}


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
def test_every_training_step_has_a_key(optimiser, accumulates):
    """With and without a scaled loss, which is another key."""

    def keys(scaler):
        cell = Dense(3, 4)
        trained = [cell.weight, cell.bias]
        step = TrainStep(cell, trained, optimiser(trained), 1.0, scaler=scaler)
        accumulating = AccumulatingTrainStep(step)
        compiled = [accumulating._add_gradients, accumulating._update] if accumulates else [step]
        return [graph_key.graph_key(one, INPUTS) for one in compiled]

    assert keys(None) == keys(None)
    assert not set(keys(None)) & set(keys(LossScaler(LossScalingConfig())))


# --- What the environment says ---


@pytest.fixture
def state(monkeypatch):
    monkeypatch.setattr(compile_cache, "_cache", None)
    monkeypatch.setattr(compile_cache, "_wish", None)
    for name in (compile_cache.ENABLE, compile_cache.FOLDER, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("wish", "by_default", "is_on"),
    [(None, True, True), (None, False, False), ("1", False, True), ("0", True, False)],
)
def test_the_environment_switches_the_cache(state, wish, by_default, is_on):
    if wish:
        state.setenv(compile_cache.ENABLE, wish)
    for _ in range(2):
        compile_cache.set_up_compile_cache(by_default)
        assert (compile_cache.compile_cache() is not None) == is_on
        # Or MindSpore would use it in its own way.
        assert os.environ.get(compile_cache.ENABLE) in (None, "0")


def test_the_folder_is_the_users_cache_unless_another_is_named(state, tmp_path):
    compile_cache.set_up_compile_cache(True)
    assert compile_cache.compile_cache().folder == compile_cache.Path.home() / ".cache" / "dreambooth_ms" / "graphs"
    state.setattr(compile_cache, "_cache", None)
    state.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.set_up_compile_cache(True)
    assert compile_cache.compile_cache().folder == tmp_path / "dreambooth_ms" / "graphs"
    state.setenv(compile_cache.FOLDER, str(tmp_path / "named"))
    for _ in range(2):
        compile_cache.set_up_compile_cache(True)
        assert compile_cache.compile_cache().folder == tmp_path / "named"
    assert compile_cache.FOLDER not in os.environ

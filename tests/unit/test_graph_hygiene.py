"""The training step is compiled once, is the same from the cache, and does not wait for the host."""

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from dreambooth_ms.adapters.lora import initialise_lora, inject_lora, lora_trainables
from dreambooth_ms.cli import toy_networks
from dreambooth_ms.data.batches import Batch
from dreambooth_ms.models.parameters import initialise
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.runtime.compile_cache import CompileCache, use_compile_cache
from dreambooth_ms.training.loop import train
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
from dreambooth_ms.training.step import DiffusionLoss, TrainStep
from tests.unit.test_lora import set_scale

STEPS, TOKENS = 50, 5
WAITS = ("asnumpy", "item", "tolist", "__bool__", "__float__", "__int__")
"""What a tensor does only when its value is there."""


def batch(number, height=8):
    """The rows of a batch with captions and noise of their own; `height` is that of the latents."""
    rng = np.random.default_rng(number)
    latents, noise = rng.standard_normal((2, 2, 4, height, 8), dtype=np.float32)
    timesteps = rng.integers(1000, size=2)
    signal, sigma = (np.array(values, np.float32).reshape(-1, 1, 1, 1) for values in ([0.8, 0.6], [0.6, 0.8]))
    text = rng.standard_normal((2, TOKENS, toy_networks.SD_UNET.cross_attention_dim), dtype=np.float32)
    return Batch(
        inputs={
            "sample": signal * latents + sigma * noise,
            "timestep": timesteps.astype(np.float32),
            "encoder_hidden_states": text,
        },
        target=noise,
        weight=np.full(2, 0.5, np.float32),
        concepts=("instance", "instance"),
    )


def rate(step):
    return 1e-3 / (step + 1)


def begin(cache):
    """A LoRA step, new each time."""
    unet = UNet2DConditionModel(toy_networks.SD_UNET)
    initialise(unet, 0)
    layers = inject_lora(unet, 2, 2.0, ["to_q", "to_v"])
    initialise_lora(layers, 0)
    trainables = lora_trainables(layers)
    optimiser = AdamW(trainables, Hyperparameters())
    cell = TrainStep(DiffusionLoss(unet), trainables, optimiser, 1.0)

    def run(steps, begin_batch=None, make_batch=batch):
        reports = []
        with use_compile_cache(cache):
            train(cell, make_batch, 1, rate, range(steps), [reports.append], begin_batch)
        return reports, [parameter.asnumpy().copy() for parameter in trainables]

    return SimpleNamespace(cell=cell, layers=layers.values(), run=run)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return CompileCache(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def trained(cache):
    """Steps with other captions, another learning rate and another scale of the adapter each; and what waited."""
    waits = []

    def set_scales(number):
        waits.append(0)
        for layer in ours.layers:
            set_scale(layer, 1 + number / STEPS)

    ours = begin(cache)
    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            original = getattr(Tensor, name)

            def counted(tensor, *arguments, original=original):
                if waits:
                    waits[-1] += 1
                return original(tensor, *arguments)

            patch.setattr(Tensor, name, counted)
        reports, weights = ours.run(STEPS, set_scales)
    return SimpleNamespace(cell=ours.cell, reports=reports, weights=weights, waits=waits)


def test_fifty_steps_are_one_compilation(trained, cache):
    assert len({report.learning_rate for report in trained.reports}) == STEPS
    assert len(trained.cell.compile_cache) == 1
    assert cache.kept == 1


def test_batches_of_two_shapes_in_turn_are_two_compilations(trained, cache):
    """Each in its first step; the first is the graph of the fifty steps, from the cache."""

    def count_graphs(number):
        graphs_before.append(len(ours.cell.compile_cache))

    same_folder, graphs_before = CompileCache(cache.folder), []
    ours = begin(same_folder)
    ours.run(6, count_graphs, lambda number: batch(number, height=(8, 16)[number % 2]))
    assert [*graphs_before, len(ours.cell.compile_cache)] == [0, 1, 2, 2, 2, 2, 2]
    assert (same_folder.found, same_folder.kept) == (1, 1)


def test_a_step_waits_for_nothing_but_what_is_logged(trained):
    """The loss, the rows' errors and the norm; the first step compiles, and after the last the weights are read."""
    assert trained.waits[1:-1] == [3] * (STEPS - 2)


def test_a_scale_that_changed_is_seen_without_compiling(trained, cache):
    """Other losses than with the scale as it was."""
    ours = begin(cache)
    reports, _ = ours.run(3)
    assert reports[0].loss == trained.reports[0].loss
    assert reports[2].loss != trained.reports[2].loss


def test_a_step_from_the_cache_gives_the_same_bits(trained, cache):
    found = cache.found

    def set_scales(number):
        for layer in again.layers:
            set_scale(layer, 1 + number / STEPS)

    again = begin(cache)
    reports, weights = again.run(STEPS, set_scales)
    assert (cache.found, cache.kept) == (found + 1, 1)
    assert reports == trained.reports
    for ours, before in zip(weights, trained.weights, strict=True):
        np.testing.assert_array_equal(ours, before)

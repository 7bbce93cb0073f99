"""The memory that is expected before the first step: what it counts, what it depends on, and what is refused."""

import math
from dataclasses import replace
from types import SimpleNamespace as Base

import pytest

from dreambooth_ms.adapters.cross_attention import CROSS_ATTENTION
from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
from dreambooth_ms.cli import training_needs
from dreambooth_ms.config.load import load
from dreambooth_ms.config.ranges import memory_size
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import DeviceError
from dreambooth_ms.models.layout import unet_layout
from dreambooth_ms.models.parameter_shapes import text_shapes, unet_shapes
from dreambooth_ms.models.specs import CLIP_L_TEXT, OPENCLIP_H_TEXT, SD_15_UNET, SD_21_UNET, SDXL_UNET, T5Spec
from dreambooth_ms.models.unet import Segments, UNet2DConditionModel
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.training import memory
from dreambooth_ms.training.memory import (
    MemoryEstimate,
    SegmentMemory,
    Trained,
    Workload,
    estimate,
    peak_activations,
    peak_with_gradients,
    ranks_of,
    unet_segment,
)
from dreambooth_ms.weights.bundle import open_bundle
from tests.small_specs import SMALL
from tests.tiny_model import IF_UNET, write_random_model
from tests.tiny_model import SDXL_UNET as TINY_SDXL
from tests.tiny_model import UNET as TINY
from tools.formulation import use_formulation

GIB = 2**30
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ROWS = {"rows": 2, "latent_height": 64, "latent_width": 64}
LARGE = {"latent_height": 128, "latent_width": 128}


def lora(unet, rank=4, **more):
    return Workload(unet=unet, ranks=[ranks_of(unet_shapes(unet), rank, TARGETS)], **ROWS | more)


def full(unet, **more):
    return Workload(unet=unet, ranks=[ranks_of(unet_shapes(unet), None)], **ROWS | more)


def activations(spec, recomputed=False, trained=Trained.ATTENTION, **changes):
    work = lora(spec, **changes)
    return peak_activations([unet_segment(layer, work, trained) for layer in unet_layout(spec)], recomputed)


SD_15_LORA, SDXL_LORA = lora(SD_15_UNET), lora(SDXL_UNET)
HALF_SD_15 = replace(SD_15_UNET, block_out_channels=(160, 320, 640, 640))


@pytest.mark.parametrize(
    ("work", "measured"),
    [
        pytest.param(SD_15_LORA, 9.9, id="SD 1.5, rank 4, 512 px"),
        pytest.param(replace(SD_15_LORA, recomputed=True), 9.9, id="with checkpointing"),
        pytest.param(replace(SD_15_LORA, **LARGE), 19.2, id="1024 px"),
        pytest.param(replace(SD_15_LORA, **LARGE, recomputed=True), 13.4, id="1024 px with checkpointing"),
        pytest.param(SDXL_LORA, 20.1, id="SDXL"),
        pytest.param(replace(SDXL_LORA, recomputed=True), 18.9, id="SDXL with checkpointing"),
        pytest.param(replace(SDXL_LORA, **LARGE, recomputed=True), 22.3, id="SDXL at 1024 px with checkpointing"),
        pytest.param(
            full(HALF_SD_15, latent_height=32, latent_width=32, processes=2),
            16.7 / 2,
            id="all of half of SD 1.5, 256 px, in two processes",
        ),
    ],
)
def test_it_is_within_a_fifth_of_what_was_measured(work, measured):
    """By `tools.bench_step`, which see docs/performance.md."""
    assert estimate(work).total / GIB == pytest.approx(measured, rel=0.2)


def on_ascend(unet, ranks, side, number=2, rows=2, texts=(), **more):
    """All weights of these networks where there is no rank."""
    networks = [(unet_shapes(unet), TARGETS), *((text_shapes(one), TEXT_TARGETS) for one in texts)]
    return Workload(
        unet=unet,
        text_encoders=texts,
        ranks=[ranks_of(shapes, ranks, ends) for shapes, ends in networks],
        rows=rows,
        latent_height=side,
        latent_width=side,
        bytes_of_number=number,
        on_ascend=True,
        **more,
    )


@pytest.mark.parametrize(
    ("work", "measured"),
    [
        pytest.param(on_ascend(SD_15_UNET, 4, 64), 3924.6, id="SD 1.5, rank 4, fp16"),
        pytest.param(on_ascend(SD_15_UNET, 4, 64, rows=4), 6199.0, id="4 rows"),
        pytest.param(on_ascend(SD_15_UNET, 4, 64, recomputed=True), 2070.8, id="with checkpointing"),
        pytest.param(on_ascend(SD_15_UNET, None, 64), 13784.5, id="all of SD 1.5, fp16"),
        pytest.param(
            on_ascend(SD_15_UNET, 4, 64, number=4, texts=(CLIP_L_TEXT,)), 6855.6, id="and its text encoder, float32"
        ),
        pytest.param(on_ascend(SD_15_UNET, None, 64, rows=4), 16101.6, id="with 4 rows, bf16"),
        pytest.param(on_ascend(SD_21_UNET, 4, 96, texts=(OPENCLIP_H_TEXT,)), 7151.3, id="SD 2.1 and its text encoder"),
        pytest.param(on_ascend(SD_21_UNET, None, 96), 16421.0, id="all of SD 2.1, fp16"),
        pytest.param(on_ascend(SDXL_UNET, 4, 128), 19204.7, id="SDXL, rank 4, fp16"),
        pytest.param(on_ascend(SDXL_UNET, 4, 128, rows=4), 33440.7, id="SDXL with 4 rows"),
        pytest.param(on_ascend(SDXL_UNET, None, 128), 48141.0, id="all of SDXL, bf16"),
        pytest.param(on_ascend(SDXL_UNET, None, 128, rows=4), 62657.7, id="all of SDXL with 4 rows, bf16"),
    ],
)
def test_on_ascend_it_is_within_15_percent_of_the_simulation(work, measured):
    """By `tools.ascend_memory`, in MiB; docs/memory.md has the commands."""
    assert estimate(work).total / 2**20 == pytest.approx(measured, rel=0.15)


def test_on_ascend_it_is_the_cards_memory_alone():
    parts = estimate(on_ascend(SD_15_UNET, 4, 64)).parts
    assert list(parts) == ["weights", "trained", "optimiser", "activations and gradients"]


def test_gradients_grow_while_activations_are_freed():
    segments = [SegmentMemory(1, 100, gradients=10), SegmentMemory(2, 50, work=5, casts=7, gradients=200)]
    assert peak_with_gradients(segments, recomputed=False) == 100 + 50 + 5 + 7 + 200
    assert peak_with_gradients(segments, recomputed=True) == max(1 + 50 + 5 + 7 + 200, 100 + 210)


@pytest.mark.parametrize("unet", [TINY, TINY_SDXL, IF_UNET, SMALL["sd21"].unet, SMALL["sdxl"].unet])
def test_the_segments_are_those_of_the_network(unet):
    """But for the time embedding, the text and the prediction, which are small."""
    large = [layer for layer in unet_layout(unet) if layer.kind not in memory.SMALL]
    assert len(large) == len(Segments(UNet2DConditionModel(unet)).segments) - 3
    assert all(unet_segment(layer, lora(unet), Trained.ATTENTION).result > 0 for layer in large)


@pytest.mark.parametrize("unet", [TINY, IF_UNET, SMALL["sdxl"].unet])
def test_the_trained_numbers_are_those_of_the_adapters(unet):
    trainables = lora_trainables(inject_lora(UNet2DConditionModel(unet), 2, 2.0, TARGETS))
    work = lora(unet, rank=2)
    numbers = sum(math.prod(parameter.shape) for parameter in trainables)
    assert estimate(work).parts["trained"] == numbers * 4 * 2
    assert estimate(work).parts["optimiser"] == numbers * 4 * 2


def test_a_full_training_trains_every_weight():
    parts, of_lora = estimate(full(SD_15_UNET)).parts, estimate(SD_15_LORA).parts
    assert parts["weights"] == 0
    assert parts["trained"] == 2 * of_lora["weights"] == parts["optimiser"]
    assert parts["activations"] > of_lora["activations"]


def test_running_averages_and_the_optimiser_are_counted():
    plain = estimate(SD_15_LORA).parts
    more = estimate(replace(SD_15_LORA, copies_of_trained=1, bytes_of_optimiser=2)).parts
    assert more["trained"] == plain["trained"] * 3 / 2
    assert more["optimiser"] == plain["optimiser"] / 4


def test_trained_text_encoders_are_counted():
    of_text = ranks_of(text_shapes(CLIP_L_TEXT), 4, TEXT_TARGETS)
    with_text = replace(SD_15_LORA, text_encoders=(CLIP_L_TEXT,), ranks=[*SD_15_LORA.ranks, of_text])
    plain, more = estimate(SD_15_LORA).parts, estimate(with_text).parts
    assert all(more[name] > plain[name] for name in plain)


def test_processes_keep_a_part_of_the_optimisers_state_each_and_join_their_gradients():
    alone = estimate(full(SD_15_UNET)).parts
    one_of_two = estimate(full(SD_15_UNET, processes=2, shares_optimiser=True)).parts
    assert one_of_two["optimiser"] == alone["optimiser"] / 2
    assert one_of_two["trained"] == 2 * alone["trained"]


def test_half_precision_halves_what_is_not_computed_in_float32():
    half, whole = activations(SD_15_UNET, bytes_of_number=2), activations(SD_15_UNET)
    assert whole / 2 < half < whole
    of_half = replace(SD_15_LORA, bytes_of_number=2)
    assert estimate(of_half).parts["weights"] == estimate(SD_15_LORA).parts["weights"] / 2


@pytest.mark.parametrize("spec", [SD_15_UNET, SD_21_UNET, SDXL_UNET])
def test_activations_grow_with_the_pictures_and_shrink_with_recomputation(spec):
    assert activations(spec, rows=4) > 1.8 * activations(spec)
    assert activations(spec, latent_height=128, latent_width=128) > 3 * activations(spec)
    assert activations(spec, recomputed=True) < activations(spec) / 3
    order = [activations(spec, trained=trained) for trained in Trained]
    assert order == sorted(order) and len(set(order)) == 3
    assert activations(spec, dropout=True) > activations(spec)


def test_recomputation_keeps_results_and_one_segment():
    segments = [SegmentMemory(10, 100, 5), SegmentMemory(20, 200, 7), SegmentMemory(30, 50, 400)]
    assert peak_activations(segments, recomputed=False) == 60 + 350 + 400
    assert peak_activations(segments, recomputed=True) == 60 + 450


FLAGS = ("--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "p")


@pytest.fixture
def check(monkeypatch):
    """Looks whether a training of 4 GiB fits into so many bytes that so many processes share."""
    expected = MemoryEstimate({"weights": 3 * GIB, "activations": GIB})
    monkeypatch.setattr(training_needs, "_workload", lambda *of: None)
    monkeypatch.setattr(memory, "estimate", lambda work: expected)

    def check(limit, processes=1, readers=()):
        monkeypatch.setattr(training_needs, "machine_memory", lambda: limit)
        group, base = Processes(0, processes, exchange=lambda what, value: [value] * processes), Base(text=readers)
        said: list[str] = []
        training_needs.check_expected_memory(load(TrainConfig, FLAGS), base, group, said.append)
        return said

    return check


def test_what_reads_prompts_is_told_where_it_takes_more_than_a_step(check):
    """T5 of DeepFloyd IF, which is gone before the first step."""
    t5 = T5Spec(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    assert check(8 * GIB, readers=[Base(spec=t5)])[1:] == [
        "expected memory before that, while prompts are read: 17.7 GiB"
    ]
    assert not check(8 * GIB, readers=[Base(spec=CLIP_L_TEXT)])[1:]


def test_what_does_not_fit_is_refused(check):
    check(4 * GIB)
    said = r"expected memory: 4.0 GiB \(weights 3.0, activations 1.0\), and there are 3.9 GiB; what needs less: "
    with pytest.raises(DeviceError, match=said):
        check(int(3.9 * GIB))


def test_processes_that_share_a_machine_must_fit_together(check):
    check(8 * GIB, processes=2)
    said = r"expected memory: 4.0 GiB \(.*\) in each of 3 processes, and there are 8.0 GiB; what needs less: "
    with pytest.raises(DeviceError, match=said):
        check(8 * GIB, processes=3)


class TestTwoProcessesOnAMachine:
    """That has memory for one and a half."""

    @pytest.fixture
    def check(self, tmp_path, monkeypatch):
        folder = open_bundle(write_random_model(tmp_path))
        needed = [
            "--pretrained_model_name_or_path",
            str(tmp_path),
            "--instance_data_dir",
            "d",
            "--instance_prompt",
            "p",
            "--resolution",
            "64",
        ]

        def check(*flags, processes=1):
            config = load(TrainConfig, [*needed, *flags])
            expected = estimate(training_needs._workload(config, folder, processes))
            for place in ("machine_memory", "card_memory"):
                monkeypatch.setattr(training_needs, place, lambda: expected.total * 3 // 2)
            group = Processes(0, processes, exchange=lambda what, value: [value] * processes)
            training_needs.check_expected_memory(config, folder, group)
            return expected.parts

        return check

    def test_do_not_fit(self, check):
        check()
        with pytest.raises(DeviceError, match=r"in each of 2 processes, .* fewer processes on a machine"):
            check(processes=2)

    def test_keep_half_of_the_optimiser_each(self, check):
        flags = ("--method", "full", "--max_device_memory", "8GB", "--zero_stage")
        assert check(*flags, "1", processes=2)["optimiser"] * 2 == check(*flags, "0", processes=2)["optimiser"]

    def test_may_take_what_was_given_to_each(self, check):
        check("--max_device_memory", "8GB", processes=2)
        with pytest.raises(DeviceError, match=r"GiB \(.*\), and there are 0.0 GiB"):
            check("--max_device_memory", "1MB", processes=2)

    def test_have_cards_with_memory_of_their_own(self, check):
        with use_formulation(Formulation.ASCEND):
            check(processes=2)


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * GIB), ("1.5 gb", 3 * GIB // 2), ("512MB", GIB // 2), ("16", None), ("GB", None)]
)
def test_sizes_are_spelt_as_mindspore_does(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize(
    ("flags", "trained", "reads_text"),
    [
        ("--method custom_diffusion", 19_169_280, False),
        ("--method custom_diffusion --modifier_token <new1>", 19_169_280, True),
        ("--method custom_diffusion --freeze_model crossattn", 43_962_560, False),
        ("--method textual_inversion --modifier_token <new1>", 0, True),
        ("--train_new_words --modifier_token <new1>", 797_184, True),
    ],
)
def test_of_new_words_and_cross_attention_what_is_trained_is_counted(tmp_path, flags, trained, reads_text):
    """At the size of SD 1.5; the vectors of new words are next to nothing."""
    needed = "--pretrained_model_name_or_path m --instance_data_dir d --instance_prompt p"
    bundle = open_bundle(write_random_model(tmp_path))
    text = tuple(replace(reader, spec=CLIP_L_TEXT) for reader in bundle.text)
    bundle = replace(bundle, denoiser=replace(bundle.denoiser, spec=SD_15_UNET), text=text)
    work = training_needs._workload(load(TrainConfig, [*needed.split(), *flags.split()]), bundle, 1)
    assert work.numbers[1] == trained
    assert len(work.text_encoders) == int(reads_text)
    assert estimate(work).parts["trained"] == trained * 8


def test_keys_and_values_of_text_keep_less_than_adapters_of_all_and_those_less_than_a_full_training():
    ends = {
        which: dict.fromkeys(ranks_of(unet_shapes(SD_15_UNET), 1, own), None) for which, own in CROSS_ATTENTION.items()
    }
    kept = [
        estimate(replace(SD_15_LORA, ranks=[ranks])).parts["activations"]
        for ranks in ({}, ends["crossattn_kv"], ends["crossattn"], full(SD_15_UNET).ranks[0])
    ]
    assert kept[0] == kept[1] < kept[2] < kept[3]

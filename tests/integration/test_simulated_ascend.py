"""MindSpore's own Ascend backend, in its simulation, has a kernel for every operation; commands run in it."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dreambooth_ms.adapters.file import FILE_NAME
from tests.tiny_model import write_random_model, write_random_sdxl
from tools import ascend_stubs
from tools.ascend_graphs import GRAPHS
from tools.audit_ascend import EXPLAINED_DTYPES, audited, findings
from tools.simulate_ascend import CONTROL, REFUSED_OF_CONTROL, read_log, simulate

simulated = pytest.mark.skipif(
    bool(ascend_stubs.missing_tools()), reason=f"needs {', '.join(ascend_stubs.TOOLS)} (Debian: g++, binutils)"
)

FUSED = {"sampling SD": 16, "sampling SDXL": 8, "sampling IF": 5, "fused attention": 2}
"""Attentions that are one kernel, forward: those of UNets in half precision, of which SD has one that inpaints, too."""
CAUSAL = {"sampling SD": 2, "sampling SDXL": 3}
"""Those of text encoders, which are not fused; of SDXL's first one the last layer is not computed."""
UNFUSED = {"sampling SDXL": 2, "sampling IF": 3}
"""Those of the autoencoder, which computes in float32, and of T5 and XLM-R."""

TRAIN = (
    "train --instance_data_dir photographs --instance_prompt star --resolution 32 --train_batch_size 1 --seed 1 "
    "--pretrained_model_name_or_path"
)


@pytest.fixture(scope="module")
def audit():
    """The primitives of all graphs, and reports on each, from one process, since a start takes seconds."""
    return audited(list(GRAPHS))


@pytest.fixture(scope="module")
def uses(audit):
    return audit[0]


@pytest.fixture(scope="module")
def reports(audit):
    return audit[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where commands run, on models of a few thousand weights in the real formats."""
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "sd", levels=1)
    write_random_sdxl(home / "sdxl", levels=1)
    (home / "photographs").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(home / "photographs" / f"{number}.png")
    return home


def run(home, commands):
    """One after the other, in one process of the simulation; returns what they say."""
    split = [[*command.split(), "--device_target", "Ascend"] for command in commands]
    program = "import json, sys; from dreambooth_ms.cli.main import main\n"
    program += "for command in json.loads(sys.argv[1]): assert main(command) == 0, command"
    reports, said = simulate(["-c", program, json.dumps(split)], home)
    assert not reports[""].refused, said
    assert reports[""].backoffs == 0
    assert reports[""].unexplained == set()
    return said


@simulated
class TestGraphs:
    def test_an_operation_without_a_kernel_is_refused(self, reports):
        assert REFUSED_OF_CONTROL in reports[CONTROL].refused

    @pytest.mark.parametrize("graph", GRAPHS)
    def test_every_operation_has_a_kernel(self, reports, graph):
        report = reports[graph]
        assert not report.refused
        assert sum(report.kernels["aclnn"].values()) > 0 < report.peak
        assert report.backoffs == 0
        assert report.unexplained == set()
        assert report.fused == FUSED.get(graph, 0)
        if graph in FUSED:
            assert (report.unfused, report.causal) == (UNFUSED.get(graph, 0), CAUSAL.get(graph, 0))

    def test_a_head_that_is_too_wide_does_not_count_as_fused(self, reports):
        fused, wide = reports["fused attention"], reports["wide attention"]
        assert (fused.fused_backward, wide.fused_backward) == (2, 0)
        assert wide.unfused > 0


@simulated
class TestOperations:
    """As MindSpore's front end leaves them."""

    def test_none_has_an_odd_dtype(self, uses):
        assert findings(uses) == []

    def test_every_kind_is_among_them(self, uses):
        """Ascend's own kernels with their gradients, and nothing of the CPU formulation."""
        kinds = ["FlashAttentionScore", "FlashAttentionScoreGrad", "Conv2DExt", "ConvolutionGrad", "GroupNormGrad"]
        kinds += ["LayerNormExt", "LayerNormGradExt", "Softmax", "AdamWeightDecay", "RightShift", "MatMul"]
        kinds += ["BatchMatMul", "Erf", "Assign", "SearchSorted", "AllReduce", "AllGather", "IndexSelect"]
        kinds += ["SplitWithSize", "MeanExt"]
        assert not set(kinds) - uses.keys()
        assert "Float16" in uses["Conv2DExt"].dtypes

    def test_sd_and_sdxl_are_trained_and_sampled(self, uses):
        both = ("Conv2DExt", "BatchMatMul")
        assert all(uses[name].graphs.keys() >= {"training SD", "training SDXL"} for name in both)
        assert uses["Conv2DExt"].graphs.keys() >= {"sampling SD", "sampling SDXL"}

    def test_other_families_changed_no_operation_of_sd_and_sdxl(self, uses):
        """As many as before blocks of IF and other readers of text were there, by `tools.audit_ascend` of that time."""
        before = {"training SD": 3250, "training SDXL": 6710, "recomputing": 2335}
        before |= {"sampling SD": 1519, "sampling SDXL": 1215}
        assert {name: sum(use.graphs[name] for use in uses.values()) for name in before} == before

    def test_a_step_with_gradient_checkpointing_is_among_them(self, uses):
        """All of it, from the adapters' products to the update."""
        assert all("recomputing" in uses[name].graphs for name in ("ConvolutionGrad", "Softmax", "AdamWeightDecay"))

    def test_nothing_is_explained_that_is_not_there(self, uses):
        assert all(dtype in uses[name].dtypes for name, dtype in EXPLAINED_DTYPES)


@simulated
class TestCommands:
    def test_train_resume_and_sample(self, home):
        lora = (
            f"{TRAIN} sd --output_dir lora --mixed_precision fp16 --with_prior_preservation --class_data_dir class "
            "--class_prompt star --num_class_images 1 --infer_steps 2 --checkpointing_steps 2 --max_train_steps"
        )
        sample = "sample --weight sd,lora --prompt star --num_inference_steps 2 --mixed_precision fp16 --output_dir out"
        said = run(home, [f"{lora} 2", f"{lora} 3 --resume_from_checkpoint latest", sample])
        assert re.search(r"resuming from lora/checkpoint-2$", said, re.MULTILINE)
        assert load_file(home / "lora" / FILE_NAME)
        assert len(list((home / "class").glob("*.png"))) == len(list((home / "out").rglob("*.png"))) == 1

    @pytest.mark.real
    def test_train_all_weights_and_sdxl_with_its_text_encoders(self, home):
        few_steps = "--max_train_steps 1 --gradient_checkpointing --mixed_precision bf16"
        full = f"{TRAIN} sd --output_dir full --method full {few_steps}"
        run(home, [full, f"{TRAIN} sdxl --output_dir sdxl-lora --train_text_encoder {few_steps}"])
        assert (home / "full" / "unet").is_dir()
        networks = {name.partition(".")[0] for name in load_file(home / "sdxl-lora" / FILE_NAME)}
        assert networks == {"unet", "text_encoder", "text_encoder_2"}


def test_a_log_is_read():
    log = (
        "[INFO] DEVICE(1) GenerateKernelMod] kernel opname:MatMul, kernel type:opapi_kernel\n"
        "[INFO] DEVICE(1) GenerateKernelMod] kernel opname:Conv2D, kernel type:acl_kernel\n"
        "[INFO] DEVICE(1) GenerateKernelMod] kernel opname:AllReduce, kernel type:hccl_kernel\n"
        "[INFO] DEVICE(1) TryBackoffCpu] Cholesky\n"
        "[INFO] DEVICE(1) FreeDeviceMem] Max peak used memory size is 2048\n"
        "[INFO] DEVICE(1) FreeDeviceMem] Max peak used memory size is 1024\n"
    )
    report = read_log(log)[""]
    assert {kind: dict(kernels) for kind, kernels in report.kernels.items()} == {
        "aclnn": {"MatMul": 1},
        "acl": {"Conv2D": 1},
        "HCCL": {"AllReduce": 1},
    }
    assert (report.backoffs, report.peak, report.unexplained) == (1, 2048, {"Conv2D"})


def test_a_log_of_graphs_is_read():
    softmax = "GenerateKernelBuildInfo] Default/{}/attend-SlicedAttention/Softmax-op0 input_num: 2\n"
    mark = "[INFO] PIPELINE(1,2,python):2026-11-29-{}.001 [pipeline.cc:402] operator()] Status record: {} action.\n"
    times = {"start bootstrap": "23:59:58.000", "start task_emit": "23:59:59.500", "end task_emit": "00:00:01.500"}
    log = "graph: one two\n" + softmax.format("attn1-Attention") + softmax.format("text_model-TextTransformer/a")
    log += "kernel opname:FlashAttentionScore, kernel type:opapi_kernel\n" * 2
    log += "".join(mark.format(time, what) for what, time in times.items()) + "peak: 5\n"
    log += "graph: three\nrefused: no kernel\npeak: 6\n"
    one, three = (read_log(log)[name] for name in ("one two", "three"))
    assert (one.fused, one.unfused, one.causal, one.peak, one.refused) == (2, 1, 1, 5, "")
    assert (one.graphs, one.front_end, one.backend) == (1, 1.5, 2.0)
    assert (three.graphs, three.peak, three.refused) == (0, 6, "no kernel")


def test_a_process_that_ends_badly_is_told():
    reports = read_log("graph: a\ngraph: b\nTraceback\nValueError: wrong\n", status=1)
    assert not reports["a"].refused
    assert reports["b"].refused == "ValueError: wrong"

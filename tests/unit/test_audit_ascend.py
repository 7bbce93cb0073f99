"""What is compiled for Ascend is documented or shipped for it by the installed MindSpore, or explained."""

import pytest

from tools import audit_ascend
from tools.audit_ascend import EXPLAINED, EXPLAINED_DTYPES, Use, Wheel, findings, kernel_names, primitives


@pytest.fixture(scope="module")
def wheel():
    return Wheel()


@pytest.fixture(scope="module")
def uses():
    return audit_ascend.audited(list(audit_ascend.GRAPHS))


def test_everything_is_covered_or_explained(uses, wheel):
    assert findings(uses, wheel) == []


def test_the_graphs_have_every_kind_of_operation(uses):
    """Ascend's own kernels with their gradients, and nothing of the CPU formulation."""
    kinds = ["FlashAttentionScore", "FlashAttentionScoreGrad", "Conv2D", "Conv2DBackpropFilter", "GroupNormGrad"]
    kinds += ["LayerNorm", "Softmax", "AdamWeightDecay", "RightShift", "MatMul", "BatchMatMul", "Erf", "Assign"]
    kinds += ["SearchSorted", "AllReduce", "AllGather"]
    assert not set(kinds) - uses.keys()
    assert "Float16" in uses["Conv2D"].dtypes


def test_sd_and_sdxl_are_trained_and_sampled(uses):
    assert {"Conv2D", "MatMul"} <= {name for name, use in uses.items() if use.graphs >= {"training SD", "sampling SD"}}
    assert all(uses[name].graphs >= {"training SDXL", "sampling SDXL"} for name in ("Conv2D", "MatMul"))


def test_a_step_with_gradient_checkpointing_is_among_them(uses):
    """All of it, from the adapters' products to the update."""
    assert all("recomputing" in uses[name].graphs for name in ("Conv2DBackpropInput", "Softmax", "AdamWeightDecay"))


def test_nothing_is_explained_that_is_not_there(uses, wheel):
    assert EXPLAINED.keys() <= uses.keys()
    assert all(not wheel.evidence(name).kernel for name in EXPLAINED)
    assert all(dtype in uses[name].dtypes for name, dtype in EXPLAINED_DTYPES)


def test_what_ascend_lacks_is_found(wheel):
    uses = {"Conv2D": Use(1, {"Float32"}), "Invented": Use(1, {"Float32"}), "Add": Use(1, {"Float64"})}
    assert findings(uses, wheel) == [
        "Add: has Float64",
        "Invented: nothing in MindSpore says that Ascend has it",
    ]


def test_primitives_are_read_from_a_graph_with_their_dtypes():
    ir = (
        "  %0(y) = PrimFunc_MatMul(%para1_x, %para2_w, Bool(0), Bool(1)) cnode_attrs: {checkpoint: Bool(1)}\n"
        "      : (<Tensor[Float16], (2, 3)>, <Ref[Tensor[Float16]], (4, 3)>) -> (<Tensor[Float32], (2, 4)>)\n"
        "      # In file a.py:1~2, 3~4/    y = Relu(x)/\n"
        "  %1(z) = Conv2D(%0, %0) primitive_attrs: {pad: (1, 1)}\n"
        "      : (<Tensor[Float32], (2, 4)>, <Tensor[Float32], (2, 4)>) -> (<Tensor[Float32], (2, 4)>)\n"
    )
    found = primitives(ir)
    assert {name: (use.count, use.dtypes) for name, use in found.items()} == {
        "MatMul": (1, {"Float16", "Float32"}),
        "Conv2D": (1, {"Float32"}),
    }


def test_kernels_of_the_eager_mode_are_not_those_of_a_graph():
    library = (
        b"\0_ZTSN9mindspore6kernel4muls10MulsAscendE\0N9mindspore6kernel17AclnnErfKernelModILm2EEE\0"
        b"N9mindspore6kernel11broadcastto25BroadcastToAclnnKernelModE\0N9mindspore6kernel19HcomAllReduceKernelE\0"
        b"N9mindspore6kernel7pyboost9OnlyAscendE\0N9mindspore6kernel12AclKernelModE\0"
    )
    assert kernel_names(library) == {"Muls", "Erf", "BroadcastTo", "AllReduce"}

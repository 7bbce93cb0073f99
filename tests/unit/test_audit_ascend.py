"""The operations of Ascend's graphs, as MindSpore's front end leaves them, have dtypes that Ascend has."""

import pytest

from tools import audit_ascend
from tools.ascend_graphs import GRAPHS
from tools.audit_ascend import EXPLAINED_DTYPES, Use, findings, primitives


@pytest.fixture(scope="module")
def uses():
    return audit_ascend.audited(list(GRAPHS))


def test_no_operation_has_an_odd_dtype(uses):
    assert findings(uses) == []


def test_the_graphs_have_every_kind_of_operation(uses):
    """Ascend's own kernels with their gradients, and nothing of the CPU formulation."""
    kinds = ["FlashAttentionScore", "FlashAttentionScoreGrad", "Conv2DExt", "ConvolutionGrad", "GroupNormGrad"]
    kinds += ["LayerNormExt", "LayerNormGradExt", "Softmax", "AdamWeightDecay", "RightShift", "MatMul", "BatchMatMul"]
    kinds += ["Erf", "Assign", "SearchSorted", "AllReduce", "AllGather", "IndexSelect", "SplitWithSize", "MeanExt"]
    assert not set(kinds) - uses.keys()
    assert "Float16" in uses["Conv2DExt"].dtypes


def test_sd_and_sdxl_are_trained_and_sampled(uses):
    both = ("Conv2DExt", "BatchMatMul")
    assert all(uses[name].graphs >= {"training SD", "training SDXL"} for name in both)
    assert uses["Conv2DExt"].graphs >= {"sampling SD", "sampling SDXL"}


def test_a_step_with_gradient_checkpointing_is_among_them(uses):
    """All of it, from the adapters' products to the update."""
    assert all("recomputing" in uses[name].graphs for name in ("ConvolutionGrad", "Softmax", "AdamWeightDecay"))


def test_nothing_is_explained_that_is_not_there(uses):
    assert all(dtype in uses[name].dtypes for name, dtype in EXPLAINED_DTYPES)


def test_an_odd_dtype_is_found():
    uses = {"Conv2DExt": Use(1, {"Float32"}), "Load": Use(1, {"Float64"}), "Add": Use(1, {"Float64"})}
    assert findings(uses) == ["Add: has Float64"]


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

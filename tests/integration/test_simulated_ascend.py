"""MindSpore's own Ascend backend, in its simulation, has a kernel for every operation of the graphs."""

import pytest

from tools import ascend_stubs
from tools.ascend_graphs import GRAPHS
from tools.simulate_ascend import CONTROL, REFUSED_OF_CONTROL, read_log, simulate

pytestmark = pytest.mark.skipif(
    bool(ascend_stubs.missing_tools()), reason=f"needs {', '.join(ascend_stubs.TOOLS)} (Debian: g++, binutils)"
)

FUSED = {"sampling SD": 8, "sampling SDXL": 8, "fused attention": 1}
"""Attentions that are one kernel, forward: those of UNets in half precision."""


def simulated(graph):
    report, printed = simulate(["-m", "tools.simulate_ascend", "--run", graph])
    return report, printed


def test_an_operation_without_a_kernel_is_refused():
    report, _ = simulated(CONTROL)
    assert REFUSED_OF_CONTROL in report.refused


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_operation_has_a_kernel(graph):
    report, printed = simulated(graph)
    assert not report.refused, printed
    assert sum(report.kernels["aclnn"].values()) > 0
    assert report.backoffs == 0
    assert report.unexplained == set()
    assert report.fused == FUSED.get(graph, 0)


def test_a_log_is_read():
    log = (
        "[INFO] DEVICE(1) GenerateKernelMod] kernel opname:MatMul, kernel type:opapi_kernel\n"
        "[INFO] DEVICE(1) GenerateKernelMod] kernel opname:Conv2D, kernel type:acl_kernel\n"
        "[INFO] DEVICE(1) GenerateKernelMod] kernel opname:AllReduce, kernel type:hccl_kernel\n"
        "[INFO] DEVICE(1) TryBackoffCpu] Cholesky\n"
        "[INFO] DEVICE(1) FreeDeviceMem] Max peak used memory size is 2048\n"
        "[INFO] DEVICE(1) FreeDeviceMem] Max peak used memory size is 1024\n"
    )
    report = read_log(log)
    assert {kind: dict(kernels) for kind, kernels in report.kernels.items()} == {
        "aclnn": {"MatMul": 1},
        "acl": {"Conv2D": 1},
        "HCCL": {"AllReduce": 1},
    }
    assert (report.backoffs, report.peak, report.unexplained) == (1, 2048, {"Conv2D"})

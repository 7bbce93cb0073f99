"""Run every graph of the audit through MindSpore's own Ascend backend, in its simulation; it needs no card, no CANN.

    python -m tools.simulate_ascend                       # a line for each graph; status 1 if one is refused
    python -m tools.simulate_ascend "training SD"
    python -m tools.simulate_ascend --command train …     # `dreambooth-ms train …` in the simulation

`tools.ascend_memory` takes steps of real size in it.

The backend's own passes, its choice of a kernel for every operation, and its pool of device memory work as with a card
(MS_SIMULATION_LEVEL=1); kernels are launched by name only, so that all results are zeros. CANN's libraries are replaced
by `ascend_stubs`. An operation that has no Ascend kernel is refused: the control, one that has none, shows that it is.

What this can't show: that CANN's kernels take these shapes and dtypes, what they compute, and how fast.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tools import ascend_stubs
from tools.ascend_graphs import GRAPHS, Graph

INTERFACES = {"opapi": "aclnn", "acl": "acl", "aicpu": "AI CPU", "rt": "runtime", "hccl": "HCCL"}
"""MindSpore's names of kinds of kernels -> what they are called: by what interface of CANN a kernel is reached."""

OLD_INTERFACE = {
    "AdamApplyOneWithDecayAssign": "AdamW's update of a parameter; aclnn's takes no learning rate that is a tensor",
    "AddN": "MindSpore's differentiation writes it where a value is read more than once",
    "Assign": "sets a parameter; the aclnn form makes MindSpore copy parameters",
    "CumProd": "of mindone's schedulers, once when one is made",
    "RightShift": "of the hash behind --lora_dropout; there is no aclnn form",
    "Slice": "takes gradients out of the tensor that processes have summed",
    "TensorMove": "a copy that passes of the backend write",
}
"""Operations that CANN compiles when they are first used, for each shape, with the reason why they are still there."""

DAY = 86400.0
"""Seconds, after which a clock begins again."""

CONTROL = "control"
"""The name of the graph that must be refused."""
REFUSED_OF_CONTROL = "Cholesky"
"""The operation in it, which has no Ascend kernel."""


@dataclass
class Report:
    """What the backend did with graphs."""

    refused: str = ""
    """Why one was refused, if one was."""
    graphs: int = 0
    """That were compiled."""
    kernels: dict[str, Counter[str]] = field(default_factory=dict)
    """Interface -> operations with their number."""
    backoffs: int = 0
    """Operations that went to a CPU kernel."""
    unfused: int = 0
    """Softmaxes of attentions that are not fused: of each, or each slice of one, forward and again backward."""
    causal: int = 0
    """The same of causal attentions, those of text encoders, which the fused kernel is not used for."""
    peak: int = 0
    """Device memory, in bytes, without workspaces and buffers of collective operations."""
    front_end: float = 0.0
    """Seconds that MindSpore's compiler took before the backend."""
    backend: float = 0.0
    """Seconds that the backend took to choose and make kernels."""

    @property
    def fused(self) -> int:
        """Attentions that are one kernel, forward. With gradient checkpointing each is computed twice."""
        return self.kernels.get("aclnn", Counter())["FlashAttentionScore"]

    @property
    def fused_backward(self) -> int:
        """Gradients of attentions that are one kernel."""
        return self.kernels.get("aclnn", Counter())["FlashAttentionScoreGrad"]

    @property
    def unexplained(self) -> set[str]:
        """Operations of the older interface without a reason."""
        return self.kernels.get("acl", Counter()).keys() - OLD_INTERFACE.keys()

    def __str__(self) -> str:
        if self.refused:
            return f"REFUSED: {self.refused}"
        kinds = ", ".join(f"{sum(own.values())} {interface}" for interface, own in sorted(self.kernels.items()))
        both = self.fused + self.fused_backward
        fused = f"{both} of {both + self.unfused} computations of attention fused ({self.fused} forward), "
        times = f"front end {self.front_end:.0f} s, backend {self.backend:.0f} s"
        return (
            f"compiled: {self.graphs} graphs, {kinds}; {self.backoffs} to CPU; "
            f"{fused if both + self.unfused else ''}"
            f"device peak {self.peak / 2**20:.1f} MiB; {times}"
        )


WRITTEN = "MS_DEV_SAVE_GRAPHS_PATH"
"""Names the folder that MindSpore writes graphs into, if there is one."""


def environment(folder: Path | None = None, written: Path | None = None) -> dict[str, str]:
    """What MindSpore's simulation needs of a process's environment.

    Args:
        folder: of the stand-ins for CANN's libraries.
        written: where the last graphs of the front end are to be written; None: nowhere.
    """
    writes = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_DUMP_IR_PASSES": "validate", WRITTEN: str(written)}
    folder = folder or ascend_stubs.library_folder()
    return {
        "LD_LIBRARY_PATH": ":".join(map(str, [folder, *ascend_stubs.wheel_folders()])),
        "LD_PRELOAD": str(folder / ascend_stubs.PATIENCE),
        "PYTHONPATH": f"{Path(__file__).parents[1]}:{folder}",
        "MS_SIMULATION_LEVEL": "1",
        # An operation without an Ascend kernel would silently get CPU's.
        "MS_DISABLE_KERNEL_BACKOFF": "1",
        "MS_COMPILER_CACHE_ENABLE": "0",
        "MS_SUBMODULE_LOG_v": "{DEVICE:1,PIPELINE:1}",
        **(writes if written else {}),
    }


def place(rank: int, count: int) -> dict[str, str]:
    """Environment of one of so many processes: what mpirun sets, and where MindSpore's simulation reads the same.

    `msrun` is no help here: in a simulation it does not say who is a worker, and has no scheduler (seen).
    """
    numbers = {"OMPI_COMM_WORLD_SIZE": count, "OMPI_COMM_WORLD_LOCAL_SIZE": count, "OMPI_COMM_WORLD_RANK": rank}
    numbers |= {"RANK_SIZE": count, "RANK_ID": rank}
    return {"PMIX_NAMESPACE": f"simulation {os.getpid()}", **{name: str(number) for name, number in numbers.items()}}


def simulate(
    command: Sequence[str], folder: Path | None = None, processes: int = 1, written: Path | None = None
) -> tuple[dict[str, Report], str]:
    """Run Python with these arguments in the simulation; returns what its log says, and what it printed otherwise.

    The reports are of the graphs by name; what was compiled before the first, or without graphs, is under "". Of
    several processes that train as one it is what the first says.

    In a folder of its own, since MindSpore writes the order of operations there; or in the one that is named.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MS_", "GLOG_"))}
    own |= environment(written=written)
    with TemporaryDirectory() as empty:
        started = [
            subprocess.Popen(
                [sys.executable, *command],
                env=own | (place(rank, processes) if processes > 1 else {}),
                cwd=folder or empty,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for rank in range(processes)
        ]
        log, _ = started[0].communicate()
        status = max((process.wait() for process in started), key=abs)
    said = "\n".join(line for line in log.splitlines() if not line.startswith("[INFO]"))
    return read_log(log, status), said


def read_log(log: str, status: int = 0) -> dict[str, Report]:
    """What MindSpore's log of a simulated process says of each graph that `run_graphs` ran, and of all before it."""
    first, *others = re.split(r"^graph: (.+)$\n", log, flags=re.MULTILINE)
    sections = {"": first} | dict(zip(others[::2], others[1::2], strict=True))
    reports = {name: _read_section(section) for name, section in sections.items()}
    if status:
        last = reports[list(reports)[-1]]
        errors = re.findall(r"^(?:[\w.]*Error|Exception): .*$", log, re.MULTILINE)
        last.refused = last.refused or (errors[-1] if errors else f"status {status}")
    return reports


def _read_section(log: str) -> Report:
    report = Report(backoffs=len(re.findall(r"TryBackoffCpu", log)))
    for name, kind in re.findall(r"kernel opname:(\w+), kernel type:(\w+?)(?:_kernel)?\b", log):
        report.kernels.setdefault(INTERFACES.get(kind, kind), Counter())[name] += 1
    # Nothing but attention has a softmax.
    paths = re.findall(r"GenerateKernelBuildInfo\] (\S*/)Softmax-op\d+ ", log)
    report.causal = sum("-TextTransformer/" in path for path in paths)
    report.unfused = len(paths) - report.causal
    # In the pool's own words at the end of a process, or those of `run_graphs`.
    peaks = re.findall(r"(?:Max peak used memory size is|^peak:) (\d+)", log, re.MULTILINE)
    report.peak = max(map(int, peaks), default=0)
    report.refused = next(iter(re.findall(r"^refused: (.*)$", log, re.MULTILINE)), "")
    started = emitted = 0.0
    for *clock, mark in re.findall(r"-(\d\d):(\d\d):(\d\d\.\d{3})\S* .*Status record: ((?:start|end) \w+) action", log):
        hour, minute, second = map(float, clock)
        now = 3600 * hour + 60 * minute + second
        if mark == "start bootstrap":
            started = now
        elif mark == "start task_emit":
            report.front_end += (now - started) % DAY
            emitted = now
        elif mark == "end task_emit":
            report.graphs += 1
            report.backend += (now - emitted) % DAY
    return report


def run_graphs(names: Sequence[str]) -> None:
    """Compile graphs and take each once, in a process whose environment `environment` made.

    Graphs that MindSpore writes down are sorted into folders by their names.
    """
    from mindspore import runtime

    from dreambooth_ms.runtime.device import set_up_device

    set_up_device("Ascend", 0)
    for name in names:
        print(f"graph: {name}", flush=True)
        runtime.reset_max_memory_allocated()
        try:
            for cell, inputs in _refused() if name == CONTROL else GRAPHS[name]():
                cell(*inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            print("refused:", " ".join(str(error).split()), flush=True)
        print("peak:", runtime.max_memory_allocated(), flush=True)
        if folder := os.environ.get(WRITTEN):
            (Path(folder) / name).mkdir()
            for file in Path(folder).glob("*_validate_*.ir"):
                file.rename(Path(folder) / name / file.name)


def _refused() -> list[Graph]:
    import numpy as np
    from mindspore import Tensor, nn, ops

    class Refused(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.cholesky = ops.Cholesky()

        def construct(self, x: Tensor) -> Tensor:
            return self.cholesky(x)

    return [(Refused(), (Tensor(np.eye(4, dtype=np.float32)),))]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each graph; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="*", metavar="GRAPH", help=f"of {', '.join(GRAPHS)} (default: all)")
    parser.add_argument("--processes", type=int, default=1, help="of the command, which train as one (default: 1)")
    parser.add_argument("--command", nargs=argparse.REMAINDER, help="a command of dreambooth-ms, with its flags")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        run_graphs(args.graphs)
        return 0
    if lacking := ascend_stubs.missing_tools():
        raise SystemExit(f"{', '.join(lacking)}: not found; install g++ and binutils")
    if args.command:
        command = ["-m", "dreambooth_ms", *args.command, "--device_target", "Ascend"]
        reports, said = simulate(command, Path.cwd(), args.processes)
        print(said)
        print(reports[""])
        return 1 if reports[""].refused else 0
    unknown = set(args.graphs) - GRAPHS.keys()
    if unknown:
        parser.error(f"no graph {', '.join(sorted(unknown))}; choose of {', '.join(GRAPHS)}")
    names = args.graphs or list(GRAPHS)
    reports = simulate_graphs(names)
    failed = False
    for name in names:
        report = reports.get(name, Report(refused="not compiled"))
        print(f"{name:16} {report}", flush=True)
        for kernel, count in sorted(report.kernels.get("acl", Counter()).items()):
            print(f"    acl: {count} {kernel}: {OLD_INTERFACE.get(kernel, 'NOT EXPLAINED')}", flush=True)
        failed |= bool(report.refused or report.backoffs or report.unexplained)
    return 1 if failed else 0


def simulate_graphs(names: Sequence[str], written: Path | None = None) -> dict[str, Report]:
    """Compile these graphs in one process, and the control, which must be refused.

    `written`: a folder for the last graphs of the front end, in which each graph of these has a folder of its name.

    Raises:
        SystemExit: it is not.
    """
    reports, said = simulate(["-m", "tools.simulate_ascend", "--run", *names, CONTROL], written=written)
    control = reports.get(CONTROL, Report(refused=f"the process ended before it:\n{said}"))
    if REFUSED_OF_CONTROL not in control.refused:
        raise SystemExit(f"the control, which has no Ascend kernel, was not refused ({control}): this shows nothing")
    return reports


if __name__ == "__main__":
    sys.exit(main())

"""List the operations of Ascend's graphs with the dtypes that they take and give; no card is needed.

    python -m tools.audit_ascend          # all primitives; status 1 if one has an odd dtype
    python -m tools.audit_ascend --graph optimisers

MindSpore's front end compiles the graphs on CPU, without a backend, so that Ascend's own operations stay in them by
name; what is listed is its last graph before a backend takes over. Whether there is a kernel for each is shown by
`tools.simulate_ascend`; there, dtypes of kernels that come compiled with CANN are not looked at.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.ascend_graphs import GRAPHS

DTYPES = frozenset({"Float32", "Float16", "BFloat16", "Int32", "Int64", "Bool"})
"""What these graphs may hold. Ascend's cube unit has no float64, and a stray one would go to the AI CPU."""

EXPLAINED_DTYPES = {
    ("Assign", "UInt8"): "sets the codes of 8-bit AdamW; documented without a limit of dtypes",
    ("Cast", "UInt8"): "codes to and from int32 and int64, pairs that the registry of AI CPU kernels has (looked up)",
    ("Select", "UInt8"): "keeps the codes in a step that is skipped; the registry of AI CPU kernels has it (looked up)",
}
"""Other dtypes of primitives, with the reason why they may be there."""

VALUES = frozenset({"Load", "MakeTuple", "TupleGetItem", "Depend", "UpdateState", "Return", "make_tuple"})
"""What only names and orders values."""


@dataclass
class Use:
    """How one primitive is used."""

    count: int = 0
    dtypes: set[str] = field(default_factory=set)
    graphs: set[str] = field(default_factory=set)


def compile_graphs(chosen: Sequence[str]) -> None:
    """Compile these graphs, in a process whose environment makes MindSpore write them down."""
    from dreambooth_ms.runtime.device import Formulation, set_up_device
    from tools.formulation import use_formulation

    set_up_device("CPU", 0)
    with use_formulation(Formulation.ASCEND, cpu_kernels=False):
        for name in chosen:
            for cell, inputs in GRAPHS[name]():
                cell.compile(*inputs)


def dump(chosen: Sequence[str], folder: Path) -> None:
    """Have MindSpore write the last graphs of its front end into the folder.

    Raises:
        subprocess.CalledProcessError: they do not compile.
    """
    switches = {
        "MS_DEV_PRECOMPILE_ONLY": "1",
        "MS_DEV_SAVE_GRAPHS": "1",
        "MS_DEV_DUMP_IR_PASSES": "validate",
        "MS_DEV_SAVE_GRAPHS_PATH": str(folder),
        "MS_COMPILER_CACHE_ENABLE": "0",
    }
    command = [sys.executable, "-m", "tools.audit_ascend", "--compile", *chosen]
    subprocess.run(command, env=os.environ | switches, check=True, cwd=Path(__file__).parents[1])


_NODE = re.compile(r"^  %\d+\([^)]*\) = (?:PrimFunc_)?(\w+)\(.*\n      : \((.*)\) -> \((.*)\)$", re.MULTILINE)
_TENSOR = re.compile(r"Tensor\[(\w+)\]")


def primitives(ir: str) -> dict[str, Use]:
    """The primitives of a graph as MindSpore writes it down, with the dtypes of the tensors they take and give."""
    uses: dict[str, Use] = {}
    for name, inputs, outputs in _NODE.findall(ir):
        use = uses.setdefault(name, Use())
        use.count += 1
        use.dtypes.update(_TENSOR.findall(f"{inputs} {outputs}"))
    return uses


def audited(chosen: Sequence[str]) -> dict[str, Use]:
    """The primitives of all these graphs."""
    total: dict[str, Use] = {}
    for name in chosen:
        with TemporaryDirectory() as folder:
            dump([name], Path(folder))
            files = list(Path(folder).rglob("*_validate_*.ir"))
            if not files:
                raise SystemExit(f"{name}: MindSpore wrote no graph down")
            for file in files:
                for primitive, use in primitives(file.read_text(encoding="utf-8")).items():
                    known = total.setdefault(primitive, Use())
                    known.count += use.count
                    known.dtypes |= use.dtypes
                    known.graphs.add(name)
    return total


def findings(uses: dict[str, Use]) -> list[str]:
    """Dtypes that should not be there, one line each."""
    problems = []
    for name, use in sorted(uses.items()):
        odd = {dtype for dtype in use.dtypes - DTYPES if name not in VALUES and (name, dtype) not in EXPLAINED_DTYPES}
        if odd:
            problems.append(f"{name}: has {', '.join(sorted(odd))}")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", nargs="+", choices=list(GRAPHS), default=list(GRAPHS), help="which (default: all)")
    parser.add_argument("--compile", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile:
        compile_graphs(args.compile)
        return 0
    uses = audited(args.graph)
    print(f"{'primitive':24} {'count':>6}  dtypes")
    for name, use in sorted(uses.items()):
        reasons = "".join(f"; {dtype}: {why}" for (of, dtype), why in EXPLAINED_DTYPES.items() if of == name)
        print(f"{name:24} {use.count:6}  {', '.join(sorted(use.dtypes))}{reasons}")
    problems = findings(uses)
    for problem in problems:
        print(f"ODD  {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

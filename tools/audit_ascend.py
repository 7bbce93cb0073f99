"""List the operations of Ascend's graphs with the dtypes that they take and give; no card is needed.

    python -m tools.audit_ascend          # all primitives; status 1 if one has an odd dtype
    python -m tools.audit_ascend --graph optimisers

The graphs are compiled in MindSpore's simulation of Ascend (`tools.simulate_ascend`), which shows whether there is a
kernel for each operation, but does not look at dtypes of kernels that come compiled with CANN. What is listed is the
last graph of the front end, before the backend takes over.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tools import ascend_stubs
from tools.ascend_graphs import GRAPHS
from tools.simulate_ascend import Report, simulate_graphs

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
    graphs: Counter[str] = field(default_factory=Counter)
    """How often in each graph."""


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


def audited(chosen: Sequence[str]) -> tuple[dict[str, Use], dict[str, Report]]:
    """The primitives of all these graphs, and what MindSpore's Ascend backend did with them."""
    total: dict[str, Use] = {}
    with TemporaryDirectory() as folder:
        reports = simulate_graphs(chosen, Path(folder))
        for name in chosen:
            for file in (Path(folder) / name).iterdir():
                for primitive, use in primitives(file.read_text(encoding="utf-8")).items():
                    known = total.setdefault(primitive, Use())
                    known.count += use.count
                    known.dtypes |= use.dtypes
                    known.graphs[name] += use.count
    return total, reports


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
    args = parser.parse_args(argv)
    if lacking := ascend_stubs.missing_tools():
        raise SystemExit(f"{', '.join(lacking)}: not found; install g++ and binutils")
    uses, _ = audited(args.graph)
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

"""What `doctor` looks at of an Ascend card: driver and CANN, fused attention, kernels, and the environment."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
from mindspore import Tensor

from dreambooth_ms.models.specs import PUBLISHED_MODELS
from dreambooth_ms.ops import MultiHeadAttention
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.runtime.ascend import CANN_HOME

CANN_ACCEPTED = ("8.2", "8.3", "8.5", "9.0", "9.1")
"""What MindSpore 2.10.0 accepts (looked up in its `run_check/_check_version.py`)."""

DRIVER = Path("/usr/local/Ascend/driver/version.info")
DRIVERS = {
    "8.5": {"25.5": True},
    "9.0": {"26.0.rc1": True},
    "9.1": {"25.0": False} | dict.fromkeys(("25.2", "25.3", "25.5", "26.0.rc1", "26.1"), True),
}
"""CANN -> driver -> whether they go together, as far as it is published (docs/ascend.md has the sources)."""

OLD_INTERFACE = ("AdamApplyOneWithDecayAssign", "AddN", "Assign", "CumProd", "RightShift", "Slice", "TensorMove")
"""What tools/simulate_ascend.py finds on CANN's older interface, where it has the reasons."""

READ_BY_CARD = ("ASCEND_", "HCCL_", "RANK_TABLE", "TE_PARALLEL")
"""Beginnings of the variables that decide how a card is used."""

HEADS, TOKENS, ROUNDING = 2, 64, 5e-3
"""Of the attention that is tried, whose relative error in float16 is 6e-4 on a CPU."""


class Failed(Exception):
    """A check failed; the text says what was found and what to do."""


def cann_version(home: Path | str | None) -> str | None:
    """The version that CANN gives in its folder."""
    for path in (Path(home, "compiler", "version.info"), Path(home, "version.cfg")) if home else ():
        if path.is_file() and (match := re.search(r"(?i)version[^\n=]*=\W*(?:.*:)?([0-9][\w.]+)", path.read_text())):
            return match[1]
    return None


def driver(file: Path = DRIVER) -> str:
    """The driver's version, and whether it is known to go with this CANN."""
    said = file.read_text() if file.is_file() else ""
    if not said and (program := shutil.which("npu-smi")):
        said = subprocess.run([program, "info"], capture_output=True, text=True, timeout=60, check=False).stdout
    match = re.search(r"(?m)(?:^|\s)Version[=:]\s*(\S+)", said)
    if not match:
        return f"of unknown version: neither {file} nor npu-smi tells it (a container sees what it was started with)"
    cann = cann_version(os.environ.get(CANN_HOME)) or "of unknown version"
    known = next((drivers for name, drivers in DRIVERS.items() if cann.startswith(name)), {})
    fits = next((fits for name, fits in known.items() if match[1].lower().startswith(name)), None)
    if fits is False:
        raise Failed(f"{match[1]}: expected with CANN {cann} one of {', '.join(name for name in known if known[name])}")
    return f"{match[1]}, {'goes' if fits else 'not known whether it goes'} with CANN {cann}"


def attention() -> str:
    """Attention in float16 with heads of every size in the published bases, beside float64."""
    unets = [model.unet for model in PUBLISHED_MODELS]
    sizes = {spec.block_out_channels[level] // heads for spec in unets for level, heads in enumerate(spec.num_heads)}
    found = {size: _attention_error(size) for size in sorted(sizes)}
    said = ", ".join(f"{size} {'fused' if is_fused else 'in parts'}" for size, (is_fused, _) in found.items())
    worst = max(error for _, error in found.values())
    if not worst <= ROUNDING:
        raise Failed(f"heads of {said}; relative error {worst:.0e}, expected at most {ROUNDING:g}")
    return f"heads of {said}; to {worst:.0e}"


def _attention_error(size: int) -> tuple[bool, float]:
    """Whether attention with such heads is one kernel, and the relative error of its result."""
    cell = MultiHeadAttention(HEADS, size)
    rows = [standard_normal((1, TOKENS, HEADS * size), size, name).astype(np.float16) for name in "qkv"]
    q, k, v = (x.astype(np.float64).reshape(TOKENS, HEADS, size).transpose(1, 0, 2) for x in rows)
    weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(size))
    expected = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(1, TOKENS, HEADS * size)
    result = cell(*map(Tensor, rows)).asnumpy()
    return cell.fuses, float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def kernels() -> str:
    """By which interface of CANN kernels are reached, in MindSpore's simulation."""
    te = "can be imported" if importlib.util.find_spec("te") else "cannot be imported: source CANN's set_env.sh"
    return f"aclnn, but acl, compiled by CANN (te {te}) when first used, of {', '.join(OLD_INTERFACE)}"


def environment() -> str:
    """The variables that decide how a card is used; MindSpore sets some by itself."""
    own = (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(READ_BY_CARD))
    return ", ".join(own)


CHECKS = {"driver": driver, "attention": attention, "kernels": kernels, "environment": environment}
"""Name -> check, for a device that was set up."""

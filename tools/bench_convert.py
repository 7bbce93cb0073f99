"""Time conversions of a single file beside copying it, and measure their memory.

    python -m tools.bench_convert                     # SDXL in float16, 6.9 GB: needs twice that on the disk
    python -m tools.bench_convert --family sd15 --dtype fp32 --folder /fast/disk

For each target it prints the time of copying the file in the same folder over the time of converting it (1 is as fast,
0.5 half as fast), and the largest resident memory of the converting process in MiB. Every write ends on the disk.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from dreambooth_ms.formats.files.dtypes import DTYPES, DType
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import SD_15, SD_21, SDXL_BASE, SDXL_REFINER

MODELS = {"sd15": SD_15, "sd21": SD_21, "sdxl": SDXL_BASE, "refiner": SDXL_REFINER}
TARGETS = {"diffusers folder": "out", "stability .safetensors": "out.safetensors", "mindone .ckpt": "out.ckpt"}
MIB = 1 << 20


def main() -> None:
    """Run the benchmark by the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=MODELS, default="sdxl")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--target-dtype", choices=DTYPES, default=None, help="cast on the way")
    parser.add_argument("--folder", default=None, help="where to write; the system's temporary folder otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "model.safetensors"
        largest = write_model(source, arguments.family, DTYPES[arguments.dtype])
        print(f"{arguments.family} in {arguments.dtype}: {source.stat().st_size / 1e9:.2f} GB, ", end="")
        print(f"largest tensor {largest / MIB:.0f} MiB")
        copy_seconds(source, Path(folder) / "copy")  # The first reader of a new file waits for the disk.
        for name, target in TARGETS.items():
            compare(source, name, Path(folder) / target, arguments.target_dtype)


def write_model(path: Path, family: str, dtype: DType) -> int:
    """A single file with random bits; returns the size of its largest tensor in bytes."""
    model = MODELS[family]
    naming = naming_of(Format.STABILITY, model)
    plan = naming.write_plan(list(model_shapes(model)))
    shapes = {name: own.shape([naming.shapes[piece] for piece in own.pieces]) for name, own in plan.tensors.items()}
    tensors = {name: StoredTensor(shape, dtype, partial(_random, shape, dtype)) for name, shape in shapes.items()}
    write_safetensors(path, tensors, {"format": "pt"})
    return max(tensor.byte_count for tensor in tensors.values())


def _random(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    count = int(np.prod(shape))
    values = np.random.default_rng(count).standard_normal(min(count, 1 << 20), dtype=np.float32)
    own = StoredTensor.of(np.resize(values, shape)).cast_to(dtype)
    return own.read()


def compare(source: Path, name: str, target: Path, dtype: str | None) -> None:
    """Convert, then copy, and print a line."""
    command = [sys.executable, "-m", "dreambooth_ms.cli.main", "convert", str(source), str(target)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, *(["--dtype", dtype] if dtype else [])], stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_peak(process.pid))
        time.sleep(0.02)
    converting = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"the conversion to {name} ended with status {process.returncode}")
    _remove(target)
    copying = copy_seconds(source, target.with_name("copy"))
    print(
        f"{name:24} converting {converting:6.1f} s, copying {copying:6.1f} s: ratio {copying / converting:.2f}, "
        f"peak {peak / MIB:.0f} MiB",
        flush=True,
    )


def resident_peak(process: int) -> int:
    """The most memory that a running process has had, in bytes; what wait4 returns would include that of this one."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0")
    return int(line.split()[1]) * 1024


def copy_seconds(source: Path, target: Path) -> float:
    """How long it takes to copy a file until the copy is on the disk."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def _remove(target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()


if __name__ == "__main__":
    main()

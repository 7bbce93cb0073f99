"""Time a picture: ours, and one of diffusers' pipeline on PyTorch, on this CPU.

    python -m tools.bench_sample                      # the embedded base; needs tests/requirements.txt
    python -m tools.bench_sample --size sd15          # Stable Diffusion 1.5 at 512 px, with random weights
    python -m tools.bench_sample --base FOLDER        # a model folder in diffusers' layout

Each side runs in fresh processes, in turns, from the same folder: the model is loaded, the prompt encoded, and two
pictures are sampled from the same noise with guidance, in float32. The first says how long a user waits for it, the
second how long a step takes. Both sides sample the same picture, and that is checked. PyTorch gets a thread for every
core; MindSpore's threads are what it takes by itself. Then ours runs twice more, with an empty compile cache and with
the one that this filled.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.errors import count_of
from tools.bench_step import BASE, peak_memory, ratio_table, run_child, start_value

# MindSpore and PyTorch are imported by the processes that are timed, each its own. A process inherits the peak memory
# of the one that started it, so this one stays small.

PROMPT, SEED = "a photo of a red circle on a blue background", 0
GUIDANCE = 7.5
SAME_LEVELS = 2
"""How far pictures may differ, of 255 levels; sums are taken in another order."""
SHOWN = 8
"""Pixels of a picture that are compared, along one side."""


@dataclass(frozen=True)
class Job:
    """What is timed."""

    base: Path
    """Model folder."""
    resolution: int | None
    """Side of the picture in pixels; None: the model's own."""
    steps: int
    """Denoising steps of each picture."""


Mark = Callable[[str], None]
"""Notes that something is done."""
SampleFunction = Callable[[Callable[[], None]], np.ndarray]
"""Samples the picture (H, W, 3) uint8, and calls its argument after every step."""


def build_ours(job: Job, mark: Mark) -> SampleFunction:
    """A picture of this toolkit, from the parts that `dreambooth-ms sample` puts together."""
    # transformers imports PyTorch where it is installed, which it is not for those who use the toolkit.
    os.environ["USE_TORCH"] = "0"
    from dreambooth_ms.runtime.device import set_up_device

    set_up_device("CPU", 0)

    from dreambooth_ms.sampling.model import SamplingModel
    from dreambooth_ms.sampling.request import SampleRequest
    from dreambooth_ms.weights.bundle import open_bundle

    mark("imported")
    model = SamplingModel(open_bundle(job.base))
    request = SampleRequest(
        prompts=(PROMPT,),
        height=job.resolution,
        width=job.resolution,
        num_inference_steps=job.steps,
        guidance_scale=GUIDANCE,
        seed=SEED,
    )

    def sample(step_done: Callable[[], None]) -> np.ndarray:
        (sample,) = model.sample(request, lambda report: step_done())
        return sample.picture

    return sample


def build_peer(job: Job, mark: Mark) -> SampleFunction:
    """The same picture as diffusers' pipeline samples it."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from dreambooth_ms.randomness import standard_normal

    mark("imported")
    torch.set_num_threads(os.cpu_count() or 1)
    pipeline = StableDiffusionPipeline.from_pretrained(job.base, torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    side = (job.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor) // pipeline.vae_scale_factor
    shape = pipeline.unet.config.in_channels, side, side
    # The noise of the first picture of a request, as `sampling.model.starting_noise` draws it.
    noise = torch.from_numpy(standard_normal(shape, SEED, "sample", row=0)[None])

    def sample(step_done: Callable[[], None]) -> np.ndarray:
        def end_of_step(_pipeline: Any, _step: int, _timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            step_done()
            return tensors

        images = pipeline(
            PROMPT,
            latents=noise,
            num_inference_steps=job.steps,
            guidance_scale=GUIDANCE,
            output_type="np",
            callback_on_step_end=end_of_step,
        ).images
        return np.rint(images[0] * 255).astype(np.uint8)

    return sample


SIDES: dict[str, Callable[[Job, Mark], SampleFunction]] = {"ours": build_ours, "peer": build_peer}


def measure(side: str, job: Job, started: float) -> dict[str, Any]:
    """Time one side in this process.

    Args:
        side: a key of `SIDES`.
        job: what to time.
        started: when this process was started, in seconds of the monotonic clock.

    Returns:
        `imported`, `first_picture`: when each was done, in seconds after the start; `picture`: seconds of the second
        one; `steps`: seconds from each of its steps to the next; `levels`: some of its values; `peak_memory`: bytes.

    Raises:
        SystemExit: the two pictures are not the same, or flat; such a picture is not worth timing.
    """
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks[name] = time.monotonic() - started

    sample = SIDES[side](job, mark)
    first = sample(lambda: None)
    mark("first_picture")
    begun, ends = time.monotonic(), []
    picture = sample(lambda: ends.append(time.monotonic()))
    seconds = time.monotonic() - begun
    if picture.std() == 0 or not np.array_equal(first, picture):
        raise SystemExit(f"{side}: the picture is flat, or was another one the second time")
    stride = max(1, picture.shape[0] // SHOWN)
    return {
        **marks,
        "picture": seconds,
        "steps": np.diff(ends).tolist(),
        "levels": picture[::stride, ::stride].reshape(-1).tolist(),
        "peak_memory": peak_memory(resource.getrusage(resource.RUSAGE_SELF)),
    }


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one process as the table shows them."""
    return {
        "step, s": statistics.median(report["steps"]),
        "second picture, s": report["picture"],
        "first picture done after, s": report["first_picture"],
        "  imports, s": report["imported"],
        "peak memory, GiB": report["peak_memory"] / 2**30,
    }


def check_same_picture(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> None:
    """Both sides drew the same.

    Raises:
        SystemExit: their pictures differ.
    """
    difference = np.abs(np.subtract(ours["levels"], peer["levels"])).max()
    if difference > SAME_LEVELS:
        raise SystemExit(f"the pictures differ by {difference} of 255 levels: the two sides do not do the same")


def write_random_model(folder: Path) -> None:
    """Stable Diffusion 1.5 as a folder in diffusers' layout, its weights functions of their names."""
    from functools import partial

    from dreambooth_ms.formats.files.dtypes import DType
    from dreambooth_ms.formats.files.stored import Container, StoredTensor
    from dreambooth_ms.formats.naming.formats import Format
    from dreambooth_ms.formats.naming.plan import Report
    from dreambooth_ms.models.parameter_shapes import model_shapes
    from dreambooth_ms.models.specs import SD_15
    from dreambooth_ms.weights.model_writing import plan_model
    from dreambooth_ms.weights.opened_model import OpenedModel

    shapes = model_shapes(SD_15)
    model = OpenedModel(
        path=folder,
        container=Container.SAFETENSORS,
        form=Format.STABILITY,
        spec=SD_15,
        tensors={
            name: StoredTensor(shape, DType.F32, partial(start_value, name, shape)) for name, shape in shapes.items()
        },
        parts=tuple(dict.fromkeys(name.partition(".")[0] for name in shapes)),
        report=Report(),
        prediction_type="epsilon",
        averages=0,
    )
    plan_model(model, Format.DIFFUSERS).write_parts(folder)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "sd15"], default="tiny", help="the model (default: tiny)")
    parser.add_argument("--base", type=Path, help="a model folder, in place of --size")
    parser.add_argument("--resolution", type=int, help="side of the picture in pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    parser.add_argument("--pairs", type=int, default=2, help="processes of each side (default: 2)")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2 or args.pairs < 1:
        parser.error("--steps: expected at least 2, --pairs: at least 1")
    if args.base and not (args.base / "model_index.json").is_file():
        parser.error(f"--base: expected a model folder in diffusers' layout, got {args.base}")
    return args


def compare(base: Path, args: argparse.Namespace, scratch: Path) -> None:
    """Time both sides in turns and print the table, then ours with the compile cache."""
    flags = ["--base", str(base), "--steps", str(args.steps)]
    flags += ["--resolution", str(args.resolution)] if args.resolution else []

    def run(side: str) -> dict[str, Any]:
        report = run_child([sys.executable, "-m", "tools.bench_sample", *flags, "--side", side])
        print(f"{side}: {figures(report)['step, s']:.3f} s a step", flush=True)
        return report

    os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"
    pairs = []
    for _ in range(args.pairs):
        ours, peer = run("ours"), run("peer")
        check_same_picture(ours, peer)
        pairs.append((figures(ours), figures(peer)))
    print(ratio_table(pairs))
    os.environ |= {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(scratch / "compile cache")}
    cold, warm = run("ours"), run("ours")
    check_same_picture(cold, warm)
    for name, report in (("ours, filling the compile cache", cold), ("ours, from the compile cache", warm)):
        print(
            f"{name}: first picture done after {report['first_picture']:.3f} s, "
            f"peak memory {report['peak_memory'] / 2**30:.3f} GiB"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the two sides; or, as one of the processes, time one of them."""
    args = parse(argv)
    if args.write:
        write_random_model(args.write)
        return
    if args.side:
        print(json.dumps(measure(args.side, Job(args.base, args.resolution, args.steps), args.started)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        base = args.base or BASE
        if args.size == "sd15" and not args.base:
            base = Path(scratch) / "model"
            # In a process of its own, whose memory the timed ones do not inherit.
            subprocess.run([sys.executable, "-m", "tools.bench_sample", "--write", str(base)], check=True)
        print(f"{base.name}, {count_of(args.steps, 'step')}, {count_of(os.cpu_count() or 1, 'core')}", flush=True)
        compare(base, args, Path(scratch))


if __name__ == "__main__":
    main()

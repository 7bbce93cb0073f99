"""Time a training step: ours, and one of diffusers and peft on PyTorch, on this CPU; or ours on an Ascend card.

    python -m tools.bench_step                     # the embedded base's size; needs tests/requirements.txt
    python -m tools.bench_step --size sd15         # Stable Diffusion 1.5 at 512 px
    python -m tools.bench_step --size sdxl --pairs 1 --steps 2    # SDXL base at 512 px
    python -m tools.bench_step --size if1 --pairs 1 --steps 2     # stage I of DeepFloyd IF, M, at 64 px
    python -m tools.bench_step --method full
    python -m tools.bench_step --processes 2       # two of ours beside one of the peer with the rows of both
    python -m tools.bench_step --size sdxl --resolution 1024 --gradient_checkpointing --only ours --steps 1
    python -m tools.bench_step --size sdxl --resolution 1024 --mixed_precision fp16 --device Ascend    # on a card
    python -m tools.bench_step --size sd15-half --resolution 256 --method full --processes 2 --zero_stage 1 --only ours

Each side runs in fresh processes, in turns. Both have the same weights and rows in float32: one picture of the subject
and one of the class, latents and embeddings made beforehand, AdamW, gradients clipped to norm 1. So both have the same
loss, and that is checked. With --processes each of ours takes two rows of its own, and its memory is that of all.
PyTorch gets a thread for every core; MindSpore's threads are what it takes by itself. On an Ascend card only ours is
timed, and its memory on the card is told beside the process's.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.diffusion import NoiseSchedule, NoiseScheduleSpec, epsilon_at
from dreambooth_ms.errors import count_of
from dreambooth_ms.formats.model_config import read_unet_config, write_scheduler_config, write_unet_config
from dreambooth_ms.models.specs import SD_15_UNET, SDXL_UNET, UNetSpec
from dreambooth_ms.processes.group import ALONE, Processes, run_in_group
from dreambooth_ms.processes.launch import find_launch
from dreambooth_ms.randomness import generator, standard_normal

# MindSpore and PyTorch are imported by the processes that are timed, each its own. A process inherits the peak memory
# of the one that started it, so this one stays small.

BASE = Path(__file__).parents[1] / "checkpoints" / "tiny-shapes"

SEED = 0
TEXT_TOKENS = 77
RANK, TARGETS = 4, ["to_q", "to_k", "to_v", "to_out.0"]
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1e-2, 1.0
SAME_LOSS = 1e-3
"""How far the losses of the first step may differ, as a part of the loss; sums are taken in another order."""


IF_1_M = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [192, 384, 576, 768],
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "cross_attention_dim": 768,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
"""UNet of DeepFloyd IF's first stage, M: 371,605,830 parameters. The widths are from memory of its config.json."""


@dataclass(frozen=True)
class Size:
    """A UNet and the pictures that it is made for."""

    unet: UNetSpec
    resolution: int
    """Side of the pictures, in pixels."""
    downsampling: int
    """Pixels of a picture per latent, along one side."""


SIZES = {
    "tiny": Size(
        read_unet_config(json.loads((BASE / "unet" / "config.json").read_text(encoding="utf-8"))),
        resolution=64,
        downsampling=4,
    ),
    "sd15": Size(SD_15_UNET, resolution=512, downsampling=8),
    "sd15-half": Size(
        replace(SD_15_UNET, block_out_channels=tuple(width // 2 for width in SD_15_UNET.block_out_channels)),
        resolution=512,
        downsampling=8,
    ),
    "sdxl": Size(SDXL_UNET, resolution=512, downsampling=8),
    "if1": Size(read_unet_config(IF_1_M), resolution=64, downsampling=1),
}
"""`tiny` is the size of the embedded base; `sd15-half` has half the widths of SD 1.5."""


@dataclass(frozen=True)
class Job:
    """What is timed."""

    unet: UNetSpec
    latent_size: int
    """Height and width of the latents."""
    method: str
    """lora: a small update beside frozen weights. full: all weights."""
    steps: int
    """Steps timed after the first."""
    mixed_precision: str = "no"
    """no: float32. fp16: half precision with loss scaling; the peer by autocast and GradScaler."""
    processes: int = 1
    """Processes of ours, of which each takes two rows; the peer takes all rows in one."""
    gradient_checkpointing: bool = False
    """Whether the backward pass computes activations again."""
    zero_stage: int = 0
    """1: each process of ours keeps a part of the optimiser's state."""
    whole_attention: bool = False
    """Whether ours computes the scores of each attention at once, in place of slices."""
    device: str = "CPU"
    """Of ours: CPU or Ascend."""
    jit_level: str | None = None
    """Of ours; None leaves it to MindSpore."""


@dataclass(frozen=True)
class Rows:
    """B rows of a step: pictures of the subject, and as many of the class after them."""

    latents: np.ndarray
    """(B, C, h, w)."""
    noise: np.ndarray
    """(B, C, h, w)."""
    timesteps: np.ndarray
    """(B,) int32."""
    text: np.ndarray
    """(B, S, E)."""
    pooled: np.ndarray
    """(B, P) pooled text; (B, 0) for a UNet that reads none."""
    add_time_ids: np.ndarray
    """(B, 6) numbers of the pictures; (B, 0) likewise."""


@dataclass(frozen=True)
class Side:
    """A training that is ready for its first step."""

    take: Callable[[Rows, int], tuple[float, float]]
    """Takes the step with this number, counted from 1; returns the loss and the norm of the gradients."""
    trained: Mapping[str, Callable[[], np.ndarray]]
    """What is trained, by name; each reads its present value."""


def draw_rows(job: Job, step: int, parts: Sequence[int]) -> Rows:
    """The rows of a step: of all these parts, the subject's before those of the class."""
    drawn = [vars(_draw_part(job, step + 1000 * part)) for part in parts]
    return Rows(*(np.concatenate([part[name][row : row + 1] for row in (0, 1) for part in drawn]) for name in drawn[0]))


def _draw_part(job: Job, step: int) -> Rows:
    """One row of the subject, and one of the class."""
    latent_shape = (2, job.unet.in_channels, job.latent_size, job.latent_size)
    pooled_width = (job.unet.projection_class_embeddings_input_dim or 0) - 6 * (job.unet.addition_time_embed_dim or 0)
    sizes = [[1024, 768, 0, 17, 512, 512], [512, 512, 0, 0, 512, 512]] if pooled_width else [[], []]
    return Rows(
        standard_normal(latent_shape, SEED, "bench latents", step),
        standard_normal(latent_shape, SEED, "bench noise", step),
        generator(SEED, "bench timesteps", step).integers(1000, size=2, dtype=np.int32),
        standard_normal((2, TEXT_TOKENS, job.unet.text_width), SEED, "bench text", step),
        standard_normal((2, pooled_width), SEED, "bench pooled", step),
        np.array(sizes, np.float32),
    )


def start_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of a weight before the first step: a function of its public name, the same on both sides."""
    if len(shape) == 1:
        return np.full(shape, 1.0 if name.endswith(".weight") else 0.0, np.float32)
    if name.endswith("lora_B.weight"):
        return np.zeros(shape, np.float32)
    # Uniform with variance 1 / (3 fan_in), from which PyTorch's layers start.
    value = generator(SEED, f"bench {name}").random(shape, dtype=np.float32)
    value -= 0.5
    value *= 2 / np.sqrt(np.float32(np.prod(shape[1:])))
    return value


def build_ours(job: Job, mark: Callable[[str], None], processes: Processes = ALONE) -> Side:
    """The step of this toolkit, from the parts that `dreambooth-ms train` puts together."""
    from dreambooth_ms.runtime.collective import SumOverProcesses
    from dreambooth_ms.runtime.device import compute_dtype, set_up_device

    if processes.count == 1:
        set_up_device(job.device, 0, jit_level=job.jit_level)
    if job.whole_attention:
        from dreambooth_ms.ops import attention

        attention.MAX_SCORES = sys.maxsize

    from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
    from dreambooth_ms.adapters.precision import compute_in
    from dreambooth_ms.config.train import LossScalingConfig
    from dreambooth_ms.data.batches import Batch
    from dreambooth_ms.data.conditioning import PromptText, conditioning
    from dreambooth_ms.data.records import CLASS, INSTANCE
    from dreambooth_ms.models.parameters import public_parameters
    from dreambooth_ms.models.unet import Segments, UNet2DConditionModel
    from dreambooth_ms.training.optimisers import AdamW, Hyperparameters, Optimiser, ShardedOptimiser
    from dreambooth_ms.training.step import DiffusionLoss, LossScaler, TrainStep

    mark("imported")
    unet = UNet2DConditionModel(job.unet)
    layers = inject_lora(unet, RANK, float(RANK), TARGETS) if job.method == "lora" else {}
    named = public_parameters(unet)
    for name, public in named.items():
        if not name.endswith(".lora_scale"):
            public.write(start_value(name, public.shape))
    trainables = lora_trainables(layers) if layers else [public.parameter for public in named.values()]
    compute_in(unet, compute_dtype(job.mixed_precision))
    scaler = LossScaler(LossScalingConfig()) if job.mixed_precision == "fp16" else None

    def make_optimiser(start: int = 0, stop: int | None = None) -> Optimiser:
        return AdamW(trainables[start:stop], Hyperparameters(weight_decay=WEIGHT_DECAY))

    optimiser = ShardedOptimiser(trainables, make_optimiser, processes) if job.zero_stage else make_optimiser()
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec())
    segments = Segments(unet) if job.gradient_checkpointing else None
    sum_gradients = SumOverProcesses() if processes.count > 1 else None
    step_cell = TrainStep(DiffusionLoss(unet), trainables, optimiser, MAX_GRAD_NORM, sum_gradients, scaler, segments)

    def take(rows: Rows, step: int) -> tuple[float, float]:
        columns = replace(epsilon_at(schedule, rows.timesteps), weight=np.full(2, 1 / processes.count))
        prompts = [PromptText(*row) for row in zip(rows.text, rows.pooled, strict=True)]
        read = conditioning(prompts, list(rows.add_time_ids))
        batch = Batch.of(columns, rows.latents, rows.noise, read, (INSTANCE, CLASS))
        optimiser.prepare(step, LEARNING_RATE)
        if step == 1 and processes.count > 1:
            step_cell.compile_for(batch.tensors())
        processes.wait_for_all(f"step {step}")
        loss, _, norm = step_cell.take([batch.tensors()])
        losses = processes.exchange(f"the loss of step {step}", float(loss.asnumpy()))
        return sum(losses), float(norm.asnumpy())

    return Side(take, {parameter.name: parameter.asnumpy for parameter in trainables})


def build_peer(job: Job, mark: Callable[[str], None], processes: Processes = ALONE) -> Side:
    """The same step as diffusers' DreamBooth scripts take it; always in one process."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    mark("imported")
    torch.set_num_threads(os.cpu_count() or 1)
    unet = UNet2DConditionModel.from_config(write_unet_config(job.unet))
    if job.method == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    if job.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    trainables = {}
    for peft_name, parameter in unet.named_parameters():
        name = peft_name.replace(".base_layer.", ".").replace(".default.", ".")
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(start_value(name, tuple(parameter.shape))))
        if parameter.requires_grad:
            trainables[name] = parameter
    optimiser = torch.optim.AdamW(trainables.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = DDPMScheduler.from_config(write_scheduler_config(NoiseScheduleSpec()))
    half = job.mixed_precision == "fp16"
    scaler = torch.amp.GradScaler("cpu", enabled=half)

    def take(rows: Rows, step: int) -> tuple[float, float]:
        latents, noise, timesteps, text, pooled, sizes = map(torch.from_numpy, vars(rows).values())
        added = {"text_embeds": pooled, "time_ids": sizes} if sizes.numel() else None
        noisy = scheduler.add_noise(latents, noise, timesteps.long())
        with torch.autocast("cpu", torch.float16, enabled=half):
            prediction = unet(noisy, timesteps, text, added_cond_kwargs=added).sample.float()[:, : noise.shape[1]]
        of_subject, of_class = prediction.chunk(2)
        noise_of_subject, noise_of_class = noise.chunk(2)
        loss = torch.nn.functional.mse_loss(of_subject, noise_of_subject)
        loss = loss + torch.nn.functional.mse_loss(of_class, noise_of_class)
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        norm = torch.nn.utils.clip_grad_norm_(trainables.values(), MAX_GRAD_NORM)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        return loss.item(), norm.item()

    def reader(parameter: torch.nn.Parameter) -> Callable[[], np.ndarray]:
        return lambda: parameter.detach().numpy()

    return Side(take, {name: reader(parameter) for name, parameter in trainables.items()})


SIDES: dict[str, Callable[..., Side]] = {"ours": build_ours, "peer": build_peer}


def measure(side: str, job: Job, started: float, processes: Processes = ALONE) -> dict[str, Any]:
    """Time one side in this process.

    Args:
        side: a key of `SIDES`.
        job: what to time.
        started: when this process was started, in seconds of the monotonic clock.
        processes: those that share a step.

    Returns:
        `imported`, `built`, `first_step`: when each was done, in seconds after the start; `times`: seconds of every
        step, the first included; `losses`; `peak_memory`: bytes; `card_memory`: bytes at most on an Ascend card;
        `expected_memory`: in words, of ours.

    Raises:
        SystemExit: a loss or gradient is NaN or infinity, or a weight stayed as it was; such a step is not timed.
    """
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks[name] = time.monotonic() - started

    training = SIDES[side](job, mark, processes)
    parts = [processes.rank] if side == "ours" else range(job.processes)
    mark("built")
    before = {name: beginning(read()) for name, read in training.trained.items()}
    times, losses = [], []
    for step in range(1, job.steps + 2):
        rows = draw_rows(job, step, parts)
        begun = time.monotonic()
        loss, norm = training.take(rows, step)
        times.append(time.monotonic() - begun)
        losses.append(loss)
        if step == 1:
            mark("first_step")
        if not (np.isfinite(loss) and 0 < norm < np.inf):
            raise SystemExit(f"{side}, step {step}: the loss is {loss}, the norm of the gradients {norm}")
    peak = peak_memory(resource.getrusage(resource.RUSAGE_SELF))
    unchanged = [name for name, read in training.trained.items() if (beginning(read()) == before[name]).all()]
    if unchanged:
        raise SystemExit(f"{side}: {len(unchanged)} of {len(before)} weights did not change, such as {unchanged[0]}")
    expected = expected_memory(job) if side == "ours" else ""
    report = {**marks, "times": times, "losses": losses, "peak_memory": peak, "expected_memory": expected}
    return report | ({"card_memory": card_memory()} if job.device == "Ascend" else {})


def card_memory() -> int:
    """The most bytes that MindSpore has had on the card at one time."""
    import mindspore as ms

    peak: int = ms.runtime.max_memory_allocated()
    return peak


def expected_memory(job: Job) -> str:
    """What `dreambooth-ms train` says of such a step before it begins."""
    from dreambooth_ms.models.parameter_shapes import unet_shapes
    from dreambooth_ms.training.memory import FLOAT32, Workload, estimate, ranks_of

    shapes = unet_shapes(job.unet)
    width = FLOAT32 if job.mixed_precision == "no" else 2
    work = Workload(
        unet=job.unet,
        ranks=[ranks_of(shapes, RANK, TARGETS) if job.method == "lora" else ranks_of(shapes, None)],
        rows=2,
        latent_height=job.latent_size,
        latent_width=job.latent_size,
        bytes_of_number=width,
        recomputed=job.gradient_checkpointing,
        processes=job.processes,
        shares_optimiser=job.zero_stage > 0,
    )
    return str(estimate(work))


def beginning(value: np.ndarray) -> np.ndarray:
    """A few numbers of a weight, enough to see whether it has changed."""
    return value.reshape(-1)[:16].copy()


def peak_memory(usage: resource.struct_rusage) -> int:
    """Peak resident memory of a process, in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_together(side: str, job: Job, started: float) -> int:
    """Time ours in one of several processes; the first prints the report, with the memory of all."""
    from dreambooth_ms.runtime.collective import collective_operations
    from dreambooth_ms.runtime.device import set_up_device

    def work(processes: Processes) -> int:
        set_up_device(job.device, 0, jit_level=job.jit_level)
        with collective_operations(processes.launch):
            reports = processes.exchange("the report", measure(side, job, started, processes))
        if processes.is_first:
            print(json.dumps({**reports[0], "peak_memory": sum(report["peak_memory"] for report in reports)}))
        return 0

    return run_in_group(find_launch(os.environ), work, lambda line: print(line, file=sys.stderr))


def places(count: int) -> list[dict[str, str]]:
    """The environments of so many processes, as mpirun sets them."""
    common = {
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(count),
        "PMIX_NAMESPACE": f"bench {os.getpid()}",
    }
    return [{**common, "OMPI_COMM_WORLD_RANK": str(rank)} for rank in range(count)] if count > 1 else [{}]


def run_child(command: Sequence[str], processes: int = 1) -> dict[str, Any]:
    """Run a process, or several at once, telling them when they were started; returns the first's last line of JSON.

    Raises:
        SystemExit: the process failed, or said nothing.
    """
    started = ["--started", repr(time.monotonic())]
    first, *others = places(processes)
    running = [
        subprocess.Popen([*command, *started], stdout=subprocess.DEVNULL, env=os.environ | own) for own in others
    ]
    done = subprocess.run([*command, *started], stdout=subprocess.PIPE, text=True, check=False, env=os.environ | first)
    for process in running:
        process.wait()
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not said:
        raise SystemExit(f"{' '.join(command)}: no measurement; status {done.returncode}")
    report: dict[str, Any] = json.loads(said[-1])
    return report


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one process as the table shows them."""
    first, *others = report["times"]
    step = statistics.median(others)
    return {
        "step, s": step,
        "first step done after, s": report["first_step"],
        "  imports, s": report["imported"],
        "  building, s": report["built"] - report["imported"],
        "  compiling, warming up, s": first - step,
        "peak memory, GiB": report["peak_memory"] / 2**30,
        **({"  of the card, GiB": report["card_memory"] / 2**30} if "card_memory" in report else {}),
    }


def ratio_table(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> str:
    """Medians over all pairs (ours, peer) of every figure, their ratio, and the ratio within each pair."""
    names = list(pairs[0][0])
    width = max(map(len, names))
    lines = [f"{'':{width}} {'ours':>10} {'peer':>10}   ours / peer (within each pair)"]
    for name in names:
        ours, peer = (statistics.median(pair[side][name] for pair in pairs) for side in (0, 1))
        within = " ".join(ratio(pair[0][name], pair[1][name]) for pair in pairs)
        lines.append(f"{name:{width}} {ours:10.3f} {peer:10.3f}   {ratio(ours, peer)} ({within})")
    return "\n".join(lines)


def ratio(ours: float, peer: float) -> str:
    """Ours over theirs; a dash where theirs is nothing or, being a difference of timings, below it."""
    return f"{ours / peer:.2f}" if peer > 0 else "-"


def check_same_work(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> None:
    """Both sides computed the same in their first step.

    Raises:
        SystemExit: their losses differ.
    """
    first, expected = ours["losses"][0], peer["losses"][0]
    if abs(first - expected) > SAME_LOSS * expected:
        raise SystemExit(f"the losses of the first step are {first} and {expected}: the two sides do not do the same")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Job]:
    """The command line, and the job it describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="the UNet (default: tiny)")
    parser.add_argument("--method", choices=["lora", "full"], default="lora", help="what is trained (default: lora)")
    parser.add_argument("--mixed_precision", choices=["no", "fp16"], default="no", help="of both sides (default: no)")
    parser.add_argument("--processes", type=int, default=1, help="processes of ours (default: 1)")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels (default: the UNet's own)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--zero_stage", type=int, choices=[0, 1], default=0, help="of several processes of ours")
    parser.add_argument("--whole_attention", action="store_true", help="ours without slices of attention")
    parser.add_argument("--device", choices=["CPU", "Ascend"], default="CPU", help="of ours (default: CPU)")
    parser.add_argument("--jit_level", choices=["O0", "O1"], help="of ours (default: MindSpore's own)")
    parser.add_argument("--only", choices=list(SIDES), help="measure one side, where the other does not fit")
    parser.add_argument("--pairs", type=int, default=2, help="processes of each side (default: 2)")
    parser.add_argument("--steps", type=int, default=10, help="steps timed after the first (default: 10)")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    resolution = args.resolution or size.resolution
    step = size.downsampling * 2 ** (len(size.unet.block_out_channels) - 1)
    if resolution < 1 or resolution % step:
        parser.error(f"--resolution: expected a multiple of {step}, got {resolution}")
    if args.pairs < 1 or args.steps < 1 or args.processes < 1:
        parser.error("--pairs, --steps and --processes: expected at least 1")
    if args.device == "Ascend" and args.only == "peer":
        parser.error("--only peer: PyTorch's side runs on a CPU; leave out --device Ascend")
    if args.device == "Ascend":
        args.only = "ours"
    if args.zero_stage and args.processes == 1:
        parser.error("--zero_stage: expected more than one of --processes")
    if args.whole_attention:
        # The sources are the same, so the key would be: what is compiled is neither kept nor found.
        os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"
    return args, Job(
        size.unet,
        resolution // size.downsampling,
        args.method,
        args.steps,
        args.mixed_precision,
        args.processes,
        args.gradient_checkpointing,
        args.zero_stage,
        args.whole_attention,
        args.device,
        args.jit_level,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Time both sides in turns and print the table; or, as one of its processes, time one side."""
    args, job = parse(argv)
    if args.side == "ours" and job.processes > 1:
        sys.exit(measure_together(args.side, job, args.started))
    if args.side:
        print(json.dumps(measure(args.side, job, args.started)), flush=True)
        return
    arguments = list(sys.argv[1:] if argv is None else argv)
    precision = "float32" if job.mixed_precision == "no" else job.mixed_precision
    size = f"latents {job.latent_size} x {job.latent_size}"
    rows = f"{2 * job.processes} rows, of ours in {job.processes} processes" if job.processes > 1 else "2 rows"
    where = count_of(os.cpu_count() or 1, "core") if job.device == "CPU" else job.device
    print(f"{args.size}, {args.method}, {precision}, {rows}, {size}, {where}", flush=True)
    sides = [args.only] if args.only else list(SIDES)
    runs = []
    for _ in range(args.pairs):
        command = [sys.executable, "-m", "tools.bench_step", *arguments, "--side"]
        reports = [run_child([*command, side], job.processes if side == "ours" else 1) for side in sides]
        for side, report in zip(sides, reports, strict=True):
            losses = " ".join(f"{loss:.4f}" for loss in report["losses"])
            print(f"{side}: {figures(report)['step, s']:.3f} s a step; losses {losses}", flush=True)
            if report.get("expected_memory"):
                print(report["expected_memory"], flush=True)
        if not args.only:
            check_same_work(*reports)
        runs.append([figures(report) for report in reports])
    if args.only:
        print("\n".join(f"{name}: {statistics.median(run[0][name] for run in runs):.3f}" for name in runs[0][0]))
    else:
        print(ratio_table([(ours, peer) for ours, peer in runs]))


if __name__ == "__main__":
    main()

"""Time a whole run, from the start of the process to the written adapter: ours, and the same job with diffusers' parts.

    python -m tools.bench_run                       # on the embedded base; needs tests/requirements.txt
    python -m tools.bench_run --base FOLDER --resolution 32
    python -m tools.bench_run --compile_cache warm  # ours with its graphs from a run before

The job is LoRA with prior preservation: sample the class pictures, encode all pictures and prompts once, train, save.
The peer is one script of diffusers' pipeline and peft's LoRA on PyTorch, with a thread for every core. The two run in
turns, each time in a fresh process and a fresh folder. Our compile cache is empty at the start of a run, unless it is
to be warm: then a run that is not timed goes before. Both have the same number of pictures, denoising steps, rows,
training steps and trained weights; their draws are their own.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.data.pictures import find_pictures, frame_of, open_picture, resize_and_crop, to_array
from dreambooth_ms.errors import count_of
from dreambooth_ms.formats.files.open import read_tensors
from tools.bench_step import MAX_GRAD_NORM, RANK, TARGETS, WEIGHT_DECAY, peak_memory, ratio_table

# MindSpore and PyTorch are imported by the processes that are timed, each its own. A process inherits the peak memory
# of the one that started it, so this one stays small.

INSTANCE_PROMPT, CLASS_PROMPT = "a photo of a sks star", "a photo of a star"
LEARNING_RATE = 5e-4

CLASS_PICTURES, ENCODING, TRAINING, FIRST_LOSS, WROTE = (
    "class pictures:", "encoding pictures:", "training ", "instance=", "wrote "
)  # fmt: skip
PARTS = (
    ("start, s", CLASS_PICTURES),
    ("class pictures, s", ENCODING),
    ("encoding, building, s", TRAINING),
    ("first step, s", FIRST_LOSS),
    ("other steps, saving, s", WROTE),
)
"""Parts of a run in their order, each with the words on stderr that end it; both sides say these."""


@dataclass(frozen=True)
class Job:
    """What is timed."""

    base: Path
    instance_data_dir: Path
    resolution: int
    """Side of the pictures, in pixels."""
    steps: int
    batch_size: int
    """Pictures of the subject per step; as many of the class come with them."""
    num_class_images: int
    sample_batch_size: int
    """Class pictures sampled at a time."""
    infer_steps: int
    """Denoising steps for each class picture."""
    guidance_scale: float

    def flags(self) -> list[str]:
        """The job as flags of this tool."""
        return [part for name, value in vars(self).items() for part in (f"--{name}", str(value))]


def our_command(job: Job, folder: Path) -> list[str]:
    """The command line of our run, which leaves its adapter in this folder."""
    values = vars(job) | {
        "pretrained_model_name_or_path": job.base,
        "instance_prompt": INSTANCE_PROMPT,
        "class_prompt": CLASS_PROMPT,
        "class_data_dir": folder / "class",
        "output_dir": folder,
        "train_batch_size": job.batch_size,
        "max_train_steps": job.steps,
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "adam_weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": 0,
        "device_target": "CPU",
    }
    flags = [part for name in values.keys() - {"base", "steps", "batch_size"} for part in (f"--{name}", values[name])]
    switches = ["--with_prior_preservation", "--center_crop", "--lora_target_modules", *TARGETS]
    return [sys.executable, "-m", "dreambooth_ms.cli.main", "train", *map(str, flags), *switches]


def peer_command(job: Job, folder: Path) -> list[str]:
    """The command line of the peer's run."""
    return [sys.executable, "-m", "tools.bench_run", *job.flags(), "--peer_folder", str(folder)]


SIDES = {"ours": our_command, "peer": peer_command}


def run_peer(job: Job, folder: Path) -> None:
    """The job with diffusers' parts, in this process: adapter and class pictures go into the folder."""
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from tqdm import tqdm

    torch.set_num_threads(os.cpu_count() or 1)
    pipeline = StableDiffusionPipeline.from_pretrained(job.base, torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    unet, vae = pipeline.unet, pipeline.vae
    sample_class_pictures(pipeline, job, folder / "class")

    pictures = [find_pictures(path)[0] for path in (job.instance_data_dir, folder / "class")]
    with torch.no_grad():
        # A picture's posterior is kept; a step draws from it.
        posteriors = {
            path: vae.encode(torch.from_numpy(read_square(path, job.resolution))).latent_dist
            for path in tqdm([path for group in pictures for path in group], desc=ENCODING[:-1], unit="picture")
        }
        texts = [pipeline.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in (INSTANCE_PROMPT, CLASS_PROMPT)]
    text = torch.cat([one.expand(job.batch_size, -1, -1) for one in texts])
    scaling_factor = vae.config.scaling_factor
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    del pipeline, vae

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="gaussian"))
    unet.train()
    trainables = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainables, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    print(f"{TRAINING}{sum(parameter.numel() for parameter in trainables):,} parameters", file=sys.stderr, flush=True)
    rows = [endless_rows(group, job.batch_size) for group in pictures]
    with tqdm(total=job.steps, desc="training", unit="step") as bar:
        for _ in range(job.steps):
            paths = [path for group in rows for path in next(group)]
            latents = torch.cat([posteriors[path].sample() for path in paths]) * scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(paths),))
            prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
            of_instance, of_class = ((prediction - target) ** 2).chunk(2)
            loss = of_instance.mean() + of_class.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainables, MAX_GRAD_NORM)
            optimiser.step()
            optimiser.zero_grad()
            bar.set_postfix(instance=f"{of_instance.mean().item():.4f}")
            bar.update()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    print(f"{WROTE}{folder / FILE_NAME}", file=sys.stderr, flush=True)


def sample_class_pictures(pipeline: Any, job: Job, folder: Path) -> None:
    """Sample the class pictures with diffusers' pipeline, some at a time."""
    from tqdm import tqdm

    folder.mkdir()
    with tqdm(total=job.num_class_images, desc=CLASS_PICTURES[:-1], unit="picture") as bar:
        for start in range(0, job.num_class_images, job.sample_batch_size):
            count = min(job.sample_batch_size, job.num_class_images - start)
            sampled: list[Image.Image] = pipeline(
                [CLASS_PROMPT] * count,
                height=job.resolution,
                width=job.resolution,
                num_inference_steps=job.infer_steps,
                guidance_scale=job.guidance_scale,
            ).images
            for number, picture in enumerate(sampled, start):
                picture.save(folder / f"{number}.png")
            bar.update(count)


def read_square(path: Path, resolution: int) -> Any:
    """The centre of a picture as the autoencoder takes it: float32 (1, 3, H, W) in [-1, 1]."""
    picture = open_picture(path)
    square = resize_and_crop(picture, frame_of(picture.size, (resolution, resolution)), "lanczos")
    return to_array(square).transpose(2, 0, 1)[None].copy()


def endless_rows(paths: Sequence[Path], count: int) -> Iterator[list[Path]]:
    """So many of a group's pictures at a time, in turn."""
    start = 0
    while True:
        yield [paths[(start + i) % len(paths)] for i in range(count)]
        start += count


def without_torch(folder: Path) -> dict[str, str]:
    """The environment in which our side runs: PyTorch, which those who use the toolkit have not, is not found.

    transformers and tensorboardX would import it, which takes two seconds. A module in `folder` stands before it.
    """
    folder.mkdir()
    (folder / "torch.py").write_text('raise ModuleNotFoundError("No module named torch", name="torch")')
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]), "USE_TORCH": "0"}


def watch(command: Sequence[str], variables: Mapping[str, str]) -> dict[str, float]:
    """Run a process to its end; returns seconds of the whole and of its parts, and its peak memory in GiB.

    Args:
        command: its command line.
        variables: of its environment, beside this process's own; those of our compile cache are only these.

    Raises:
        SystemExit: it failed, or ended without saying what ends one of the parts.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MS_COMPILER_CACHE")}
    environment |= variables
    started = last = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None, "a pipe was asked for"
    stderr = process.stderr.fileno()
    said, parts, awaited = "", {}, list(PARTS)
    while chunk := os.read(stderr, 1 << 16):
        said += chunk.decode(errors="replace")
        now = time.monotonic()
        while awaited and awaited[0][1] in said:
            part, words = awaited.pop(0)
            _, _, unread = said.partition(words)
            parts[part], last = now - last, now
            said = unread
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    ended = time.monotonic()
    if process.returncode or awaited:
        missing = f", and never said {awaited[0][1]!r}" if awaited else ""
        raise SystemExit(f"{said}\n{' '.join(command)}: ended with status {process.returncode}{missing}")
    return {
        "whole run, s": ended - started,
        **{f"  {part}": seconds for part, seconds in parts.items()},
        "  end, s": ended - last,
        "peak memory, GiB": peak_memory(usage) / 2**30,
    }


def check_same_work(results: Mapping[str, Path], job: Job) -> None:
    """Both runs drew all class pictures and trained as many weights.

    Raises:
        SystemExit: they did not.
    """
    work = {}
    for side, folder in results.items():
        adapter, _ = read_tensors(folder / FILE_NAME)
        work[side] = (len(find_pictures(folder / "class")[0]), sorted(value.shape for value in adapter.values()))
    if work["ours"] != work["peer"] or work["ours"][0] != job.num_class_images:
        raise SystemExit(f"the two sides do not do the same: class pictures and weights {work}")


def time_pair(job: Job, warm: bool) -> tuple[dict[str, float], dict[str, float]]:
    """One run of each side, ours first; if `warm`, with the compiled graphs of a run before."""
    figures: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as scratch:
        ours = {"MS_COMPILER_CACHE_PATH": str(Path(scratch) / "graphs")} | without_torch(
            Path(scratch) / "without_torch"
        )
        if warm:
            with TemporaryDirectory() as folder:
                watch(our_command(job, Path(folder)), ours)
        results = {side: Path(scratch) / side for side in SIDES}
        for side, result in results.items():
            result.mkdir()
            figures[side] = watch(SIDES[side](job, result), ours if side == "ours" else {})
            print(f"{side}: {figures[side]['whole run, s']:.1f} s", flush=True)
        check_same_work(results, job)
    return figures["ours"], figures["peer"]


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Job]:
    """The command line, and the job it describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base, subject = Path("checkpoints/tiny-shapes"), Path("demo/subject")
    parser.add_argument("--base", type=Path, default=base, help=f"model folder (default: {base})")
    parser.add_argument(
        "--instance_data_dir", type=Path, default=subject, help=f"the subject's pictures (default: {subject})"
    )
    for name, kind, default, meaning in (
        ("resolution", int, 64, "side of the pictures in pixels"),
        ("steps", int, 100, "training steps"),
        ("batch_size", int, 4, "pictures of the subject per step; as many of the class come with them"),
        ("num_class_images", int, 24, "class pictures"),
        ("sample_batch_size", int, 8, "class pictures sampled at a time"),
        ("infer_steps", int, 25, "denoising steps for each class picture"),
        ("guidance_scale", float, 4.0, "classifier-free guidance for the class pictures"),
        ("pairs", int, 1, "runs of each side"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} (default: {default})")
    choices = ["cold", "warm"]
    parser.add_argument("--compile_cache", choices=choices, default="cold", help="our cache (default: cold)")
    parser.add_argument("--peer_folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not (args.base / "model_index.json").is_file():
        parser.error(f"--base {args.base}: no model there; make the embedded one with python -m tools.train_tiny_base")
    if args.pairs < 1 or args.steps < 2:
        parser.error("--pairs: expected at least 1; --steps: at least 2")
    return args, Job(**{name: getattr(args, name) for name in Job.__dataclass_fields__})


def main(argv: Sequence[str] | None = None) -> None:
    """Time both sides in turns and print the table; or, as the peer's process, do the peer's run."""
    args, job = parse(argv)
    if args.peer_folder:
        run_peer(job, args.peer_folder)
        return
    print(
        f"{job.base}: {count_of(job.num_class_images, 'class picture')} in {count_of(job.infer_steps, 'step')}, "
        f"{count_of(job.steps, 'training step')} of "
        f"{2 * job.batch_size} rows, {job.resolution} px, {count_of(os.cpu_count() or 1, 'core')}, "
        f"compile cache {args.compile_cache}",
        flush=True,
    )
    pairs = [time_pair(job, args.compile_cache == "warm") for _ in range(args.pairs)]
    print(ratio_table(pairs))


if __name__ == "__main__":
    main()

"""What a run will need, from its configuration, and what is there."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dreambooth_ms.adapters.cross_attention import CROSS_ATTENTION
from dreambooth_ms.adapters.reweighted import CHANGES
from dreambooth_ms.atomic import check_room, write_bytes
from dreambooth_ms.cli.output import tell
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.config.ranges import memory_size
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import DeviceError, Tell, WeightError, count_of
from dreambooth_ms.formats.files.stored import total_bytes
from dreambooth_ms.models.parameter_shapes import text_shapes, unet_shapes
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.runtime.ascend import card_memory
from dreambooth_ms.runtime.compile_cache import default_folder
from dreambooth_ms.runtime.device import Formulation, formulation
from dreambooth_ms.training import memory
from dreambooth_ms.training.checkpoint import checkpoint_folders
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.methods import updates_of
from dreambooth_ms.weights.bundle import ModelBundle


def check_expected_memory(
    config: TrainConfig, folder: ModelBundle, processes: Processes, tell: Tell = tell
) -> Mapping[str, int]:
    """Say how much memory a step will need, and return bytes by part. Raises DeviceError if it cannot fit, with what
    would need less. `--max_device_memory` is of each process. All processes must ask at the same time."""
    run, expected = config.run, memory.estimate(_workload(config, folder, processes.count))
    tell(str(expected))
    read = (math.prod(shape) for one in folder.text for shape in text_shapes(one.spec).values())
    if (reading := memory.FLOAT32 * sum(read)) > expected.total:
        tell(f"expected memory before that, while prompts are read: {memory.gib(reading)} GiB")
    advice = [] if run.gradient_checkpointing else ["--gradient_checkpointing"]
    advice += [f"a --train_batch_size below {run.train_batch_size}"] if run.train_batch_size > 1 else []
    advice += [f"a --resolution below {config.data.resolution}"]
    advice += ["--method lora"] if config.method.method == "full" else []
    # The processes on a machine share its memory, but not that of their cards.
    on_cpu = formulation() is Formulation.CPU
    limit, sharing = (machine_memory(), processes.count_on_this_machine()) if on_cpu else (card_memory(), 1)
    if run.max_device_memory and (size := memory_size(run.max_device_memory)):
        limit, sharing = size, 1
    advice += ["fewer processes on a machine"] if sharing > 1 else []
    if limit and expected.total * sharing > limit:
        each = f" in each of {sharing} processes" if sharing > 1 else ""
        there = f"there are {memory.gib(limit)} GiB"
        raise DeviceError(f"{expected}{each}, and {there}; what needs less: {', '.join(advice)}")
    return expected.parts


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class StepTimes:
    """How long the newest steps of such a run took on this machine, in seconds, kept beside compiled graphs."""

    def __init__(self, config: TrainConfig, base: ModelBundle) -> None:
        work = vars(_workload(config, base, config.processes.num_processes or 1))
        ranks = [sorted(own.items()) for own in work["ranks"]]
        decisive = repr((work | {"ranks": ranks}, config.device, platform.node(), os.cpu_count()))
        graphs = default_folder()
        folder = graphs.parent / "times" if graphs else Path(os.devnull)  # Without a home nothing is kept.
        self._file = folder / f"{hashlib.sha256(decisive.encode()).hexdigest()[:32]}.json"
        self._ends, self.steps, self.compilation = [time.monotonic()], list[float](), 0.0
        with suppress(OSError, ValueError, TypeError):
            self.steps, self.compilation = json.loads(self._file.read_bytes())

    def measure(self, report: StepReport) -> None:
        """A hook: note the end of a step, and of what was done since the last."""
        self._ends.append(time.monotonic())

    def close(self) -> None:
        """Keep the newest 200. What the first took longer than the others is what it was compiled in."""
        first, *others = np.diff(self._ends).tolist() or [0.0]
        if len(others) > 1:
            longest = max(self.compilation, first - float(np.median(others)))
            with suppress(WeightError):
                write_bytes(self._file, json.dumps([(self.steps + others)[-200:], longest]).encode())

    def expected(self, steps: int) -> tuple[str, Mapping[str, Any] | None]:
        """How long so many steps will take, in words and in seconds."""
        if not self.steps:
            return "expected time: not known before a first run with such steps on this machine", None
        low, middle, high = (steps * np.percentile(self.steps, (10, 50, 90))).tolist()
        shown = [tqdm.format_interval(seconds) for seconds in (middle, low, high, self.compilation)]
        return (
            "expected time: {} ({} to {}, as four of five steps took here), and up to {} to compile each size; class "
            "pictures, encoding and validation come on top".format(*shown)
        ), {"seconds": middle, "from": low, "to": high, "compilation": self.compilation, "measured": len(self.steps)}


def check_expected_disk(job: TrainingJob, views: int = 0) -> None:
    """Raise WeightError if checkpoints and result, with the latents of so many views, have no room on the disk."""
    config, base, method, run = job.config, job.base, job.config.method, job.config.run
    work = _workload(config, base, 1)
    trained = work.numbers[1]
    # The weights, once more for other tools, and the state of the optimiser.
    written = memory.FLOAT32 if method.save_precision in (None, "fp32") else 2
    checkpoint = trained * ((1 + int(method.use_ema)) * memory.FLOAT32 + written + work.bytes_of_optimiser)
    result = trained * written
    if method.method == "full":
        texts = method.train_text_encoder or method.skip_save_text_encoder
        networks = ["unet", *(reader.name for reader in base.text if texts)]
        tensors = base.opened().tensors.items()
        result += total_bytes({name: one for name, one in tensors if name.partition(".")[0] not in networks})
    count = job.total // run.checkpointing_steps - job.done // run.checkpointing_steps
    count += bool(config.stopping.early_stop or config.stopping.keep_best)  # After the last step.
    if run.checkpoints_total_limit:
        # An old one goes when the new one is whole, but for the best.
        most = run.checkpoints_total_limit + 1 + bool(config.stopping.keep_best)
        count = min(count, max(most - len(checkpoint_folders(config.output_dir)), 1))
    fewer = ", or keep fewer by --checkpoints_total_limit" if count > 1 else ""
    advice = f"free some for {count_of(count, 'checkpoint') + ' and ' if count else ''}the result{fewer}"
    # Mean and log-variance.
    latents = views * 2 * memory.FLOAT32 * math.prod(base.latent_shape(config.data.resolution, config.data.resolution))
    check_room(config.output_dir, count * checkpoint + result + latents, advice)


FEW_STEPS = 20
"""Fewer have taught no subject; published settings take some hundred."""


def warn_of_little(job: TrainingJob) -> None:
    """Tell what keeps a run from learning anything."""
    run, optimiser, steps = job.config.run, job.config.optimiser, count_of(job.total, "step")
    warmup = optimiser.lr_warmup_steps
    if job.total < FEW_STEPS:
        remedy = "raise --max_train_steps" if run.max_train_steps else "give --max_train_steps"
        tell(f"{steps} in all will hardly teach anything, some hundred are usual; {remedy}")
    if optimiser.lr_scheduler != "constant" and warmup >= job.total and not run.max_train_steps:
        tell(f"--lr_warmup_steps {warmup}: the learning rate never arrives at its value in {steps}")


def _workload(config: TrainConfig, folder: ModelBundle, processes: int) -> memory.Workload:
    method, data, run = config.method, config.data, config.run
    _, height, width = folder.latent_shape(data.resolution, data.resolution)
    prior, groups = config.prior, 1 + config.prior.preserves_class
    readers, shapes = folder.text if config.encodes_text else (), unet_shapes(folder.denoiser.spec)
    networks = [("unet", shapes), *((one.name, text_shapes(one.spec)) for one in readers)]
    if method.method == "lora":
        updates = updates_of(method, folder)
        ranks: list[memory.Ranks] = [
            {layer: own.numbers(shapes[f"{layer}.weight"]) for layer, own in updates.get(name, {}).items()}
            for name, shapes in networks
        ]
    else:
        # New words are next to nothing.
        ends = {"custom_diffusion": CROSS_ATTENTION[method.freeze_model], "textual_inversion": ()}.get(method.method)
        of_unet = memory.ranks_of(shapes, None) if ends is None else dict.fromkeys(memory.ranks_of(shapes, 1, ends))
        ranks = [of_unet, *(memory.ranks_of(own, None) if method.train_text_encoder else {} for _, own in networks[1:])]
    optimiser = "adamw_8bit" if config.optimiser.use_8bit_adam else config.optimiser.optimizer.lower()
    keeps_base = prior.prior_preservation == "base_l2" and method.method != "lora"
    return memory.Workload(
        unet=folder.denoiser.spec,
        text_encoders=[reader.spec for reader in readers],
        ranks=ranks,
        rows=groups * run.train_batch_size,
        latent_height=height,
        latent_width=width,
        bytes_of_number=2 if config.device.mixed_precision in ("fp16", "bf16") else memory.FLOAT32,
        dropout=method.lora_dropout > 0,
        computes_weights=method.adapter in CHANGES,
        on_ascend=formulation() is Formulation.ASCEND,
        recomputed=run.gradient_checkpointing,
        bytes_of_optimiser=memory.OPTIMISER_BYTES[optimiser],
        copies_of_trained=int(method.use_ema) + int(run.gradient_accumulation_steps > 1) + keeps_base,
        answers=prior.prior_preservation == "base_output",
        processes=processes,
        shares_optimiser=config.processes.zero_stage > 0,
    )

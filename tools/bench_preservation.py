"""Compare the forms of prior preservation on the embedded base: a LoRA of the quickstart's subject, with several seeds.

    python -m tools.bench_preservation                          # four forms, three seeds each, as many steps as there
    python -m tools.bench_preservation --forms base_l2 --seeds 1 --flags base_l2_weight=1e-5
    python -m tools.bench_preservation --forms --pairs 100      # how much longer a step takes with base_l2

It prints `evaluate`'s figures on the quickstart's prompts, their mean and range over the seeds. A run that is there
already is not trained again. Times are compared in pairs of steps in one process, since other work goes on.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.runtime.device import set_up_device
from dreambooth_ms.training.methods import METHODS
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
from dreambooth_ms.training.preservation import Penalty
from dreambooth_ms.training.step import DiffusionLoss, TrainStep
from dreambooth_ms.weights.bundle import open_bundle
from tools.bench_methods import BASE, CONFIG, RARE_WORD, Bench, columns, command, table

FORMS: dict[str, dict[str, Any]] = {
    "none": {"with_prior_preservation": False},
    "class_images": {},
    "base_l2": {"prior_preservation": "base_l2"},
    "base_output": {"prior_preservation": "base_output"},
}
"""Form -> what it has otherwise than the quickstart."""


def main() -> None:
    """Run what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each form")
    parser.add_argument("--steps", type=int, default=None, help="None: the quickstart's")
    parser.add_argument("--flags", nargs="*", default=[], help="of all runs, as name=value; they name the folders, too")
    parser.add_argument("--folder", type=Path, default=Path("runs/preservation"), help="where the runs are written")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of steps whose times are compared")
    arguments = parser.parse_args()
    if arguments.pairs:
        set_up_device("CPU", 0)
        print(f"a step with base_l2 takes {step_ratio(arguments.pairs)} times one without")
    if not arguments.forms:
        return
    bench, rows = Bench(arguments.folder, arguments.seeds, arguments.steps), []
    base = bench.pictures_of(BASE, [RARE_WORD])
    for form in arguments.forms:
        own, figures = FORMS[form] | dict(flag.split("=") for flag in arguments.flags), []
        own |= {"config": CONFIG, "class_data_dir": arguments.folder / "class_images", "max_train_steps": bench.steps}
        for seed in range(arguments.seeds):
            run = arguments.folder / "-".join([form, *arguments.flags, str(seed)])
            command("train", {"seed": seed, "output_dir": run, **own})
            figures.append(bench.figures(bench.pictures_of(run, [RARE_WORD]), base))
        rows.append([form, *columns(figures)])
    print(table([["--prior_preservation", "subject similarity", "class drift"], *rows]))


def step_ratio(pairs: int) -> str:
    """Median and quartiles of the ratio of the times of two steps, with base_l2 and without, of two rows."""
    config = load(TrainConfig, ["--config", str(CONFIG)], lambda note: None)
    base, rng = open_bundle(BASE), np.random.default_rng(0)
    unet = base.denoiser.load()
    learner = METHODS["lora"](config.method, base, unet, None, 0)
    latents = rng.standard_normal((2, *base.latent_shape(64, 64))).astype(np.float32)
    text = rng.standard_normal((2, 77, unet.spec.cross_attention_dim)).astype(np.float32)
    batch = [Tensor(one) for one in (latents, np.ones(2, np.float32), latents, np.array([9, 500], np.float32), text)]
    optimiser, times = AdamW(learner.parameters, Hyperparameters()), np.zeros((2, pairs))
    penalties = None, Penalty(config.prior.base_l2_weight, learner)
    steps = [TrainStep(DiffusionLoss(unet), learner.parameters, optimiser, 1.0, penalty=one) for one in penalties]
    optimiser.prepare(1, 1e-5)
    for pair in range(-1, pairs):  # The first one compiles.
        for number, step in enumerate(steps):
            begun = time.perf_counter()
            step(*batch)[0].asnumpy()
            times[number, pair] = time.perf_counter() - begun
    low, middle, high = np.percentile(times[1] / times[0], (25, 50, 75))
    return f"{middle:.3f} ({low:.3f} to {high:.3f}, half of {pairs} pairs; median {np.median(times[0]):.3f} s)"


if __name__ == "__main__":
    main()

"""Compare the methods on the embedded base: each teaches the quickstart's subject, with several seeds.

    python -m tools.bench_methods                     # four methods, three seeds each, as many steps as the quickstart
    python -m tools.bench_methods --methods custom_diffusion --seeds 1 --steps 20 --folder /tmp/methods

It prints the table of docs/methods.md: `evaluate`'s figures on the quickstart's prompts, their mean and range over the
seeds, and the size of what is written. A run that is there already is not trained again.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.cli.evaluate import PURPOSE
from dreambooth_ms.cli.sample import read_prompts
from dreambooth_ms.data.pictures import open_picture
from dreambooth_ms.data.records import Source
from dreambooth_ms.evaluation import Fidelity, load_image_embedder, measure
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import ModelBundle, open_bundle

BASE, SUBJECT, CONFIG = Path("checkpoints/tiny-shapes"), Path("demo/subject"), "configs/training/quickstart.yaml"
PROMPTS, CLASS_PROMPT, RARE_WORD, NEW_WORD = (
    "configs/inference/quickstart_prompts.txt",
    "a photo of a star",
    "sks",
    "<new1>",
)
BY_WORD = {"modifier_token": NEW_WORD, "initializer_token": "star", "instance_prompt": f"a photo of a {NEW_WORD} star"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"learning_rate": 1e-4},
    "custom_diffusion": {"learning_rate": 1e-3, **BY_WORD},
    "textual_inversion": {"learning_rate": 5e-3, "with_prior_preservation": False, **BY_WORD},
}
"""Method -> what it has otherwise than the quickstart; the rates are for so small a network."""


def main() -> None:
    """Run what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--steps", type=int, default=None, help="None: the quickstart's")
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="where the runs are written")
    arguments = parser.parse_args()
    judge, rows = Judge(), []
    for method in arguments.methods:
        figures, seconds, folder = [], [], Path()
        for seed in range(arguments.seeds):
            folder = arguments.folder / f"{method}-{seed}"
            begun = time.perf_counter()
            train(method, seed, arguments.steps, folder)
            seconds.append(time.perf_counter() - begun)
            figures.append(judge.figures(method, folder))
            print(f"{folder}: {figures[-1]}, {seconds[-1]:.0f} s", file=sys.stderr)
        rows.append([method, size(folder), *columns(figures), f"{np.mean(seconds):.0f} s"])
    print(table(["method", "result", "subject similarity", "class drift", "training"], rows))


def train(method: str, seed: int, steps: int | None, folder: Path) -> None:
    """Train a run of a method, in a process of its own as a user would; SystemExit if it fails."""
    flags = {"method": method, "seed": seed, "output_dir": folder, "class_data_dir": folder.parent / "class_images"}
    flags |= METHODS[method] | ({"max_train_steps": steps} if steps else {})
    command = [sys.executable, "-m", "dreambooth_ms", "train", "--config", CONFIG]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    if subprocess.run(command).returncode:
        raise SystemExit(f"{folder}: the training failed")


class Judge:
    """Measures runs as `evaluate` does, those of whole models too; the base is sampled once."""

    def __init__(self) -> None:
        self._embed, self._prompts = load_image_embedder(BASE / "clip"), read_prompts(PROMPTS)
        self._photographs = [np.asarray(open_picture(one.path)) for one in Source(SUBJECT, "").records(print)]
        self._base = self._pictures(open_bundle(BASE), [], RARE_WORD)

    def figures(self, method: str, run: Path) -> Fidelity:
        """Of a run's result."""
        whole, word = method == "full", NEW_WORD if NEW_WORD in str(METHODS[method]) else RARE_WORD
        own = self._pictures(open_bundle(run if whole else BASE), [] if whole else [run], word)
        count = len(self._prompts)
        return measure(self._embed, self._photographs, own[:count], own[count:], self._base[count:])

    def _pictures(self, bundle: ModelBundle, adapters: Sequence[Path], word: str) -> list[np.ndarray]:
        """The subject's, then as many of the class."""
        prompts = [prompt.replace(RARE_WORD, word) for prompt in self._prompts]
        prompts += [CLASS_PROMPT] * len(prompts)
        asked = SampleRequest(prompts=tuple(prompts), guidance_scale=3, batch_size=12, purpose=PURPOSE)
        return [one.picture for one in SamplingModel(bundle, adapters).sample(asked)]


def size(run: Path) -> str:
    """Of the weights of a run's result."""
    others = ("cache", "checkpoint")
    files = [path for path in run.rglob("*.safetensors") if not path.relative_to(run).parts[0].startswith(others)]
    return f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB"


def columns(figures: Sequence[Fidelity]) -> list[str]:
    """Mean and range of each figure."""
    named = ([one.subject_similarity for one in figures], [one.class_drift for one in figures])
    return [f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})" for own in named]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()

"""Measure `--early_stop` and `--keep_best fidelity` on the embedded base: several subjects, a LoRA of each with several
seeds.

    python -m tools.bench_stopping                                 # five subjects, three seeds, the quickstart's steps
    python -m tools.bench_stopping --subjects star heart --seeds 1 --steps 200 --flags validation_loss_steps=5

Each run has five photographs, and three that are held out. It ends early; then the same run goes on to its last step,
bit for bit as if it had never ended. Its weights where it ended, after the last step and those that were chosen are
compared by pictures from other noise than the choice was made by, with the photographs that are held out. What is
there already is not trained again.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from dreambooth_ms.cli.sample import read_prompts
from dreambooth_ms.data.pictures import open_picture
from dreambooth_ms.data.records import Source
from dreambooth_ms.evaluation import drift, load_clip_embedder, similarity
from dreambooth_ms.runtime.device import set_up_device
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.training.checkpoint import checkpoint_folder, checkpoint_folders, open_checkpoint, result_of
from dreambooth_ms.weights.bundle import open_bundle
from tools.bench_methods import BASE, CONFIG, PROMPTS, SAMPLING, Fidelity, command, table
from tools.tiny_base.world import COLOURS, render, subject_scenes

SUBJECTS: dict[str, dict[str, Any]] = {
    "star": {},
    "heart": {"colour": "pink", "accent": "green", "outline": "black", "eyes": "white"},
    "square": {"colour": "purple", "accent": "yellow", "pattern": "dotted", "pattern_period": 12.0},
    "circle": {"colour": "red", "accent": "white", "pattern": "striped", "outline": None},
    "triangle": {"colour": "orange", "accent": "blue", "outline": "black", "eyes": "white"},
}
"""Shape -> what it has otherwise than the quickstart's star: colours of both halves, pattern, outline, eyes."""
TRAINED, HELD_OUT = 5, 3
"""Photographs of each."""
OF_EACH_PROMPT, OF_CLASS, PURPOSE = 2, 24, "comparison of checkpoints"
MOST_STEPS, MOST_LOST = 0.5, 0.02
"""What an early end may take of the steps, and lose of the similarity."""


class Outcome(NamedTuple):
    """What one run came to."""

    subject: str
    seed: int
    total: int
    stopped: int
    """After so many steps, or `total`."""
    best: int
    figures: Mapping[int, Fidelity]
    """By the step that they are of."""

    def score(self, step: int) -> float:
        """What --keep_best goes by, by other pictures."""
        return self.figures[step].subject_similarity - self.figures[step].class_drift

    @property
    def kept(self) -> float:
        """Subject similarity where the run ended early, over that after its last step."""
        return self.figures[self.stopped].subject_similarity / self.figures[self.total].subject_similarity


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each subject")
    parser.add_argument("--steps", type=int, default=None, help="of a whole run; None: the quickstart's")
    parser.add_argument("--checkpoints", type=int, default=12, help="of a whole run, among which the best is chosen")
    parser.add_argument("--flags", nargs="*", default=[], help="of all runs, as name=value; they name the folders, too")
    parser.add_argument("--folder", type=Path, default=Path("runs/stopping"), help="where the runs are written")
    arguments = parser.parse_args(argv)
    set_up_device("CPU", 0)
    steps = arguments.steps or yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["run"]["max_train_steps"]
    found = []
    for subject in arguments.subjects:
        photographs, compare = write_photographs(arguments.folder, subject), Comparison(arguments.folder, subject)
        for seed in range(arguments.seeds):
            run = arguments.folder / "-".join([subject, str(steps), *arguments.flags, str(seed)])
            own = flags_of(subject, photographs, run, steps, steps // arguments.checkpoints, seed)
            own |= dict(flag.split("=") for flag in arguments.flags)
            found.append(outcome(compare, subject, run, own))
            print(found[-1], file=sys.stderr, flush=True)
    print(report(found))


def flags_of(subject: str, photographs: Path, run: Path, steps: int, every: int, seed: int) -> dict[str, Any]:
    """Of a run of so many steps, with a checkpoint `every` so many."""
    return {
        "config": CONFIG,
        "instance_data_dir": photographs / "trained",
        "held_out_data_dir": photographs / "held_out",
        "instance_prompt": f"a photo of a sks {subject}",
        "class_prompt": f"a photo of a {subject}",
        "class_data_dir": photographs / "class_images",
        "num_class_images": 24,
        "output_dir": run,
        "max_train_steps": steps,
        "checkpointing_steps": every,
        "checkpoints_total_limit": None,
        "validation_loss": True,
        "keep_best": "fidelity",
        "validation_guidance_scale": SAMPLING["guidance_scale"],
        "seed": seed,
    }


def outcome(compare: "Comparison", subject: str, run: Path, flags: Mapping[str, Any]) -> Outcome:
    """Train until the run ends early, and then to its last step; and compare the weights of the three steps."""
    total, early = int(flags["max_train_steps"]), run / "stopped"
    if not checkpoint_folder(run, total).is_dir():
        command("train", {**flags, "early_stop": True})
        early.write_text(str(open_checkpoint(checkpoint_folders(run)[-1]).step), encoding="utf-8")
        command("train", flags)
    stopped, result = int(early.read_text(encoding="utf-8")), result_of(run)
    assert result is not None, "the run has ended"
    steps = {total, stopped, result.steps}
    figures = {step: compare.figures(checkpoint_folder(run, step)) for step in sorted(steps)}
    return Outcome(subject, int(flags["seed"]), total, stopped, result.steps, figures)


class Comparison:
    """Pictures of adapters of one subject from the same noise, beside those of the base."""

    def __init__(self, folder: Path, subject: str) -> None:
        pictures = Source(folder / subject / "held_out", "").records(print)
        self._photographs = [np.asarray(open_picture(one.path)) for one in pictures]
        self._embed, prompts = load_clip_embedder(BASE / "clip").pictures, read_prompts(PROMPTS)
        own = [prompt.replace("star", subject) for prompt in prompts] * OF_EACH_PROMPT
        self._count = len(own)
        asked = (*own, *[f"a photo of a {subject}"] * OF_CLASS)
        self._request = SampleRequest(prompts=asked, purpose=PURPOSE, **SAMPLING)
        self._base = self._sample()

    def figures(self, adapter: Path) -> Fidelity:
        """Of the adapter in a folder."""
        own, count = self._sample(adapter), self._count
        to_subject = similarity(own[:count], self._embed(self._photographs))
        return Fidelity(to_subject, drift(own[count:], self._base[count:]))

    def _sample(self, *adapters: Path) -> np.ndarray:
        model = SamplingModel(open_bundle(BASE), adapters)
        return self._embed([one.picture for one in model.sample(self._request)])


def write_photographs(folder: Path, subject: str) -> Path:
    """Write a subject's photographs into `trained` and `held_out` of a folder of its own; returns that."""
    scenes = subject_scenes(TRAINED + HELD_OUT)
    for number, scene in enumerate(scenes):
        own = replace(scene, shape=subject, **SUBJECTS[subject])
        free = [colour for colour in COLOURS if colour not in (own.colour, own.accent, own.outline)]
        own = replace(own, background=free[number % len(free)])
        path = folder / subject / ("trained" if number < TRAINED else "held_out") / f"{number + 1}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(own)).save(path)
    return folder / subject


def report(found: Sequence[Outcome]) -> str:
    """The table of all runs in Markdown, and how many are as they should be."""
    rows = [["subject", "seed", "ended at", "similarity there", "at the end", "best", "its score", "of the end"]]
    for one in found:
        at, end = (one.figures[step].subject_similarity for step in (one.stopped, one.total))
        rows.append(
            [
                *(one.subject, str(one.seed), f"{one.stopped} of {one.total}", f"{at:.3f} ({one.kept - 1:+.1%})"),
                *(f"{end:.3f}", str(one.best), f"{one.score(one.best):.3f}", f"{one.score(one.total):.3f}"),
            ]
        )
    counts = {
        f"ended within {MOST_STEPS:.0%} of the steps": sum(one.stopped <= MOST_STEPS * one.total for one in found),
        f"lost at most {MOST_LOST:.0%} of the similarity by it": sum(one.kept >= 1 - MOST_LOST for one in found),
        "the best is at least as good as the end": sum(one.score(one.best) >= one.score(one.total) for one in found),
    }
    mean = float(np.mean([one.kept for one in found])) - 1
    lines = [f"{what}: {count} of {len(found)}" for what, count in counts.items()]
    return "\n".join([table(rows), "", *lines, f"similarity where it ended, mean: {mean:+.1%}"])


if __name__ == "__main__":
    main()

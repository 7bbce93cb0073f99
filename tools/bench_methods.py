"""Compare the methods on the embedded base: each teaches the quickstart's subject, with several seeds.

    python -m tools.bench_methods                     # four methods, three seeds each, as many steps as the quickstart
    python -m tools.bench_methods --subjects 2        # two subjects, of which each is a new word: at once, and merged
    python -m tools.bench_methods --subjects 2 --second circle   # the other one of another class
    python -m tools.bench_methods --methods custom_diffusion --seeds 1 --steps 20 --folder /tmp/methods

It prints the tables of docs/methods.md: `evaluate`'s figures on the quickstart's prompts, their mean and range over the
seeds, and the size of what is written; the pictures stand in sheet.png. A run that is there already is not trained
again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from dreambooth_ms.cli.evaluate import PURPOSE
from dreambooth_ms.cli.sample import read_prompts
from dreambooth_ms.data.pictures import open_picture
from dreambooth_ms.data.records import Source
from dreambooth_ms.evaluation import drift, load_clip_embedder, similarity
from dreambooth_ms.runtime.device import set_up_device
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.picture_file import Row, write_sheet
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import open_bundle
from tools.tiny_base.checker import check_marks
from tools.tiny_base.world import render, subject_scenes

BASE, SUBJECT, CONFIG = Path("checkpoints/tiny-shapes"), Path("demo/subject"), Path("configs/training/quickstart.yaml")
PROMPTS, CLASS_PROMPT, RARE_WORD = "configs/inference/quickstart_prompts.txt", "a photo of a star", "sks"
WORDS = ("<new1>", "<new2>")
SAMPLING: dict[str, Any] = {"guidance_scale": 3, "scheduler": "dpm++_2m", "num_inference_steps": 12, "batch_size": 24}
"""The quickstart's."""
OF_EACH_PROMPT, OF_CLASS = 2, 24
"""Pictures that figures are made of: by six of each, drift moves by a fifth from machine to machine."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"learning_rate": 1e-4},
    "custom_diffusion": {"learning_rate": 1e-3, "text_encoder_lr": 3e-2},
    "textual_inversion": {"learning_rate": 5e-3, "with_prior_preservation": False},
}
"""Method -> what it has otherwise than the quickstart. The rates are for so small a network, and that of words for its
vectors, whose numbers have a deviation of 1: at 1e-3 a word moved by 0.3 in 600 steps, of a length of 11 (measured)."""

OF_WORDS = ("custom_diffusion", "textual_inversion")
"""Methods that call a subject by a new word."""

Pictures = list[list[np.ndarray]]
BACKGROUNDS = ("blue", "purple", "green", "yellow", "red")
"""Of the pictures of the second subject."""


def main() -> None:
    """Run what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--subjects", type=int, choices=[1, 2], default=1, help="2: those methods that teach new words")
    parser.add_argument("--second", choices=["star", "circle"], default="star", help="class of the second subject")
    parser.add_argument("--steps", type=int, default=None, help="for each subject; None: the quickstart's")
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="where the runs are written")
    arguments = parser.parse_args()
    methods = [one for one in arguments.methods if arguments.subjects == 1 or one in OF_WORDS]
    bench = Bench(arguments.folder, arguments.seeds, arguments.steps, arguments.second)
    print(table(bench.one_subject(methods) if arguments.subjects == 1 else bench.two_subjects(methods)))
    write_sheet(arguments.folder / f"sheet-{arguments.subjects}.png", "Same prompts, same noise.", bench.rows)


class Fidelity(NamedTuple):
    """What `evaluate` calls CLIP-I and class drift."""

    subject_similarity: float
    class_drift: float


class Bench:
    """Trains runs, each in a process of its own as a user would, and measures them as `evaluate` does.

    Args:
        folder: where they are written.
        seeds: how many of each.
        steps: for each subject; None: the quickstart's.
        second: the second subject's class.
    """

    def __init__(self, folder: Path, seeds: int, steps: int | None = None, second: str = "star") -> None:
        set_up_device("CPU", 0)
        self._classes = ("star", second)
        self._folder, self._seeds = folder, range(seeds)
        self._config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        self.steps = steps or self._config["run"]["max_train_steps"]
        self._subjects = [SUBJECT, write_second_subject(folder / "second_subject", second)]
        self._embed, self._prompts = load_clip_embedder(BASE / "clip").pictures, read_prompts(PROMPTS)
        self._photographs = [
            [np.asarray(open_picture(one.path)) for one in Source(folder, "").records(print)]
            for folder in self._subjects
        ]
        self.rows = [Row("photographs", own) for own in self._photographs]
        """Pictures of the subjects, for a sheet."""

    def one_subject(self, methods: Sequence[str]) -> list[list[str]]:
        """The table of the quickstart's subject."""
        rows = [["method", "result", "subject similarity", "class drift", "all marks"]]
        base = self.pictures_of(BASE, [RARE_WORD])
        rows += [["base", "", *columns([self.figures(base, base)]), of_pictures([base])]]
        for method in methods:
            runs = [self._single(method, seed) for seed in self._seeds]
            word = WORDS[0] if method in OF_WORDS else RARE_WORD
            drawn = [self.pictures_of(run, [word]) for run in runs]
            figures = [self.figures(own, base) for own in drawn]
            rows.append([method, size(runs[0]), *columns(figures), of_pictures(drawn)])
        return rows

    def two_subjects(self, methods: Sequence[str]) -> list[list[str]]:
        """The table of both, learnt at once or, of Custom Diffusion, merged from runs of one each."""
        others = [f"{n} word, {to}" for n in ("first", "second") for to in ("to its own photographs", "to the other's")]
        rows = [["method", "result", *others, "class drift"]]
        base = self.pictures_of(BASE, [RARE_WORD, RARE_WORD])
        rows += [["base", "", *self._columns([base], base)]]
        ways: list[tuple[str, Callable[[int], Path]]]
        ways = [(f"{method}, at once", partial(self._joint, method)) for method in methods]
        if "custom_diffusion" in methods:
            ways.append(("custom_diffusion, merged", self._merged))
        for name, run_of in ways:
            runs = [run_of(seed) for seed in self._seeds]
            rows.append([name, size(runs[0]), *self._columns([self.pictures_of(run, WORDS) for run in runs], base)])
        return rows

    def _columns(self, runs: Sequence[Pictures], base: Pictures) -> list[str]:
        """Of each word in some runs: how like the one subject, how like the other; and the drift of the class."""
        similar = [[self.figures(run, base, word, to) for run in runs] for word in (0, 1) for to in (word, 1 - word)]
        return [*(columns(own)[0] for own in similar), columns(similar[0])[1]]

    def _single(self, method: str, seed: int, subject: int = 0) -> Path:
        """A run of one subject."""
        run, name = self._folder / f"{method}-{seed}{'-second' if subject else ''}", self._classes[subject]
        own = {"config": CONFIG, "max_train_steps": self.steps, "instance_data_dir": self._subjects[subject]}
        if METHODS[method].get("with_prior_preservation", True):
            own |= self._class(name)
        if method in OF_WORDS:
            own |= {"modifier_token": WORDS[subject], "initializer_token": name}
            own |= {"instance_prompt": f"a photo of a {WORDS[subject]} {name}"}
        command("train", {"method": method, "seed": seed, "output_dir": run, **own, **METHODS[method]})
        return run

    def _joint(self, method: str, seed: int) -> Path:
        """A run of both, with as many steps for each as in one of its own."""
        run, listed, config = self._folder / f"{method}-{seed}-both", self._folder / "both.json", dict(self._config)
        keeps = METHODS[method].get("with_prior_preservation", True)
        entries = [
            {"instance_data_dir": str(folder.resolve()), "instance_prompt": f"a photo of a {word} {name}"}
            | (self._class(name) if keeps else {})
            for folder, word, name in zip(self._subjects, WORDS, self._classes, strict=True)
        ]
        listed.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        for section in ("data", "prior"):
            named = (*entries[0], "class_data_dir", "class_prompt")
            config[section] = {name: value for name, value in config[section].items() if name not in named}
        (self._folder / "both.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        own = {"config": self._folder / "both.yaml", "concepts_list": listed, "max_train_steps": 2 * self.steps}
        own |= {"modifier_token": "+".join(WORDS), "initializer_token": "+".join(self._classes)}
        command("train", {"method": method, "seed": seed, "output_dir": run, **own, **METHODS[method]})
        return run

    def _class(self, name: str) -> dict[str, str]:
        """Of a class, where its pictures are and what they read."""
        folder = self._folder.resolve() / ("class_images" if name == "star" else f"class_images_{name}")
        return {"class_data_dir": str(folder), "class_prompt": CLASS_PROMPT.replace("star", name)}

    def _merged(self, seed: int) -> Path:
        """Of a run of each."""
        runs, target = (
            [self._single("custom_diffusion", seed, subject) for subject in range(2)],
            self._folder / f"merged-{seed}",
        )
        if not target.exists():
            command("merge", {"base": BASE, "concepts": runs, "target": target})
        return target

    def pictures_of(self, run: Path, words: Sequence[str]) -> Pictures:
        """Of each word, and last of the class: by a run's result, or a model."""
        is_model, name = (run / "model_index.json").is_file(), "base" if run == BASE else run.name
        named = zip(words, self._classes, strict=False)
        subjects = [f"{word} {name}" for word, name in named]
        own = [[one.replace(f"{RARE_WORD} star", to) for one in self._prompts] * OF_EACH_PROMPT for to in subjects]
        prompts = [*chain.from_iterable(own), *[CLASS_PROMPT] * OF_CLASS]
        asked = SampleRequest(prompts=tuple(prompts), purpose=PURPOSE, **SAMPLING)
        model = SamplingModel(open_bundle(run if is_model else BASE), [] if is_model else [run])
        pictures = (one.picture for one in model.sample(asked))
        found = [[next(pictures) for _ in one] for one in (*own, range(OF_CLASS))]
        shown = len(self._prompts)
        self.rows += [Row(f"{name}\n{of}", it[:shown]) for of, it in zip([*words, "class"], found, strict=True)]
        print(f"{name} has sampled", file=sys.stderr, flush=True)
        return found

    def figures(self, pictures: Pictures, base: Pictures, word: int = 0, subject: int = 0) -> Fidelity:
        """Of a word's pictures beside the photographs of a subject, and of those of the class."""
        of_word, of_class, of_base = (self._embed(own) for own in (pictures[word], pictures[-1], base[-1]))
        to_subject = similarity(of_word, self._embed(self._photographs[subject]))
        found = Fidelity(to_subject, drift(of_class, of_base))
        print(f"word {word} beside subject {subject}: {found}", file=sys.stderr, flush=True)
        return found


def write_second_subject(folder: Path, shape: str) -> Path:
    """Write pictures of a pink shape with black dots; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(subject_scenes(len(BACKGROUNDS), seed=8)):
        star = replace(
            scene,
            shape=shape,
            colour="pink",
            accent="black",
            pattern="dotted",
            pattern_period=12,
            outline=None,
            eyes=None,
        )
        own = replace(star, background=BACKGROUNDS[number])
        Image.fromarray(render(own)).save(folder / f"{number + 1}.png")
    return folder


def command(name: str, flags: Mapping[str, Any]) -> None:
    """Run a command of the toolkit; SystemExit if it fails."""
    words = [sys.executable, "-m", "dreambooth_ms", name]
    for flag, value in flags.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    if subprocess.run(words).returncode:
        raise SystemExit(f"failed: {' '.join(words)}")


def size(run: Path) -> str:
    """Of the weights of a run's result."""
    others = ("cache", "checkpoint")
    files = [path for path in run.rglob("*.safetensors") if not path.relative_to(run).parts[0].startswith(others)]
    return f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB"


def columns(figures: Sequence[Fidelity]) -> list[str]:
    """Mean and range of each figure."""
    named = ([one.subject_similarity for one in figures], [one.class_drift for one in figures])
    return [f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})" for own in named]


def of_pictures(runs: Sequence[Pictures]) -> str:
    """Mean and range of how many pictures of the quickstart's subject show its outline, both halves and both eyes."""
    marks = check_marks(render(subject_scenes(1)[0]))
    shown = [sum(check_marks(picture) == marks for picture in pictures[0]) for pictures in runs]
    return f"{np.mean(shown):.1f} of {len(runs[0][0])} ({min(shown)} to {max(shown)})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, under the first row."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


if __name__ == "__main__":
    main()

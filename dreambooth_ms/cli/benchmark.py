"""`dreambooth-ms benchmark`: subjects by methods by seeds, each trained and evaluated -> one table."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dreambooth_ms.atomic import check_writable, write_bytes
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.commands import BenchmarkConfig, EvaluateConfig
from dreambooth_ms.config.load import Setting, build, load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.records import photographs_in
from dreambooth_ms.data.subject_set import Subject, read_subjects
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.folder_layout import read_json, write_json
from dreambooth_ms.weights.hub import find_encoder, find_model

FIGURES, TABLE = "figures.json", "table.md"
COMMANDS = {"train": TrainConfig, "evaluate": EvaluateConfig}
LEGEND = "Means over subjects and seeds ± deviation over seeds (deviation over subjects). ↑: higher is better."

Run = dict[str, Any]
"""Of a training and its evaluation subject, method, seed, prompts, and under the name of each command its flags."""


def run(argv: Sequence[str]) -> int:
    """Do what a file asks for and is not done yet, and print the table; returns the exit status."""
    config = load(BenchmarkConfig, argv, tell)
    runs = planned(config)
    for number, one in enumerate(runs, 1):
        if _is_done(one):
            continue
        file = _figures_of(one)
        tell(f"{file.parent}: run {number} of {len(runs)}")
        write_bytes(Path(one["evaluate"]["prompt"]), "\n".join(one["prompts"]).encode())
        for command in COMMANDS:
            if status := _in_a_process(command, file.with_name(f"{command}.yaml"), one[command]):
                return status
        write_json(file, one | {"measures": read_json(file.with_name("metrics.json"))["measures"]})
    text = table([read_json(_figures_of(one)) for one in runs])
    write_bytes(Path(config.teaching.output_dir, TABLE), text.encode())
    print(text, end="")
    return 0


def planned(config: BenchmarkConfig) -> list[Run]:
    """All runs of a benchmark, checked before any begins.

    Raises:
        ConfigError: flags are wrong, or a run is there by others, one line each.
        DataError, WeightError: there are no such photographs or models.
    """
    teaching, runs, problems = config.teaching, list[Run](), list[str]()
    subjects = read_subjects(Path(teaching.subjects_dir), teaching.subjects, teaching.prompts)
    for subject, other in zip(subjects, [*subjects[1:], subjects[0]], strict=True):
        folders = {"instance_data_dir": subject.folder}
        if teaching.held_out_data_dir:
            folders["held_out_data_dir"] = Path(teaching.held_out_data_dir, subject.name)
        if other is not subject:
            folders["other_data_dir"] = other.folder
        photographs_in(folders)
        for method, seed in product(teaching.methods, range(teaching.num_trainings)):
            runs.append(_run(config, subject, method, seed, folders, problems))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    find_model(config.model.pretrained_model_name_or_path, config.model.revision, config.model.variant)
    for name in filter(None, map(teaching.evaluate.get, ("clip", "dino"))):
        find_encoder(name)
    check_writable(Path(teaching.output_dir))
    for one in runs:
        _is_done(one)
    return runs


def _run(
    config: BenchmarkConfig, subject: Subject, method: str, seed: int, folders: Mapping[str, Path], problems: list[str]
) -> Run:
    """A run with these photographs, by flags of `evaluate`; what is wrong with the file's own flags is noted."""
    teaching, own = config.teaching, config.teaching.methods[method]
    if not isinstance(own, dict):
        problems.append(f"methods.{method}: expected flags of `train` with their values, got {own!r}; {{}} is none")
        return {}
    own = teaching.train | own
    token = str(own.get("modifier_token", teaching.token)).replace("+", " ")
    folder = f"{teaching.output_dir}/{subject.name}/{method}-{seed}"
    both = {name: one for name, one in (vars(config.model) | vars(config.device)).items() if one is not None}
    both |= {"output_dir": folder, "class_prompt": teaching.class_prompt, "instance_data_dir": str(subject.folder)}
    of_class = f"{teaching.output_dir}/class_images/{subject.class_name}"
    to_train = {"instance_prompt": teaching.instance_prompt, "class_data_dir": of_class, "seed": seed}
    to_evaluate = {name: str(one) for name, one in folders.items()} | {"prompt": f"{folder}/prompts.txt"}
    to_evaluate |= {"token": token, "tuned" if own.get("method") == "full" else "lora": folder}
    flags = {}
    for command, where, said, more in (
        ("train", f"methods.{method}", own, to_train),
        ("evaluate", "evaluate", teaching.evaluate, to_evaluate),
    ):
        taken = [f"{where}: {name} is the benchmark's to give; leave it out" for name in said if name in both | more]
        named = both | more | said
        flags[command] = {k: subject.filled(one, token) if isinstance(one, str) else one for k, one in named.items()}
        wrong = build(COMMANDS[command], [[Setting(*one, where) for one in flags[command].items()]])[1]
        problems += taken or [line if line.startswith(where) else f"{where}: {line}" for line in wrong]
    prompts = [subject.filled(prompt, token) for prompt in subject.prompts]
    return {"subject": subject.name, "method": method, "seed": seed, "prompts": prompts, **flags}


def _figures_of(run: Run) -> Path:
    return Path(run["train"]["output_dir"], FIGURES)


def _is_done(run: Run) -> bool:
    """Whether its figures are there. Raises ConfigError if they come from other flags or prompts."""
    file = _figures_of(run)
    if not file.is_file():
        return False
    there, here = (
        {f"{command} --{name}": value for command in COMMANDS for name, value in one[command].items()}
        | {"prompts": one["prompts"]}
        for one in (read_json(file), json.loads(json.dumps(run)))
    )
    if other := [name for name in there | here if there.get(name) != here.get(name)]:
        listed = "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in other)
        raise ConfigError(f"{file}: is of another run ({listed}); remove {file.parent}, or give another --output_dir")
    return True


def _in_a_process(command: str, file: Path, flags: Mapping[str, Any]) -> int:
    """Do a command as users do it; returns its exit status. MindSpore keeps the weights of what it has compiled, so
    that each model has a process of its own. Ctrl-C reaches that by itself, and it ends as it sees fit."""
    write_json(file, flags)
    line = [sys.executable, "-m", "dreambooth_ms", command, "--config", str(file)]
    with subprocess.Popen(line, stdout=sys.stderr.fileno()) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figures of runs as Markdown: every measure of the base, of each method and of photographs."""
    measures = figures[0]["measures"]
    # Of the base and of photographs there is one figure for each subject.
    one_each = [one for one in figures if (one["method"], one["seed"]) == (figures[0]["method"], figures[0]["seed"])]
    lines = [["method", *(f"{name} {'↑' if one['better'] == 'higher' else '↓'}" for name, one in measures.items())]]
    lines.append(["---"] * len(lines[0]))
    of_methods = {one["method"]: [own for own in figures if own["method"] == one["method"]] for one in figures}
    for label, runs, key in (
        ("none", one_each, "base"),
        *((method, runs, "adapted") for method, runs in of_methods.items()),
        ("photographs", one_each, "ceiling"),
        ("another subject", one_each, "floor"),
    ):
        values = ({(one["subject"], one["seed"]): one["measures"][name][key] for one in runs} for name in measures)
        lines.append([label, *map(_cell, values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{LEGEND}\n"


def _cell(values: Mapping[tuple[str, int], Any]) -> str:
    """The mean of what runs of subjects and seeds have, and its deviations."""
    known = {key: one["mean"] if isinstance(one, dict) else one for key, one in values.items() if one is not None}
    if not known:
        return "-"
    text = f"{np.mean([*known.values()]):.3f}"
    for place, form in ((1, " ± {:.3f}"), (0, " ({:.3f})")):
        groups = [[one for key, one in known.items() if key[place] == of] for of in {key[place] for key in known}]
        text += form.format(np.std([np.mean(own) for own in groups], ddof=1)) if len(groups) > 1 else ""
    return text

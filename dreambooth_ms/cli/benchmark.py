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
from dreambooth_ms.config.schema import schema_fields
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
    runs, figures = planned(config), list[dict[str, Any]]()
    for number, one in enumerate(runs, 1):
        found = figures_of(one)
        if not found:
            folder = Path(one["train"]["output_dir"])
            tell(f"{folder}: run {number} of {len(runs)}")
            write_bytes(Path(one["evaluate"]["prompt"]), "\n".join(one["prompts"]).encode())
            for command in COMMANDS:
                write_json(folder / f"{command}.yaml", one[command])
                if status := in_a_process([command, "--config", str(folder / f"{command}.yaml")]):
                    return status
            found = one | {"measures": read_json(folder / "metrics.json")["measures"]}
            write_json(folder / FIGURES, found)
        figures.append(found)
    write_bytes(Path(config.teaching.output_dir, TABLE), table(figures).encode())
    print(table(figures), end="")
    return 0


def planned(config: BenchmarkConfig) -> list[Run]:
    """All runs of a benchmark, checked before any begins. Raises ConfigError of every wrong flag, one line each, or of
    a run that is there by others; DataError and WeightError if there are no such photographs or models."""
    teaching, runs, problems = config.teaching, list[Run](), list[str]()
    subjects = read_subjects(Path(teaching.subjects_dir), teaching.subjects, teaching.prompts)
    for subject in subjects:
        folders = {"instance_data_dir": str(subject.folder)}
        if teaching.held_out_data_dir:
            folders["held_out_data_dir"] = str(Path(teaching.held_out_data_dir, subject.name))
        photographs_in(folders, "white", lambda note: None)
        for method, seed in product(teaching.methods, range(teaching.num_trainings)):
            runs.append(_run(config, subject, method, seed, folders, problems))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    base = find_model(config.model.pretrained_model_name_or_path, config.model.revision, config.model.variant)
    if not (teaching.evaluate.get("clip") or (base / "clip").is_dir()):
        raise ConfigError(f"evaluate: clip: missing, {base} has none; name one, such as openai/clip-vit-base-patch32")
    for name in filter(None, map(teaching.evaluate.get, ("clip", "dino"))):
        find_encoder(name)
    check_writable(Path(teaching.output_dir))
    for one in runs:
        figures_of(one)
    return runs


def _run(
    config: BenchmarkConfig, subject: Subject, method: str, seed: int, folders: Mapping[str, str], problems: list[str]
) -> Run:
    """A run with these photographs, by flags of `evaluate`; what is wrong with the file's own flags is noted."""
    teaching, own = config.teaching, config.teaching.train | config.teaching.methods[method]
    token = str(own.get("modifier_token", teaching.token)).replace("+", " ")
    folder = f"{teaching.output_dir}/{subject.name}/{method}-{seed}"
    both = {name: one for name, one in (vars(config.model) | vars(config.device)).items() if one is not None}
    both |= {"output_dir": folder, "instance_data_dir": folders["instance_data_dir"]}
    to_train: Run = {"instance_prompt": teaching.instance_prompt, "seed": seed}
    if own.get("with_prior_preservation"):
        to_train["class_data_dir"] = f"{teaching.output_dir}/class_images/{subject.class_name}"
    if own.get("with_prior_preservation") or own.get("prior_preservation") == "base_output":
        to_train["class_prompt"] = teaching.class_prompt
    to_evaluate: Run = {**folders, "prompt": f"{folder}/prompts.txt", "token": token}
    to_evaluate |= {"class_prompt": teaching.class_prompt, "tuned" if own.get("method") == "full" else "lora": folder}
    sides = {"train": (f"methods.{method}", own, to_train), "evaluate": ("evaluate", teaching.evaluate, to_evaluate)}
    flags = {}
    for command, (where, said, more) in sides.items():
        taken = [f"{where}: {name} is the benchmark's to give; leave it out" for name in said if name in both | more]
        named = both | more | said
        flags[command] = {k: subject.filled(one, token) if isinstance(one, str) else one for k, one in named.items()}
        wrong = build(COMMANDS[command], [[Setting(*one, where) for one in flags[command].items()]])[1]
        fields = schema_fields(COMMANDS[command])
        secret = [name for name in said if name in fields and fields[name].is_secret]
        problems += [f"{where}: {name} would be written into files of the runs; set HF_TOKEN" for name in secret]
        problems += taken or [line if line.startswith(where) else f"{where}: {line}" for line in wrong]
    prompts = [subject.filled(prompt, token) for prompt in subject.prompts]
    return {"subject": subject.name, "method": method, "seed": seed, "prompts": prompts, **flags}


def figures_of(run: Run) -> dict[str, Any] | None:
    """A run with its measures; None if it is not done. Raises ConfigError if they come from other flags or prompts."""
    file = Path(run["train"]["output_dir"], FIGURES)
    if not file.is_file():
        return None
    there, here = read_json(file), json.loads(json.dumps(run))
    other = [name for name in here if there.get(name) != here[name] and name not in COMMANDS]
    for command in COMMANDS:
        old, new = there[command], here[command]
        other += [f"{command} --{name}" for name in old | new if old.get(name) != new.get(name)]
    if other:
        advice = "remove it to evaluate anew, its folder to train anew, or give another --output_dir"
        raise ConfigError(f"{file}: {', '.join(other)} changed since; {advice}")
    return there


def in_a_process(arguments: Sequence[str]) -> int:
    """Do a command as users do it, all that it says on stderr; returns its exit status. MindSpore keeps the weights of
    what it has compiled: so each model has a process. Ctrl-C reaches that by itself, and it ends as it sees fit."""
    with subprocess.Popen([sys.executable, "-m", "dreambooth_ms", *arguments], stdout=2) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figures of all runs, in their order, as Markdown: measures of the base, of each method, of photographs."""
    measures, seeds = figures[0]["measures"], len({one["seed"] for one in figures})
    methods = list(dict.fromkeys(one["method"] for one in figures))
    lines = [["method", *(f"{name} {'↑' if one['better'] == 'higher' else '↓'}" for name, one in measures.items())]]
    lines.append(["---"] * len(lines[0]))
    # What no method changes is the same beside each.
    rows = [(method, method, "adapted") for method in methods]
    for label, method, key in [("none", methods[0], "base"), *rows, ("photographs", methods[0], "ceiling")]:
        own = [one["measures"] for one in figures if one["method"] == method]
        found = ([one[name][key]["mean"] if key != "ceiling" else one[name][key] for one in own] for name in measures)
        lines.append([label, *(_cell(np.array(values, float).reshape(-1, seeds)) for values in found)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{LEGEND}\n"


def _cell(values_SN: np.ndarray) -> str:
    """The mean of what S subjects have from N seeds, NaN where they have nothing, and its deviations."""
    known_SN = values_SN[~np.isnan(values_SN).any(1)]
    if not known_SN.size:
        return "-"
    over = (" ± {:.3f}", known_SN.mean(0)), (" ({:.3f})", known_SN.mean(1))
    deviations = [form.format(own.std(ddof=1)) for form, own in over if own.size > 1]
    return f"{known_SN.mean():.3f}" + "".join(deviations)

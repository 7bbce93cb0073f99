"""A benchmark's plan, what stops it, what it does again, and its table; its commands are recorded, not done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dreambooth_ms.cli import benchmark
from dreambooth_ms.cli.benchmark import LEGEND, _run, table
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.commands import BenchmarkConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.data.subject_set import Subject, read_subjects
from dreambooth_ms.errors import ConfigError

ROOT = Path(__file__).parents[2]
PUBLISHED = """Classes

subject_name,class
cup,cup
old_bear,stuffed animal
tom,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on a table'.format(unique_token, class_token),
'a green {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} with a crown'.format(unique_token, class_token)
]
"""
MEASURE = {"better": "higher", "ceiling": None, "floor": None}


def measured(base, adapted, ceiling=None):
    return {"A": MEASURE | {"base": {"mean": base}, "adapted": {"mean": adapted}, "ceiling": ceiling}}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Photographs of two subjects, and a file that has them taught by two methods, two seeds each."""
    for name, level in (("rex", 40), ("tea", 90)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64), (level, 60 * number, 0)).save(tmp_path / "set" / name / f"{number}.png")
    (tmp_path / "set" / "subjects.yaml").write_text(
        "classes: {rex: dog, tea: pot}\nprompts: ['a {token} {class} on a rug']"
    )
    (tmp_path / "base" / "clip").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILE = {
    "model": {"pretrained_model_name_or_path": "base"},
    "teaching": {
        "subjects_dir": "set",
        "num_trainings": 2,
        "output_dir": "out",
        "train": {"resolution": 64, "lr_warmup_steps": 0},
        "methods": {
            "small": {"rank": 1, "with_prior_preservation": True},
            "words": {
                "method": "textual_inversion",
                "modifier_token": "<a>+<b>",
                "initializer_token": "{class}+{class}",
            },
            "whole": {"method": "full"},
        },
        "evaluate": {"num_seeds": 2},
    },
}


@pytest.fixture
def done(monkeypatch):
    """The commands that were asked for; the evaluation of each leaves figures."""
    commands = []

    def in_a_process(arguments):
        command, _, file = arguments
        flags = yaml.safe_load(Path(file).read_text())
        commands.append((command, flags))
        if command == "evaluate":
            metrics = {"measures": measured(0.25, 0.5)}
            (Path(flags["output_dir"]) / "metrics.json").write_text(json.dumps(metrics))
        return 0

    monkeypatch.setattr(benchmark, "in_a_process", in_a_process)
    return commands


def run(content=FILE, *flags):
    with open("plan.yaml", "w") as file:
        yaml.safe_dump(content, file, sort_keys=False)
    return main(["benchmark", "plan.yaml", *flags])


def changed(**teaching):
    return FILE | {"teaching": FILE["teaching"] | teaching}


def test_each_subject_is_taught_by_each_method_from_each_seed(home, done, capsys):
    assert run() == 0
    assert [command for command, _ in done] == ["train", "evaluate"] * 12
    trained = {flags["output_dir"]: flags for command, flags in done if command == "train"}
    evaluated = {flags["output_dir"]: flags for command, flags in done if command == "evaluate"}
    assert list(trained)[:4] == ["out/rex/small-0", "out/rex/small-1", "out/rex/words-0", "out/rex/words-1"]
    assert trained["out/tea/small-1"] == {
        **{"pretrained_model_name_or_path": "base", "device_target": "auto", "ms_mode": 0, "deterministic": True},
        **{"resolution": 64, "lr_warmup_steps": 0, "rank": 1, "with_prior_preservation": True, "seed": 1},
        **{"instance_data_dir": "set/tea", "instance_prompt": "a photo of sks pot", "output_dir": "out/tea/small-1"},
        **{"class_data_dir": "out/class_images/pot", "class_prompt": "a photo of pot"},
    }
    assert trained["out/rex/words-0"]["initializer_token"] == "dog+dog"
    assert trained["out/rex/words-0"]["instance_prompt"] == "a photo of <a> <b> dog"
    assert "class_prompt" not in trained["out/rex/words-0"]
    assert (home / "out/rex/words-0/prompts.txt").read_text() == "a <a> <b> dog on a rug"
    assert (evaluated["out/rex/words-0"]["lora"], evaluated["out/rex/words-0"]["token"]) == (
        "out/rex/words-0",
        "<a> <b>",
    )
    assert evaluated["out/rex/whole-0"]["tuned"] == "out/rex/whole-0"
    printed = capsys.readouterr().out
    assert printed == (home / "out/table.md").read_text()
    assert "| words | 0.500 ± 0.000 (0.000) |" in printed


def test_what_is_done_is_not_done_again(home, done):
    assert run() == 0
    (home / "out/tea/small-1/figures.json").unlink()
    done.clear()
    assert run() == 0
    assert [(command, flags["output_dir"]) for command, flags in done] == [
        ("train", "out/tea/small-1"),
        ("evaluate", "out/tea/small-1"),
    ]
    done.clear()
    assert run(FILE, "--num_trainings", "3", "--subjects", "rex") == 0
    assert {flags["output_dir"] for _, flags in done} == {f"out/rex/{name}-2" for name in ("small", "words", "whole")}


@pytest.mark.parametrize(
    ("teaching", "what"),
    [
        ({"train": {"resolution": 32, "lr_warmup_steps": 0}}, "train --resolution"),
        ({"evaluate": {"num_seeds": 3}}, "evaluate --num_seeds"),
        ({"prompts": ["a blue {token} {class}"]}, "prompts"),
    ],
)
def test_a_run_that_is_there_by_other_settings_is_refused_before_any_begins(home, done, capsys, teaching, what):
    assert run() == 0
    done.clear()
    assert run(changed(**teaching)) == 2
    said = "remove it to evaluate anew, its folder to train anew, or give another --output_dir"
    assert capsys.readouterr().err.endswith(
        f"dreambooth-ms: error: out/rex/small-0/figures.json: {what} changed since; {said}\n"
    )
    assert not done


def test_a_command_that_fails_ends_it_with_its_status(home, monkeypatch):
    monkeypatch.setattr(benchmark, "in_a_process", lambda arguments: 130)
    assert run() == 130
    assert not list(home.rglob("figures.json"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (changed(methods={"a": {"rnak": 8}, "b": {"rank": 0}}), [
            "methods.a: rnak: unknown key; did you mean rank?", "methods.b: --rank: expected at least 1, got 0",
        ]),
        (changed(methods={"a": {"seed": 3}}), ["methods.a: seed is the benchmark's to give; leave it out"]),
        (changed(evaluate={"clips": "x"}), ["evaluate: clips: unknown key; did you mean clip?"]),
        (changed(methods={"none": {}}), ["--methods: expected names, none of them none, with flags of `train` such"]),
        (changed(methods={"a": 3}), ["--methods: expected names, none of them none, with flags of `train` such"]),
        (changed(methods=[]), ["plan.yaml: teaching.methods: expected names with what belongs to each, in the file,"]),
        (changed(subjects=["rox"]), ["--subjects: set/subjects.yaml has not rox; it has rex, tea"]),
        (changed(subjects_dir="sets"), ["--subjects_dir sets: expected one of prompts_and_classes.txt, subjects.yaml, "
                                        "subjects.json in it; did you mean set?"]),
        (changed(prompts=["a {class}"]), ["set/subjects.yaml: expected prompts of rex with {token} in each, got"]),
        (changed(held_out_data_dir="set"), ["--held_out_data_dir: 0.png, 1.png is in --instance_data_dir, too;"]),
        (changed(held_out_data_dir="none"), ["none/rex: no such folder; expected a folder with pictures"]),
        (FILE | {"model": {"pretrained_model_name_or_path": "bare"}}, [
            "evaluate: clip: missing, bare has none; name one, such as openai/clip-vit-base-patch32",
        ]),
        (FILE | {"model": {"pretrained_model_name_or_path": "buse"}}, ["buse: no such file or folder; did you mean"]),
        (changed(evaluate={"dino": "nowhere/at/all"}), ["nowhere/at/all: no such file or folder"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_training(home, done, capsys, content, said):
    assert run(content) == 2
    lines = [line.removeprefix("dreambooth-ms: error: ") for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
    assert not done and not (home / "out").exists()


@pytest.mark.parametrize("text", ["- rex", "classes: [rex]", "classes: {rex: dog", "prompts: [a]", "3"])
def test_a_list_of_subjects_that_is_none_is_one_line(home, text):
    (home / "set" / "subjects.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^set/subjects.yaml: no classes and prompts as in docs/learning.md \(.*\)$"):
        read_subjects(Path("set"), [], None)


def test_the_published_list_has_prompts_for_objects_and_for_the_living(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(PUBLISHED)
    cup, bear, tom = read_subjects(tmp_path, [], None)
    assert (bear.name, bear.class_name, bear.folder) == (
        "old_bear",
        "stuffed animal",
        tmp_path / "dataset" / "old_bear",
    )
    assert cup.prompts == bear.prompts == ("a {token} {class} on a table", "a green {token} {class}")
    assert tom.prompts == ("a {token} {class} with a crown",)
    assert bear.filled(bear.prompts[1], "sks") == "a green sks stuffed animal"
    assert [one.name for one in read_subjects(tmp_path, ["tom"], ["{token}"])] == ["tom"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "benchmark").glob("*.yaml")), ids=lambda path: path.name)
def test_the_benchmarks_that_are_there_have_flags_that_are_known(path, tmp_path):
    config = load(BenchmarkConfig, [str(path)], pytest.fail)
    subject, problems = Subject("rex", tmp_path, "dog", ("a {token} {class}",)), []
    for method in config.teaching.methods:
        _run(config, subject, method, 0, {"instance_data_dir": str(tmp_path)}, problems)
    assert not problems and len(config.teaching.methods) > 1


def test_the_benchmark_itself_imports_no_mindspore():
    program = "import sys, dreambooth_ms.cli.benchmark; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_table_has_means_over_all_and_deviations_over_seeds_and_subjects():
    adapted = {("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.6, ("b", 1): 1.0}
    figures = [
        {
            "subject": subject,
            "method": "lora",
            "seed": seed,
            "measures": measured(0.1, value, 0.9 if subject == "a" else None),
        }
        for (subject, seed), value in adapted.items()
    ]
    assert table(figures).splitlines() == [
        "| method | A ↑ |",
        "| --- | --- |",
        "| none | 0.100 ± 0.000 (0.000) |",
        # Seeds have 0.4 and 0.7, subjects 0.3 and 0.8.
        "| lora | 0.550 ± 0.212 (0.354) |",
        "| photographs | 0.900 ± 0.000 |",
        "",
        LEGEND,
    ]
    assert "| lora | 0.200 |" in table(figures[:1])
    assert "| photographs | - |" in table(figures[2:])

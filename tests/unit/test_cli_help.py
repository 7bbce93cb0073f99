"""The command line answers help and mistakes at once, in lines for people."""

import re
import shlex
import subprocess
import sys
import types
from dataclasses import MISSING

import pytest

from dreambooth_ms import __version__
from dreambooth_ms.cli.main import COMMANDS, main, schema_of
from dreambooth_ms.config.load import load
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.errors import ConfigError, DataError, UserError

HEAVY = {"mindspore", "mindone", "transformers", "torch", "numpy", "PIL"}
LIGHT_COMMAND_LINES = [
    [],
    ["--help"],
    ["--version"],
    ["trian"],
    ["train", "--help"],
    ["train", "--help", "all"],
    ["sample", "--help"],
    ["convert", "--help"],
]


@pytest.fixture
def train_runs(monkeypatch):
    """Puts a function in the place of the train command."""

    def install(run):
        monkeypatch.setitem(sys.modules, "dreambooth_ms.cli.train", types.SimpleNamespace(run=run))

    return install


def raiser(error):
    def run(argv):
        raise error

    return run


@pytest.mark.parametrize("arguments", LIGHT_COMMAND_LINES, ids=" ".join)
def test_help_and_mistakes_import_nothing_heavy(arguments):
    program = (
        "import sys; from dreambooth_ms.cli.main import main; main(sys.argv[1:]); "
        "print('\\nimported:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    output = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    imported = set(output.stdout.rpartition("imported:")[2].split())
    assert "dreambooth_ms" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_every_command_with_its_summary(flag, capsys):
    assert main([flag]) == 0
    text = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert f"  {name}" in text
        assert summary in text


def test_no_command_prints_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: dreambooth-ms COMMAND" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dreambooth-ms {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flags", [["--help", "all"], ["-h", "all"], ["--seed", "1", "--help=all"]])
def test_help_all_of_a_command_lists_its_flags(name, flags, capsys):
    assert main([name, *flags]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: dreambooth-ms {name} ")
    assert all(f"\n  --{field} " in text for field in schema_fields(schema_of(name)))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flags", [["--help"], ["-h"], ["--seed", "1", "--help"]])
def test_help_of_a_command_begins_with_what_everybody_sets(name, flags, capsys):
    """That is everything where there are few flags."""
    assert main([name, *flags]) == 0
    text = capsys.readouterr().out
    schema = schema_of(name)
    shown = re.findall(r"^  --(\w+) ", text, re.MULTILINE)
    assert len(shown) < 30, "too long to be read"
    assert shown == list(schema.USUAL) if schema.USUAL else {*shown} == schema_fields(schema).keys()
    if schema.USUAL:
        assert f"`dreambooth-ms {name} --help all` has the rest" in text
        required = [field for field, one in schema_fields(schema).items() if one.default is MISSING]
        assert {*required} <= {*shown}
        example = re.search(rf"\n  dreambooth-ms {name} (.*?)\n\n", text, re.DOTALL)[1]
        load(schema, shlex.split(example.replace("\\\n", " ")), tell=pytest.fail)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("trian", "trian: unknown command; did you mean train?"),
        (
            "--rank",
            "--rank: unknown command; expected one of train, check, prepare, sample, evaluate, benchmark, inspect, "
            "convert, merge, extract, push, doctor",
        ),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(name, line, capsys):
    assert main([name]) == 2
    assert capsys.readouterr() == ("", f"dreambooth-ms: error: {line}\n")


def test_a_command_gets_its_arguments_and_gives_the_status(train_runs):
    seen = []
    train_runs(lambda argv: seen.append(argv) or 7)
    assert main(["train", "--rank", "8"]) == 7
    assert seen == [["--rank", "8"]]


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError])
def test_each_mistake_is_one_line_without_a_traceback(kind, train_runs, capsys):
    train_runs(raiser(kind("--rank: wrong\n--seed: wrong")))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "dreambooth-ms: error: --rank: wrong\ndreambooth-ms: error: --seed: wrong\n"


def test_an_interrupt_is_reported_as_shells_do(train_runs, capsys):
    train_runs(raiser(KeyboardInterrupt()))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "dreambooth-ms: interrupted\n"


def test_a_defect_of_the_toolkit_keeps_its_traceback(train_runs):
    train_runs(raiser(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train"])

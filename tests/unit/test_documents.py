"""What the documents promise can be done as written."""

import re
import shlex
from pathlib import Path

import pytest

from dreambooth_ms.cli.main import COMMANDS
from dreambooth_ms.config import schema
from dreambooth_ms.config.load import load
from dreambooth_ms.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "README_CN.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """The dreambooth-ms command lines of the code blocks, with continued lines joined and comments cut."""
    for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|\s|/)dreambooth-ms (.*)", line.split("  #")[0])
            if match:
                yield match[1]


ALL_COMMANDS = [(path.name, command) for path in DOCUMENTS for command in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("document", "command"), ALL_COMMANDS)
def test_every_command_in_the_documents_is_accepted(document, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *arguments = shlex.split(command)
    if name.startswith("-") or name.isupper():
        return
    assert name in COMMANDS, document
    if "--help" not in arguments:
        load(getattr(schema, COMMANDS[name].schema), arguments)


def test_the_readme_shows_commands():
    assert {"README.md", "README_CN.md"} <= {document for document, _ in ALL_COMMANDS}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "training").glob("*.yaml")), ids=lambda path: path.name)
def test_every_training_configuration_loads(path):
    required = ["--instance_data_dir", "photos", "--instance_prompt", "a photo of sks dog"]
    given = path.read_text(encoding="utf-8")
    load(TrainConfig, ["--config", str(path), *([] if "instance_data_dir" in given else required)])


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.exists()], ids=lambda path: path.name)
def test_every_file_and_picture_that_a_document_names_is_there(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), target


def test_every_test_that_proves_a_format_is_there():
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    functions = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20
    assert named <= functions, named - functions
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/[\w/]+\.py)`", text))

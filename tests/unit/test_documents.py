"""What the documents promise can be done as written."""

import re
import shlex
from pathlib import Path

import pytest

from dreambooth_ms.cli.main import COMMANDS, schema_of
from dreambooth_ms.config.load import load
from dreambooth_ms.config.sample import SampleConfig
from dreambooth_ms.config.train import TrainConfig

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
        load(schema_of(name), arguments)


def test_the_readme_shows_commands():
    assert {"README.md", "README_CN.md"} <= {document for document, _ in ALL_COMMANDS}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "training").glob("*.yaml")), ids=lambda path: path.name)
def test_every_training_configuration_loads(path):
    required = ["--instance_data_dir", "photos", "--instance_prompt", "a photo of sks dog"]
    given = path.read_text(encoding="utf-8")
    others = [] if "instance_data_dir" in given else required
    if "with_prior_preservation: true" in given and "class_data_dir" not in given:
        others += ["--class_data_dir", "class", "--class_prompt", "a photo of a dog"]
    told = []
    load(TrainConfig, ["--config", str(path), *others], told.append)
    assert not told


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "inference").glob("*.yaml")), ids=lambda path: path.name)
def test_every_inference_configuration_loads(path):
    told = []
    load(SampleConfig, ["--config", str(path), "--prompt", "a photo of sks dog"], told.append)
    assert not told


def test_the_configurations_of_the_guides_are_here():
    names = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert names >= {
        "training/sd_xl_base_finetune_dreambooth_lora_910a.yaml",
        "training/sd_xl_base_finetune_dreambooth_lora_910b.yaml",
        "training/sd_xl_base_finetune_dreambooth_textencoder_lora_910b.yaml",
        "inference/sd_xl_base.yaml",
        "inference/sd_xl_refiner.yaml",
    }


GUIDE = """
  --config configs/training/sd_xl_base_finetune_dreambooth_{which}lora_910{card}.yaml \
  --weight checkpoints/sd_xl_base_1.0_ms.ckpt --instance_data_path photos --instance_prompt "A photo of a sks dog" \
  --class_data_path class --class_prompt "A photo of a dog" {more} --ms_mode 0 --save_ckpt_interval 500 \
  --device_target Ascend
"""


@pytest.mark.parametrize(
    ("which", "card", "more"),
    [
        ("", "a", ""),
        ("", "b", "--gradient_accumulation_steps 4"),
        ("textencoder_", "b", "--save_path runs/dog"),
        ("", "b", "--is_parallel False"),
        ("", "b", "--is_parallel True"),
    ],
)
def test_the_training_commands_of_the_sdxl_guide_are_accepted_as_they_are(which, card, more, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(TrainConfig, shlex.split(GUIDE.format(which=which, card=card, more=more).replace("\\\n", " ")))
    assert config.model.pretrained_model_name_or_path == "checkpoints/sd_xl_base_1.0_ms.ckpt"
    assert (config.data.resolution, config.data.instance_data_dir) == (512 if card == "a" else 1024, "photos")
    assert (config.prior.with_prior_preservation, config.prior.class_data_dir) == (True, "class")
    assert config.method.train_text_encoder == bool(which)
    assert config.run.checkpointing_steps == 500


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


def test_the_chinese_readme_holds_what_the_english_one_holds():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md"))
    patterns = {
        "sections": r"^#+ ",
        "commands": r"(?:^|\s)(?:dreambooth-ms|mpirun|msrun|make|streamlit) [\w-]+",
        "flags": r"--\w+",
        "documents": r"\]\((?!https?:)([^)#]+)\)",
        "figures": r"\d+(?:\.\d+)?",
    }
    for what, pattern in patterns.items():
        held = [re.findall(pattern, text.replace("README_CN", "README"), re.MULTILINE) for text in (english, chinese)]
        if what == "sections":
            held = [len(one) for one in held]
        if what in ("flags", "documents", "commands"):
            held = [set(map(str.strip, one)) for one in held]
        if what == "figures":
            held = [{one for one in found if "." in one or len(one) > 2} for found in held]
        assert held[0] == held[1], what


def test_the_tour_names_files_that_are_there_each_once():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "dreambooth_ms"
    named = [path for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text) if not path.startswith("tools/")]
    assert len(named) > 30
    assert all((package / path).is_file() or (ROOT / path).is_file() for path in named), named
    tour = text.partition("## Follow one picture")[2].partition("\n## ")[0]
    files = re.findall(r"`((?:\w+/)*\w+\.py)`", tour)
    assert len(files) > 15 and len(files) == len(set(files))

"""What the documents promise can be done as written."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.cli.main import COMMANDS, schema_of
from dreambooth_ms.config.load import load
from dreambooth_ms.config.sample import SampleConfig
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.sampling.picture_file import SETTINGS_KEY
from tests.tiny_model import write_random_model
from tests.whole_loras import write_run_lora

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "README_CN.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """The dreambooth-ms command lines of the code blocks, with continued lines joined and comments cut; and of tables,
    those that are whole."""
    for line in re.findall(r"^\|.*", text, re.MULTILINE):
        yield from re.findall(r"`dreambooth-ms ((?:convert|extract|merge) [^`…]+)`", line)
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
    text = path.read_text(encoding="utf-8")
    others = [] if "instance_data_dir" in text else required
    if "with_prior_preservation: true" in text and "class_data_dir" not in text:
        others += ["--class_data_dir", "class", "--class_prompt", "a photo of a dog"]
    notes = []
    load(TrainConfig, ["--config", str(path), *others], notes.append)
    assert not notes


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "inference").glob("*.yaml")), ids=lambda path: path.name)
def test_every_inference_configuration_loads(path):
    notes = []
    load(SampleConfig, ["--config", str(path), "--prompt", "a photo of sks dog"], notes.append)
    assert not notes


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


def sections(name):
    """(level of its heading, text) of each section of a document, in order; a comment in a code block is no heading."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("README_CN.md", "README.md")
    text = re.sub(r"```.*?```", lambda block: block[0].replace("\n#", "\n #"), text, flags=re.DOTALL)
    parts = re.split(r"^(#+) .*$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def code_blocks(text):
    """Without what is said beside the commands, which is in the document's language."""
    return [re.sub(r" +# .*", "", block) for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)]


HELD = {
    "code blocks": code_blocks,
    "rows of tables": lambda text: [row.count("|") for row in re.findall(r"(?m)^\|.*", text)],
    "items of lists": lambda text: len(re.findall(r"(?m)^- ", text)),
    "code": lambda text: sorted(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))),
    "flags": lambda text: sorted(set(re.findall(r"--[\w-]+", text))),
    "links and pictures": lambda text: sorted(re.findall(r"\]\(([^)]+)\)", text)),
    "figures": lambda text: {one for one in re.findall(r"\d+(?:\.\d+)?", text) if "." in one or len(one) > 2},
}
"""What sections in two languages have alike."""


def test_the_chinese_readme_has_the_sections_of_the_english_one():
    english, chinese = ([level for level, _ in sections(name)] for name in ("README.md", "README_CN.md"))
    assert english == chinese and len(english) > 10


@pytest.mark.parametrize("what", HELD)
def test_each_section_of_the_chinese_readme_holds_what_the_english_one_holds(what):
    texts = ([text for _, text in sections(name)] for name in ("README.md", "README_CN.md"))
    for number, (english, chinese) in enumerate(zip(*texts, strict=True)):
        assert HELD[what](chinese) == HELD[what](english), number


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 180


def test_the_python_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # Small ones in the places of what it names.
    (name,) = re.findall(r'find_model\("(.+?)"\)', example)
    (run,) = re.findall(r'find_adapter\("(.+?)"\)', example)
    write_random_model(tmp_path / name)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    draw = np.random.default_rng(0).standard_normal
    factors = draw((2, 16), np.float32), draw((16, 2), np.float32)
    (tmp_path / run).mkdir(parents=True)
    write_run_lora(tmp_path / run, {"unet": {layer: factors}})
    exec(compile(example, "docs/sampling.md", "exec"), {})
    assert capsys.readouterr().out.split("\n")[:2] == ["1 of 25", "2 of 25"]
    weak, strong = (Image.open(tmp_path / "outputs" / f"dog-{strength}.png") for strength in (0.6, 1.0))
    assert '"lora_scale": [0.6]' in weak.info[SETTINGS_KEY]
    assert (np.asarray(weak) != np.asarray(strong)).any()


def texts_of_the_sources():
    """Every text in the package and its tools, with … where a value is put into it."""
    found = set()
    for path in (path for folder in ("dreambooth_ms", "tools") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_every_message_that_is_explained_is_one_of_the_program():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"(?m)^\| `(.+?)` \|", text)
    sources = texts_of_the_sources()
    assert len(messages) > 50 and len(messages) == len(set(messages))
    for message in messages:
        fixed = [part for part in message.split("…") if re.search(r"\w", part)]
        if message.startswith("unknown "):  # Of two texts that are put together.
            assert all(any(part in source for source in sources) for part in fixed)
            continue
        in_order = re.compile(".*".join(map(re.escape, fixed)), re.DOTALL)
        assert fixed and any(in_order.search(source) for source in sources), message


def test_the_tour_names_files_that_are_there_each_once():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "dreambooth_ms"
    named = [path for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text) if not path.startswith("tools/")]
    assert len(named) > 30
    assert all((package / path).is_file() or (ROOT / path).is_file() for path in named), named
    tour = text.partition("## Follow one picture")[2].partition("\n## ")[0]
    files = re.findall(r"`((?:\w+/)*\w+\.py)`", tour)
    assert len(files) > 15 and len(files) == len(set(files))

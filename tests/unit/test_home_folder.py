"""`~` is the home folder in every field and file that holds a path, whatever the shell made of it."""

import pytest

from dreambooth_ms.cli.main import COMMANDS, schema_of
from dreambooth_ms.config.load import load
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError

PATHS = {"source", "target", "base", "lora", "image", "mask", "refiner", "clip", "report", "resume_from_checkpoint"}
PATHS |= {"validation_images", "super_resolution", "super_resolution_lora"}
PATHS |= {
    "concepts_list",
    "dataset_name",
    "embedding",
    "concepts",
    "regularization_prompts",
    "tuned",
    "dino",
    "folder",
    "like",
}
REQUIRED = [
    "--pretrained_model_name_or_path",
    "~/base",
    "--instance_prompt",
    "a sks dog",
    "--instance_data_dir",
    "~/dog",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_that_holds_a_path_is_marked(command):
    known = schema_fields(schema_of(command))
    paths = {name for name in known if name in PATHS or name.endswith(("_dir", "_path"))}
    assert paths == {name for name, one in known.items() if one.is_path}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_in_flags(home):
    config = load(TrainConfig, [*REQUIRED, "--output_dir=~/out"])
    assert config.run.output_dir == f"{home}/out"
    assert config.model.pretrained_model_name_or_path == f"{home}/base"
    assert config.data.instance_data_dir == f"{home}/dog"


def test_in_files_and_their_own_paths(home):
    (home / "run.yaml").write_text("output_dir: ~/out\nvalidation_prompt: ~/dog\n")
    config = load(TrainConfig, ["--config", "~/run.yaml", *REQUIRED])
    assert config.run.output_dir == f"{home}/out"
    assert config.validation.validation_prompt == ("~/dog",)


def test_in_lists(home):
    flags = ["--pretrained_model_name_or_path", "base", "--prompt", "a dog", "--lora", "~/a", "b"]
    assert load(schema_of("sample"), flags).weights.lora == [f"{home}/a", "b"]


def test_in_the_middle_it_is_a_letter(home):
    assert load(TrainConfig, [*REQUIRED, "--output_dir", "./~/out"]).run.output_dir == "./~/out"


@pytest.mark.parametrize(("path", "owner"), [("~/out", "~"), ("~nobody-here/out", "~nobody-here")])
def test_a_home_that_is_not_known_is_told(monkeypatch, path, owner):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, [*REQUIRED[2:4], "--pretrained_model_name_or_path", "a", "--instance_data_dir", "b",
                           "--output_dir", path])  # fmt: skip
    assert str(error.value) == (
        f"--output_dir: {path}: no home folder is known for {owner}; write the whole path, or ./{path} for a name that "
        "begins so"
    )

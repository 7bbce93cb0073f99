"""`train --profile N`: MindSpore's profiler records so many steps, and changes nothing of the run."""

import csv
import json

import pytest

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.open import read_tensors
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject

STEPS, RECORDED = 4, 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0)
    write_subject(home / "photographs")
    return home


def train(home, name, *flags):
    return main([
        *("train", "--pretrained_model_name_or_path", str(home / "base"), "--resolution", "32", "--seed", "1"),
        *("--instance_data_dir", str(home / "photographs"), "--instance_prompt", "a photo of sks star"),
        *("--train_batch_size", "1", "--max_train_steps", str(STEPS), "--output_dir", str(home / name), *flags),
    ])  # fmt: skip


def test_the_steps_after_the_first_are_recorded_and_the_result_is_the_same(home, capsys):
    assert train(home, "plain") == 0
    capsys.readouterr()
    assert train(home, "recorded", "--profile", str(RECORDED)) == 0
    assert capsys.readouterr().out == ""
    plain, recorded = (read_tensors(home / name / FILE_NAME)[0] for name in ("plain", "recorded"))
    assert {name: value.tobytes() for name, value in plain.items()} == {
        name: value.tobytes() for name, value in recorded.items()
    }
    (folder,) = (home / "recorded" / "profile").iterdir()
    assert json.loads((folder / "ASCEND_PROFILER_OUTPUT" / "trace_view.json").read_text())
    with (folder / "FRAMEWORK" / "cpu_op_detail_info_0.csv").open() as table:
        counts = [int(row["op_occurrences"]) for row in csv.DictReader(table)]
    # Every operation of the step's graph once a step; some are in loops.
    assert counts and all(count % RECORDED == 0 for count in counts)


def test_as_many_steps_as_the_run_has_are_refused_before_any_work(home, capsys):
    assert train(home, "refused", "--profile", str(STEPS)) == 2
    assert f"--profile {STEPS}: expected less than the {STEPS} steps to take" in capsys.readouterr().err
    assert not (home / "refused").exists()


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_no_number_of_steps_is_refused(home, capsys, count):
    assert train(home, "refused", "--profile", count) == 2
    assert "--profile: expected" in capsys.readouterr().err

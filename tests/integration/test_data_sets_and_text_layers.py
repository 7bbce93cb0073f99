"""Parquet files, --clip_skip and --save_precision through whole runs on a tiny base of three text layers."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dreambooth_ms.cli import train as command
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.sampling.model import SamplingModel
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import open_bundle
from tests import tiny_model
from tests.picture_settings import read_settings
from tools.tiny_base.world import write_subject

CAPTIONS = ["a star", "star photo", "photo of a star", "a photo", "star star"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of SD 1, of whose text layers two can be left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "TEXT", replace(tiny_model.TEXT, num_hidden_layers=3))
        return tiny_model.write_random_model(tmp_path_factory.mktemp("base"), levels=0)


@pytest.fixture
def data_set(tmp_path):
    """A folder with one parquet file of five pictures and captions."""
    write_subject(tmp_path / "photographs")
    stored = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted((tmp_path / "photographs").iterdir())]
    (tmp_path / "set").mkdir()
    table = pyarrow.table({"image": stored, "text": CAPTIONS})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    return tmp_path / "set"


def run(base, data_set, output, *flags):
    values = {"pretrained_model_name_or_path": base, "instance_prompt": "a star", "resolution": 32, "seed": 0}
    values |= {"dataset_name": data_set, "caption_column": "text", "train_batch_size": 1, "output_dir": output}
    own = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return main(["train", *own, "--center_crop", *flags])


def test_a_run_of_a_data_set_whose_text_encoder_is_trained_without_its_last_layer(base, data_set, tmp_path, capfd):
    prior = ["--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a photo"]
    flags = [*prior, "--num_class_images", "1", "--infer_steps", "1", "--train_text_encoder", "--text_encoder_lr", "1"]
    flags += ["--validation_prompt", "star", "--num_validation_images", "1", "--validation_steps", "2"]
    flags += [
        "--max_train_steps",
        "2",
        "--checkpointing_steps",
        "2",
        "--save_precision",
        "fp16",
        "--lr_warmup_steps",
        "0",
    ]
    output = tmp_path / "run"
    assert run(base, data_set, output, *flags, "--clip_skip", "1") == 0, capfd.readouterr().err
    result = open_tensor_file(output / "pytorch_lora_weights.safetensors").tensors
    assert {tensor.dtype for tensor in result.values()} == {DType.F16}
    raised = {name for name, tensor in result.items() if ".up." in name if tensor.read().any()}
    of_text = {int(name.split("layers.")[1][0]) for name in raised if "layers." in name}
    assert of_text == {0, 1}, "the last layer is not read"
    state = open_tensor_file(next((output / "checkpoint-2").glob("*state*.safetensors"))).tensors
    assert {tensor.dtype for tensor in state.values()} == {DType.F32}
    pictures = [*(tmp_path / "class").iterdir(), *(output / "validation").glob("*.png")]
    assert [read_settings(path).get("clip_skip") for path in pictures if read_settings(path)] == [1, 1]
    capfd.readouterr()
    assert run(base, data_set, output, *flags) == 2
    assert "--clip_skip: 1 there, 0 here" in capfd.readouterr().err
    resumed = ["--resume_from_checkpoint", str(output / "checkpoint-2")]
    assert run(base, data_set, tmp_path / "other", *flags, *resumed) == 2
    assert "belongs to another training (--clip_skip: 1 there, 0 here)" in capfd.readouterr().err


@pytest.fixture
def planned(base, data_set, monkeypatch):
    """Output folder and flags -> the batches of a run, just before it would train."""
    made = []
    monkeypatch.setattr(command, "train", lambda step, batches, *rest: made.append(batches))

    def plan(output, *flags):
        assert run(base, data_set, output, "--max_train_steps", "5", *flags) == 0
        return made[-1]

    return plan


def test_rows_read_the_layer_that_sampling_reads_and_caches_know_it(base, planned, tmp_path):
    skipped = planned(tmp_path / "1", "--clip_skip", "2")
    # What another run has cached is not taken for this one's.
    shutil.copytree(tmp_path / "1" / "cache", tmp_path / "2" / "cache")
    whole = planned(tmp_path / "2")
    for batches, skip in ((skipped, 2), (whole, 0)):
        sampled = SamplingModel(open_bundle(base)).embeddings(SampleRequest(prompts=tuple(CAPTIONS), clip_skip=skip))
        for step in range(5):
            ((_, _, view),) = batches.plan.rows(step)
            read = batches(step).inputs["encoder_hidden_states"][0]
            assert np.abs(read - sampled[view.prompt].text).max() < 1e-5
    read = [batches(0).inputs["encoder_hidden_states"] for batches in (skipped, whole)]
    assert np.abs(read[0] - read[1]).max() > 1e-2
    assert {row.view.prompt for step in range(5) for row in whole.plan.rows(step)} == set(CAPTIONS)


@pytest.mark.parametrize(
    ("flags", "steps", "each"),
    [
        ([], 9, 1),
        (["--num_train_epochs", "2", "--repeats", "3"], 54, 6),
        (["--num_train_epochs", "3", "--train_batch_size", "3"], 9, 3),
        (["--num_train_epochs", "2", "--repeats", "2", "--use_aspect_ratio_bucket"], 36, 4),
        (["--num_train_epochs", "4", "--train_batch_size", "4", "--gradient_accumulation_steps", "2"], 8, 7.1),
    ],
)
def test_an_epoch_has_every_picture_as_often_as_it_says(base, tmp_path, monkeypatch, flags, steps, each):
    """Of six tall, two square and one wide picture in a folder; the last rows of an epoch fill a step."""
    (tmp_path / "set").mkdir()
    for number, size in enumerate([(40, 72)] * 6 + [(50, 50)] * 2 + [(90, 60)]):
        Image.new("RGB", size, (9 * number, 99, 200)).save(tmp_path / "set" / f"{number}.png")
    rows = [{"file_name": f"{n}.png", "text": CAPTIONS[n % 5]} for n in range(9)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = []
    monkeypatch.setattr(
        command, "train", lambda step, batches, parts, rate, steps, *rest: made.append((batches, parts, steps))
    )
    assert run(base, tmp_path / "set", tmp_path / "run", *flags) == 0
    (batches, parts, planned_steps) = made[0]
    assert planned_steps == range(steps)
    seen = Counter(row.view.record.path for batch in range(steps * parts) for row in batches.plan.rows(batch))
    assert len(seen) == 9
    assert all(abs(count - each) < 1 for count in seen.values()), seen


def test_layers_that_are_not_there_end_the_run_before_any_work(base, data_set, tmp_path, capfd):
    assert run(base, data_set, tmp_path / "run", "--clip_skip", "3", "--max_train_steps", "5") == 2
    assert "--clip_skip: expected 0 to 2, as its text encoders have layers, got 3" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()

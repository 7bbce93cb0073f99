"""New words from the command line: runs that are stopped and go on, in half precision, words that are done early."""

import shutil
from itertools import pairwise

import numpy as np
import pytest

from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.open import read_tensors
from dreambooth_ms.training.checkpoint import REPLACEMENTS, STATE
from dreambooth_ms.training.history import HISTORY, read_history
from tests.tiny_model import write_random_model
from tools.tiny_base.world import write_subject

STEPS = 5
ROWS = "text_model.embeddings.token_embedding.new_rows"
WORDS = ("<new1>", "<new2>")
# The first step overflows: its scale is 2^32, and 2^12 from then on.
HALF = {"mixed_precision": "fp16", "init_loss_scale": 2.0**32, "loss_scale_factor": 2.0**20, "use_ema": True}
CUSTOM_DIFFUSION = {
    "method": "custom_diffusion",
    "with_prior_preservation": True,
    "class_data_dir": "class",
    "class_prompt": "a photo",
    "num_class_images": 5,
    "learning_rate": 1e-3,
    **HALF,
}
EARLY = {"method": "lora", "train_new_words": True, "train_text_encoder_ti_frac": 0.5, "adam_weight_decay": 1.0}
RUNS = {"custom_diffusion": CUSTOM_DIFFUSION, "lora": EARLY}


def train(name):
    """A run into the folder `name`, with a checkpoint after each step."""
    wanted = {
        "pretrained_model_name_or_path": "base",
        "instance_data_dir": "photographs",
        "instance_prompt": "a photo of <new1> star <new2>",
        "modifier_token": "+".join(WORDS),
        "resolution": 32,
        "train_batch_size": 1,
        "max_train_steps": STEPS,
        "checkpointing_steps": 1,
        "seed": 1,
        "output_dir": name,
        **RUNS[name],
    }
    assert main(["train", *(part for flag, value in wanted.items() for part in (f"--{flag}", str(value)))]) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "base", levels=0)
    write_subject(home / "photographs")
    write_subject(home / "class")
    return home


@pytest.fixture(scope="module", params=RUNS)
def run(request, home):
    """A whole run, and what it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(request.param)
    return home / request.param


def state(run, step):
    """Trained weights, moments and averages after a step."""
    return read_tensors(run / f"checkpoint-{step}" / STATE)[0]


def results(run):
    return {path.name: path.read_bytes() for path in (*run.glob("*.safetensors"), run / HISTORY)}


def test_every_step_trains_the_words_that_prompts_have(run):
    """But not a step that is skipped, nor one after their share of the run."""
    skipped = [line.get("skipped_steps", 0) for line in read_history(run)]
    rows = [state(run, step)[ROWS] for step in range(1, STEPS + 1)]
    moved = [not np.array_equal(*pair) for pair in pairwise(rows)]
    if run.name == "lora":
        assert skipped == [0] * STEPS
        assert moved == [True, False, False, False]
    else:
        assert skipped == [1] * STEPS
        assert moved == [True] * (STEPS - 1)


def test_words_that_are_done_stay_while_all_else_is_trained(run):
    early, late = state(run, 2), state(run, STEPS)
    moved = {name for name in early if not np.array_equal(early[name], late[name])}
    assert (ROWS in moved) == (run.name != "lora")
    assert moved | {ROWS} >= {name for name in early if "lora_" in name or "attn2" in name}


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, monkeypatch, step):
    """Before the words of one are done, and after."""
    monkeypatch.chdir(run.parent)
    whole, expected = results(run), {name: values.tobytes() for name, values in state(run, STEPS).items()}
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(run / f"checkpoint-{later}")
    for path in run.glob("*.safetensors"):
        path.unlink()
    train(run.name)
    assert {name: values.tobytes() for name, values in state(run, STEPS).items()} == expected
    assert results(run) == whole


def test_the_result_is_the_average_of_the_words_and_layers(run):
    held, average = state(run, STEPS), "average." if run.name == "custom_diffusion" else ""
    for number, word in enumerate(WORDS):
        tensors, _ = read_tensors(run / f"{word}.safetensors")
        assert np.array_equal(tensors[word], held[average + ROWS][number])
    if average:
        tensors, _ = read_tensors(run / REPLACEMENTS)
        assert len(tensors) == sum(name.startswith(average) for name in held) - 1
        for name, values in tensors.items():
            own = name.replace(".processor.", ".").replace("_custom_diffusion", "")
            assert np.array_equal(values, held[average + own])

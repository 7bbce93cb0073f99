"""The main job on the embedded base, shortened: photographs in, a trained adapter and a before/after sheet out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.whole_loras import read_lora

ROOT = Path(__file__).parents[2]

# Fewer steps, of twice the rows, so that the losses of so few can be compared.
SHORTER = {
    "--max_train_steps": "80",
    "--train_batch_size": "4",
    "--num_class_images": "24",
    "--infer_steps": "25",
    "--checkpointing_steps": "40",
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder that looks like a fresh clone, after a shortened quickstart; returns it and what was printed."""
    home = tmp_path_factory.mktemp("clone")
    for name in ("checkpoints", "configs", "demo", "tools", "dreambooth_ms"):
        (home / name).symlink_to(ROOT / name)
    return home, run(home)


def run(home):
    flags = [part for pair in SHORTER.items() for part in pair]
    done = subprocess.run(
        [sys.executable, "-m", "tools.quickstart", *flags], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_loss_falls(quickstart):
    home, _ = quickstart
    history = [json.loads(line) for line in (home / "runs/quickstart/history.jsonl").read_text().splitlines()]
    losses = [line["instance_loss"] for line in history]
    assert len(losses) == 80
    assert np.mean(losses[-25:]) < 0.9 * np.mean(losses[:25])


def test_the_subject_similarity_rises_and_plain_stars_stay_what_they_are(quickstart):
    home, _ = quickstart
    metrics = json.loads((home / "runs/quickstart/metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert after["subject_similarity"] > before["subject_similarity"] + 0.05
    assert before["class_drift"] == pytest.approx(0, abs=1e-6)
    assert after["class_drift"] < 0.5


def test_the_folder_holds_adapter_config_sheet_curve_and_figures(quickstart):
    home, _ = quickstart
    folder = home / "runs/quickstart"
    adapters = read_lora(folder, home / "checkpoints/tiny-shapes")
    assert {name: {(one.rank, one.alpha) for one in own.values()} for name, own in adapters.items()} == {
        "unet": {(4, 4.0)}
    }
    assert "rank: 4" in (folder / "config.yaml").read_text()
    for name in ("before_after.png", "loss.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 400
    assert len(list((folder / "class_images").glob("*.png"))) == 24


def test_it_prints_the_figures_and_what_to_try_next(quickstart):
    _, printed = quickstart
    assert "subject similarity" in printed
    assert "dreambooth-ms sample" in printed


def test_run_again_it_says_what_exists_and_ends_well(quickstart):
    home, _ = quickstart
    before = (home / "runs/quickstart/pytorch_lora_weights.safetensors").stat().st_mtime_ns
    assert "is complete" in run(home)
    assert (home / "runs/quickstart/pytorch_lora_weights.safetensors").stat().st_mtime_ns == before

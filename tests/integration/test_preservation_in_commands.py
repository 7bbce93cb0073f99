"""`train --prior_preservation`: a run goes on bit for bit, and preserves nothing before it has changed something."""

import pytest

from tests.integration.test_run_modes import Place


def train(name, form, steps, *flags):
    return [
        *("train", "--seed", "7", "--output_dir", name, "--max_train_steps", str(steps), "--checkpointing_steps", "2"),
        *("--pretrained_model_name_or_path", "model", "--resolution", "32", "--random_flip", "--lora_dropout", "0.5"),
        *("--instance_data_dir", "dog", "--instance_prompt", "a photo of star", "--train_batch_size", "1"),
        *("--prior_preservation", form, *flags),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("runs"))


def test_a_run_with_the_bases_answers_goes_on_bit_for_bit(place):
    classes = ("--class_prompt", "a photo")
    printed = place.run(*train("straight", "base_output", 4, *classes), cache="graphs")
    assert "class:" not in printed
    place.run(*train("parts", "base_output", 2, *classes), cache="graphs")
    assert "resuming from" in place.run(*train("parts", "base_output", 4, *classes), cache="graphs")
    assert place.state("parts", 4) == place.state("straight", 4)
    history = place.history("straight")
    assert place.history("parts") == history
    # A fresh adapter changes nothing, whatever it drops; the second step has something to preserve.
    assert history[0]["class_loss"] == pytest.approx(0, abs=1e-10)
    assert history[1]["class_loss"] > 1e-9


def test_a_penalty_is_in_the_loss_as_soon_as_something_changed(place):
    place.run(*train("l2", "base_l2", 3, "--base_l2_weight", "1000"), cache="graphs")
    first, *others = place.history("l2")
    assert first["loss"] == pytest.approx(first["instance_loss"], rel=1e-6)
    assert all(step["loss"] > 1.001 * step["instance_loss"] for step in others)

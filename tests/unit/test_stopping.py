"""When a run stops by itself, and which of its checkpoints is the best: by numbers that were reckoned by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from dreambooth_ms.config.load import load
from dreambooth_ms.config.stopping import StoppingConfig
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.batches import Batch
from dreambooth_ms.diffusion import EdmSpec, LossConfig, NoiseScheduleSpec, draw_columns
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.randomness import generator
from dreambooth_ms.training.checkpoint import checkpoint_folder, checkpoint_folders, open_checkpoint, save_checkpoint
from dreambooth_ms.training.loop import StepReport, train
from dreambooth_ms.training.stopping import best_step, end_when_settled, settled, variance_ratio
from tools import bench_stopping
from tools.bench_methods import Fidelity

REQUIRED = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "dog", "--instance_prompt", "a sks dog"]


def config(*flags, notes=None):
    return load(TrainConfig, [*REQUIRED, *flags], [].append if notes is None else notes.append)


class TestVarianceRatio:
    def test_it_is_the_variance_of_the_newest_over_that_of_all(self):
        # All: mean 1.5, squares 2.25 + 2.25 + 6.25 + 0.25 = 11, over 4. Newest: mean 3, squares 1 + 1, over 2.
        assert variance_ratio([0, 0, 4, 2], 2) == pytest.approx(1 / (11 / 4))
        # Newest three: mean 2, squares 4 + 4 + 0, over 3.
        assert variance_ratio([0, 0, 4, 2], 3) == pytest.approx((8 / 3) / (11 / 4))

    @pytest.mark.parametrize("losses", [[], [1.0], [2.0, 1.0], [1.0, 1.0, 1.0], [1.0, float("nan"), 1.0]])
    def test_there_is_none_of_as_few_as_the_newest_nor_of_equal_ones(self, losses):
        assert np.isnan(variance_ratio(losses, 2))


LOSSES = [8.0, 4.0, 2.0, 2.0, 2.0, 2.0]
"""The first three: mean 14/3, squares (100 + 4 + 64) / 9, so a variance of 56/9. The first four: mean 4, variance 6."""


class TestEarlyStop:
    STOPPING = StoppingConfig(validation_loss=True, early_stop=True, early_stop_patience=2, early_stop_threshold=0.15)

    def ends(self, stopping, losses, earlier=()):
        """Numbers of the losses at which the hook ends the run."""
        measured, found = [*earlier], []
        for number, loss in enumerate(losses, len(earlier) + 1):
            report = StepReport(number, 1.0, {}, 1.0, 1e-4, measured={"validation_loss": loss})
            given = end_when_settled(stopping, measured, report)
            assert given is None or given == replace(report, ended=given.ended)
            found += [number] if given else []
            measured.append({"step": number, "validation_loss": loss})
        return found

    def test_it_ends_where_the_ratio_falls_below_the_threshold(self):
        assert variance_ratio(LOSSES[:3], 2) == pytest.approx(1 / (56 / 9))
        assert self.ends(self.STOPPING, LOSSES) == [4, 5, 6]
        assert self.ends(replace(self.STOPPING, early_stop_threshold=0.17), LOSSES) == [3, 4, 5, 6]
        # Newest three of four: mean 8/3, squares (16 + 4 + 4) / 9, so 8/9 of 6.
        assert variance_ratio(LOSSES[:4], 3) == pytest.approx(8 / 9 / 6)
        longer = replace(self.STOPPING, early_stop_patience=3)
        assert self.ends(replace(longer, early_stop_threshold=0.149), LOSSES) == [4, 5, 6]
        assert self.ends(replace(longer, early_stop_threshold=0.148), LOSSES) == [5, 6]

    def test_a_resumed_run_ends_where_it_would_have(self):
        earlier = [{"step": n, "validation_loss": loss} for n, loss in enumerate(LOSSES[:2], 1)]
        earlier[1]["fidelity"] = 0.5
        assert self.ends(self.STOPPING, LOSSES[2:], [*earlier[:1], {"step": 1, "fidelity": 0.2}, *earlier[1:]]) == [
            5, 6, 7,
        ]  # fmt: skip
        measured = [{"step": n, "validation_loss": loss} for n, loss in enumerate(LOSSES[:4], 1)]
        assert settled(self.STOPPING, measured).startswith(
            "the validation loss has settled: the variance of the newest 2 of 4 is 0.000 of that of all, below "
            "--early_stop_threshold 0.15"
        )
        assert settled(replace(self.STOPPING, early_stop=False), measured) == ""

    def test_steps_without_a_loss_end_nothing(self):
        measured = [{"step": n, "validation_loss": loss} for n, loss in enumerate(LOSSES, 1)]
        assert end_when_settled(self.STOPPING, measured, StepReport(9, 1.0, {}, 1.0, 1e-4)) is None

    def test_the_loop_ends_after_the_hooks_of_that_step_which_see_the_reason(self):
        class Step:
            scaler, optimiser = None, SimpleNamespace(prepare=lambda *_: None)

            def take(self, batches):
                (_,) = batches
                return Tensor(np.float32(1)), [Tensor(np.ones(1, np.float32))], Tensor(np.float32(1))

        batch = Batch({"sample": np.ones((1, 1, 1, 1), np.float32)}, np.ones(1, np.float32), np.ones(1), ("instance",))
        seen = []
        hooks = [lambda report: replace(report, ended="enough" if report.step == 3 else ""), seen.append]
        last = train(Step(), lambda number: batch, 1, lambda update: 1e-4, range(9), hooks)
        assert (last.step, last.ended, [one.ended for one in seen]) == (3, "enough", ["", "", "enough"])


class TestBestStep:
    MEASURED = (
        {"step": 2, "validation_loss": 0.5, "fidelity": 0.4},
        {"step": 4, "validation_loss": 0.3, "fidelity": 0.6},
        {"step": 5, "validation_loss": 0.1},
        {"step": 6, "validation_loss": 0.3, "fidelity": 0.6},
        {"step": 8, "validation_loss": 0.4, "fidelity": float("nan")},
    )

    @pytest.mark.parametrize(
        ("by", "now", "there", "best"),
        [
            ("loss", 8, (2, 4, 6), 4),  # 5 was no checkpoint, and 6 is no better.
            ("fidelity", 8, (2, 4, 6), 4),
            ("fidelity", 8, (2, 6), 6),
            ("loss", 5, (2, 4), 5),
            ("fidelity", 8, (), 8),
            (None, 8, (2, 4), 8),
        ],
    )
    def test_it_is_the_first_of_the_best_that_are_there(self, tmp_path, by, now, there, best):
        for step in there:
            checkpoint_folder(tmp_path, step).mkdir()
        wanted = config("--output_dir", str(tmp_path))
        wanted = replace(wanted, stopping=replace(wanted.stopping, keep_best=by))
        assert best_step(wanted, self.MEASURED, now) == best

    @pytest.mark.parametrize("keep", [1, 2, 3, 4, 5])
    def test_the_best_stays_beside_as_many_of_the_newest_as_are_kept(self, tmp_path, keep):
        for step in range(1, 8):
            save_checkpoint(tmp_path, step, [], "", lambda target, step: None, keep, {}, self.MEASURED, min(step, 2))
            newest = set(range(max(1, step - keep + 1), step + 1))
            if step > keep + 1:
                held = {open_checkpoint(path).step for path in checkpoint_folders(tmp_path)}
                assert held == newest | {2}
        assert open_checkpoint(tmp_path / "checkpoint-7").measured[:4] == [*self.MEASURED[:4]]

    def test_none_goes_before_there_are_too_many(self, tmp_path):
        for step in range(1, 5):
            save_checkpoint(tmp_path, step, [], "", lambda target, step: None, keep=4)
        assert len(checkpoint_folders(tmp_path)) == 4


@pytest.mark.parametrize("spec", [NoiseScheduleSpec(), EdmSpec()])
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(min_timestep=200, max_timestep=600)])
def test_timesteps_are_one_of_each_section_of_the_range_and_of_each_part_spread_over_it(spec, loss):
    low, high = loss.min_timestep, loss.max_timestep or 1000
    times = [
        draw_columns(spec, loss, (part, 4))([generator(7, "row", 4 * part + row) for row in range(4)]).time
        for part in range(4)
    ]
    levels = np.arange(1000) if isinstance(spec, NoiseScheduleSpec) else np.log(spec.sigmas) / 4
    places = (np.array([[np.abs(levels - one).argmin() for one in own] for own in times]) - low) / (high - low)
    assert sorted((places * 16).astype(int).ravel()) == list(range(16))
    assert all((own * 4).astype(int).tolist() == [0, 1, 2, 3] for own in places)


class TestSettings:
    @pytest.mark.parametrize(
        ("flags", "line"),
        [
            ("--early_stop", "--early_stop: needs --validation_loss, which says when"),
            ("--keep_best loss", "--keep_best loss: needs --validation_loss, and --checkpointing_steps that are a"),
            (
                "--keep_best loss --validation_loss --checkpointing_steps 25",
                "--keep_best loss: needs --validation_loss, and --checkpointing_steps that are a multiple of its steps "
                "(10), so that each checkpoint has a loss",
            ),
            ("--keep_best fidelity", "--keep_best fidelity: needs --instance_prompt and --class_prompt, whose"),
            (
                "--keep_best fidelity --class_prompt x --max_train_steps 500",
                "--keep_best: there is no checkpoint before the end; lower --checkpointing_steps 500",
            ),
            ("--validation_loss --early_stop --early_stop_patience 1", "--early_stop_patience: expected at least 2"),
            ("--keep_best nothing", "--keep_best: expected one of fidelity, loss, or None, got 'nothing'"),
        ],
    )
    def test_what_does_not_go_together_is_one_line_with_the_remedy(self, flags, line):
        with pytest.raises(ConfigError) as error:
            config(*flags.split())
        (said,) = str(error.value).splitlines()
        assert said.startswith(line)

    def test_photographs_are_held_out_of_one_subject(self):
        flags = ["--concepts_list", "x.json", "--validation_loss", "--held_out_data_dir", "y"]
        with pytest.raises(ConfigError, match="--held_out_data_dir: and --concepts_list: only photographs of one subj"):
            load(TrainConfig, [*REQUIRED[:2], *flags])

    @pytest.mark.parametrize(
        ("flags", "note"),
        [
            ("--held_out_data_dir x", "has no effect without --validation_loss or --keep_best fidelity"),
            ("--clip x", "--clip has no effect without --keep_best fidelity"),
            ("--early_stop_patience 3", "--early_stop_patience has no effect without --early_stop"),
            (
                "--validation_loss --early_stop --max_train_steps 200",
                "--early_stop: 20 losses, one in 10 steps, are not there before the end; lower --early_stop_patience",
            ),
        ],
    )
    def test_what_is_doubtful_is_noted(self, flags, note):
        notes = []
        config(*flags.split(), notes=notes)
        assert len(notes) == 1
        assert notes[0].endswith(note)

    def test_what_the_best_is_chosen_by_has_an_effect(self):
        notes = []
        flags = "--keep_best fidelity --class_prompt x --validation_seed 3 --validation_inference_steps 9 --clip y"
        config(*flags.split(), "--held_out_data_dir", "z", notes=notes)
        assert notes == []


def test_the_tool_counts_what_ended_in_time_and_was_chosen_well(tmp_path):
    def of(similarity, drift):
        return Fidelity(similarity, drift)

    # Half of the steps for a loss of 1 %; more than half for one of 10 %, and the choice was a worse one.
    good = bench_stopping.Outcome("star", 0, 100, 50, 70, {50: of(0.594, 0.1), 70: of(0.6, 0.1), 100: of(0.6, 0.2)})
    bad = bench_stopping.Outcome("heart", 0, 100, 60, 30, {30: of(0.2, 0.0), 60: of(0.45, 0.1), 100: of(0.5, 0.2)})
    assert bench_stopping.report([good, bad]).splitlines()[2:] == [
        "| star | 0 | 50 of 100 | 0.594 (-1.0%) | 0.600 | 70 | 0.500 | 0.400 |",
        "| heart | 0 | 60 of 100 | 0.450 (-10.0%) | 0.500 | 30 | 0.200 | 0.300 |",
        "",
        "ended within 50% of the steps: 1 of 2",
        "lost at most 2% of the similarity by it: 1 of 2",
        "the best is at least as good as the end: 1 of 2",
        "similarity where it ended, mean: -5.5%",
    ]
    for subject in bench_stopping.SUBJECTS:
        folder = bench_stopping.write_photographs(tmp_path, subject)
        written = {path.read_bytes() for path in folder.rglob("*.png")}
        assert len(written) == bench_stopping.TRAINED + bench_stopping.HELD_OUT
        flags = bench_stopping.flags_of(subject, folder, tmp_path / "run", 600, 50, 0)
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        assert load(TrainConfig, words).stopping.keep_best == "fidelity"

"""The tools that time us beside diffusers: what they compare is the same work, and a failed process is not timed."""

import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.models.specs import UNetSpec
from tools import bench_run, bench_sample, bench_step

SMALLEST = UNetSpec(
    block_out_channels=(8, 8),
    has_attention=(True, False),
    num_heads=(1, 1),
    cross_attention_dim=8,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=4,
)
SMALLEST_SDXL = replace(
    SMALLEST,
    has_attention=(False, True),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=12 + 6 * 4,
)
PROCESS = "import sys, time; from tools.bench_run import PARTS\n"


def test_tiny_is_the_embedded_bases_size():
    from tools import train_tiny_base

    size = bench_step.SIZES["tiny"]
    assert size.unet == train_tiny_base.UNET
    assert size.downsampling == train_tiny_base.VAE.downsampling


@pytest.mark.parametrize(
    ("flags", "latent_size", "method"),
    [
        ([], 16, "lora"),
        (["--resolution", "32", "--method", "full"], 8, "full"),
        (["--size", "sd15"], 64, "lora"),
        (["--size", "sdxl"], 64, "lora"),
    ],
)
def test_the_command_line_of_a_step_says_what_is_timed(flags, latent_size, method):
    _, job = bench_step.parse(flags)
    assert (job.latent_size, job.method, job.mixed_precision) == (latent_size, method, "no")
    assert bench_step.parse([*flags, "--mixed_precision", "fp16"])[1].mixed_precision == "fp16"


@pytest.mark.parametrize("flags", [["--resolution", "40"], ["--pairs", "0"], ["--steps", "0"]])
def test_what_cannot_be_timed_is_refused(flags):
    with pytest.raises(SystemExit):
        bench_step.parse(flags)


@pytest.mark.parametrize(
    ("unet", "method"),
    [(SMALLEST, "lora"), (SMALLEST, "full"), (SMALLEST_SDXL, "lora")],
    ids=["lora", "full", "SDXL"],
)
def test_both_sides_train_the_same_weights_from_the_same_values(unet, method):
    """That their first losses are the same is checked whenever they are timed."""
    job = bench_step.Job(unet, latent_size=4, method=method, steps=1)
    ours, peer = (
        {name: read().ravel() for name, read in build(job, lambda _: None).trained.items()}
        for build in bench_step.SIDES.values()
    )
    assert ours.keys() == peer.keys()
    for name, value in ours.items():
        # Convolutions are stored in another order on our side.
        assert np.array_equal(np.sort(value), np.sort(peer[name]))


@pytest.fixture
def take_on(monkeypatch):
    """A job whose only side takes a given kind of step on one weight."""

    def with_step(loss, change):
        weight = np.ones(3)

        def take(rows, step):
            weight[:] += change
            return loss, 1.0

        def build(job, mark, processes):
            mark("imported")
            return bench_step.Side(take, {"weight": lambda: weight})

        monkeypatch.setitem(bench_step.SIDES, "fake", build)
        return bench_step.Job(SMALLEST, latent_size=4, method="lora", steps=2)

    return with_step


def test_a_process_times_every_step(take_on):
    report = bench_step.measure("fake", take_on(0.5, 0.1), time.monotonic())
    assert 0 < report["imported"] <= report["built"] <= report["first_step"]
    assert len(report["times"]) == 3
    assert report["losses"] == [0.5, 0.5, 0.5]
    assert report["peak_memory"] > 2**20


@pytest.mark.parametrize(("loss", "change", "reason"), [(np.nan, 0.1, "loss is nan"), (0.5, 0.0, "did not change")])
def test_a_broken_step_is_not_timed(take_on, loss, change, reason):
    with pytest.raises(SystemExit, match=reason):
        bench_step.measure("fake", take_on(loss, change), time.monotonic())


def test_different_losses_are_different_work():
    with pytest.raises(SystemExit, match="do not do the same"):
        bench_step.check_same_work({"losses": [1.0]}, {"losses": [1.1]})


def test_a_process_reports_in_its_last_line_of_json():
    report = bench_step.run_child(
        [sys.executable, "-c", "import sys; print('x'); print('{\"a\": 1}'); print(sys.argv)"]
    )
    assert report == {"a": 1}


@pytest.mark.parametrize("code", ["print('{}'); raise SystemExit(1)", "print('nothing')"])
def test_a_process_that_fails_or_says_nothing_is_not_timed(code):
    with pytest.raises(SystemExit, match="no measurement"):
        bench_step.run_child([sys.executable, "-c", code])


def test_the_step_is_the_median_without_the_first_step():
    report = {"times": [9.0, 1.0, 2.0, 3.0], "first_step": 15.0, "imported": 2.0, "built": 5.0, "peak_memory": 2**31}
    assert list(bench_step.figures(report).values()) == [2.0, 15.0, 2.0, 3.0, 7.0, 2.0]


def test_on_a_card_only_ours_is_timed_with_the_memory_of_the_card():
    args, job = bench_step.parse(["--device", "Ascend", "--jit_level", "O1"])
    assert (args.only, job.device, job.jit_level) == ("ours", "Ascend", "O1")
    with pytest.raises(SystemExit):
        bench_step.parse(["--device", "Ascend", "--only", "peer"])
    report = {"times": [9.0, 1.0], "first_step": 15.0, "imported": 2.0, "built": 5.0, "peak_memory": 2**31}
    assert bench_step.figures(report | {"card_memory": 3 * 2**30})["  of the card, GiB"] == 3.0


def test_the_table_shows_medians_and_ratios():
    pairs = [({"step": ours, "rest": 1.0}, {"step": peer, "rest": 0.0}) for ours, peer in ((1, 2), (3, 2), (2, 4))]
    _, step, rest = bench_step.ratio_table(pairs).splitlines()
    assert step.split() == ["step", "2.000", "2.000", "1.00", "(0.50", "1.50", "0.50)"]
    assert rest.split() == ["rest", "1.000", "0.000", "-", "(-", "-", "-)"]


@pytest.fixture
def run_job(tmp_path):
    (tmp_path / "model_index.json").touch()
    _, job = bench_run.parse(["--base", str(tmp_path), "--steps", "7", "--batch_size", "3"])
    return job


def test_a_run_needs_a_base(tmp_path):
    with pytest.raises(SystemExit):
        bench_run.parse(["--base", str(tmp_path)])


def test_our_run_is_the_job(run_job, tmp_path):
    config = load(TrainConfig, bench_run.our_command(run_job, tmp_path / "run")[4:])
    assert (config.run.max_train_steps, config.run.train_batch_size) == (run_job.steps, run_job.batch_size)
    assert (config.data.resolution, config.prior.num_class_images) == (run_job.resolution, run_job.num_class_images)
    assert config.prior.with_prior_preservation
    assert config.method.lora_target_modules == bench_step.TARGETS


def test_the_peers_run_is_the_same_job(run_job, tmp_path):
    args, job = bench_run.parse(bench_run.peer_command(run_job, tmp_path)[3:])
    assert (job, args.peer_folder) == (run_job, tmp_path)


def test_rows_go_through_all_pictures():
    rows = bench_run.endless_rows(["a", "b", "c"], 2)
    assert [next(rows) for _ in range(3)] == [["a", "b"], ["c", "a"], ["b", "c"]]


def test_a_run_is_timed_as_a_whole_and_in_parts(tmp_path):
    code = PROCESS + "for _, words in PARTS: time.sleep(0.02); print(words, file=sys.stderr, flush=True)"
    figures = bench_run.watch([sys.executable, "-c", code], {})
    memory, whole = figures.pop("peak memory, GiB"), figures.pop("whole run, s")
    assert sum(figures.values()) == pytest.approx(whole)
    assert len(figures) == len(bench_run.PARTS) + 1
    assert memory > 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (PROCESS + "print([words for _, words in PARTS], file=sys.stderr); sys.exit(3)", "status 3"),
        (PROCESS + "print(PARTS[0][1], file=sys.stderr)", "never said"),
    ],
)
def test_a_run_that_fails_or_leaves_out_a_part_is_not_timed(tmp_path, code, reason):
    with pytest.raises(SystemExit, match=reason):
        bench_run.watch([sys.executable, "-c", code], {})


@pytest.mark.parametrize("flags", [["--steps", "1"], ["--pairs", "0"], ["--base", "nowhere"]])
def test_what_pictures_cannot_be_timed_is_refused(flags):
    with pytest.raises(SystemExit):
        bench_sample.parse(flags)


@pytest.fixture
def sample_on(monkeypatch):
    """A job whose only side samples chosen pictures, one after the other."""

    def with_pictures(*pictures):
        remaining = iter(pictures)

        def sample(step_done):
            for _ in range(3):
                step_done()
            return next(remaining)

        def build(job, mark):
            mark("imported")
            return sample

        monkeypatch.setitem(bench_sample.SIDES, "fake", build)
        return bench_sample.Job(bench_step.BASE, None, 3)

    return with_pictures


def test_a_process_times_the_steps_of_the_second_picture(sample_on):
    picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    report = bench_sample.measure("fake", sample_on(picture, picture), time.monotonic())
    assert 0 < report["imported"] <= report["first_picture"]
    assert len(report["steps"]) == 2
    assert report["levels"] == picture[::2, ::2].reshape(-1).tolist()
    figures = bench_sample.figures({**report, "steps": [1.0, 3.0, 2.0], "peak_memory": 2**31})
    assert (figures["step, s"], figures["peak memory, GiB"]) == (2.0, 2.0)


@pytest.mark.parametrize("pictures", [(np.zeros((8, 8, 3)),) * 2, (np.eye(8), np.eye(8)[::-1])], ids=["flat", "other"])
def test_a_picture_that_shows_nothing_or_changes_is_not_timed(sample_on, pictures):
    with pytest.raises(SystemExit, match="flat, or was another one"):
        bench_sample.measure("fake", sample_on(*pictures), time.monotonic())


def test_different_pictures_are_different_work():
    bench_sample.check_same_picture({"levels": [10, 20]}, {"levels": [11, 18]})
    with pytest.raises(SystemExit, match="differ by 3 of 255 levels"):
        bench_sample.check_same_picture({"levels": [10, 20]}, {"levels": [10, 23]})

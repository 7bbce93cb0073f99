"""The page's engine: one request at a time, a process for the model, and nothing that it does ends the page."""

import os
import sys
import time

import numpy as np
import pytest

from demo.engine import LONGEST_QUEUE, Engine, QueueFullError
from demo.gallery import MOST, added, entries_of
from demo.messages import ModelChoice, PictureRequest
from tests.picture_settings import read_settings

PROCESS = (sys.executable, "-m", "tests.stub_sampling_process")
BASE = ModelChoice("base")


@pytest.fixture
def engine():
    engine = Engine(PROCESS)
    yield engine
    engine.close()


def request(prompt="a star", model=BASE, **settings):
    return PictureRequest(model, prompt, **{"width": 8, "height": 8, "num_inference_steps": 3, **settings})


def wait(job, seconds=30):
    end = time.monotonic() + seconds
    while not job.over:
        assert time.monotonic() < end, f"{job.state} {job.phase}"
        time.sleep(0.01)
    return job


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_pictures_arrive_with_the_progress_to_them(engine):
    job = wait(engine.submit(request(count=2)))
    assert job.state == "done"
    assert [picture.number for picture in job.pictures] == [0, 1]
    assert (job.step.step, job.step.steps, job.step.share) == (3, 3, 1.0)


def test_the_process_stays_between_requests_of_a_model(engine):
    wait(engine.submit(request()))
    first = engine.process.process_id
    wait(engine.submit(request(seed=7)))
    assert engine.process.process_id == first


def test_another_model_gets_a_new_process_and_the_old_one_is_gone(engine):
    wait(engine.submit(request()))
    first = engine.process.process_id
    wait(engine.submit(request(model=ModelChoice("another"))))
    assert engine.process.process_id != first
    assert not alive(first)


def test_a_model_with_adapters_samples_without_them_too():
    loaded = ModelChoice("base", ("one.safetensors", "two.safetensors"))
    assert loaded.serves(BASE)
    assert loaded.serves(ModelChoice("base", ("two.safetensors",)))
    assert not BASE.serves(loaded)
    assert not loaded.serves(ModelChoice("base", refiner="refiner"))


def test_requests_wait_for_each_other_and_know_their_place(engine):
    first, second, third = (engine.submit(request("slow", num_inference_steps=steps)) for steps in (5, 1, 1))
    wait_for(lambda: first.state == "working")
    assert (engine.ahead(second), engine.ahead(third)) == (1, 2)
    assert second.state == third.state == "waiting"
    wait(third)
    assert first.state == second.state == "done"


def test_each_job_keeps_its_own_pictures(engine):
    jobs = [engine.submit(request(seed=seed)) for seed in range(4)]
    for seed, job in enumerate(jobs):
        assert [picture.settings["seed"] for picture in wait(job).pictures] == [seed]


def test_a_waiting_request_is_cancelled_at_once(engine):
    first, second = engine.submit(request("slow", num_inference_steps=20)), engine.submit(request())
    engine.cancel(second)
    assert second.state == "cancelled"
    engine.cancel(first)
    wait(first)


def test_a_request_is_cancelled_after_its_step_and_the_model_stays(engine):
    job = engine.submit(request("slow", num_inference_steps=100))
    wait_for(lambda: job.step)
    process = engine.process.process_id
    engine.cancel(job)
    assert wait(job).state == "cancelled"
    assert job.step.step < 100
    assert wait(engine.submit(request())).pictures[0].settings["process"] == process


def test_what_was_sampled_before_a_cancellation_is_kept(engine):
    job = engine.submit(request("slow", count=9, num_inference_steps=2))
    wait_for(lambda: job.pictures)
    engine.cancel(job)
    wait(job)
    assert 1 <= len(entries_of(job)) < 9


def test_a_mistake_becomes_a_sentence(engine):
    job = wait(engine.submit(request("wrong")))
    assert (job.state, job.sentence) == ("failed", "no such model")
    assert wait(engine.submit(request())).state == "done"


def test_a_process_that_dies_becomes_a_sentence_and_the_next_request_works(engine):
    job = wait(engine.submit(request("crash")))
    assert job.state == "failed"
    assert "ended by itself" in job.sentence
    assert wait(engine.submit(request())).state == "done"


def test_the_queue_has_an_end(engine):
    jobs = [engine.submit(request("slow", num_inference_steps=50)) for _ in range(1)]
    wait_for(lambda: jobs[0].state == "working")
    jobs += [engine.submit(request()) for _ in range(LONGEST_QUEUE)]
    with pytest.raises(QueueFullError, match="are waiting already"):
        engine.submit(request())
    for job in jobs:
        engine.cancel(job)


def test_a_request_whose_window_was_closed_is_given_up(engine, monkeypatch):
    monkeypatch.setattr("demo.engine.UNWATCHED_SECONDS", 0.3)
    assert wait(engine.submit(request("slow", num_inference_steps=1000))).state == "cancelled"


def test_the_memory_is_given_back_on_request_and_at_the_end(engine):
    wait(engine.submit(request()))
    first = engine.process.process_id
    engine.unload()
    wait_for(lambda: engine.process is None)
    assert not alive(first)
    wait(engine.submit(request()))
    second = engine.process.process_id
    engine.close()
    assert not alive(second)


def test_pairs_are_pairs_and_files_hold_their_settings(engine, tmp_path):
    job = wait(engine.submit(request(model=ModelChoice("base", ("one",)), lora_scales=(1.0,), compare=True, seed=3)))
    (entry,) = entries_of(job)
    assert list(entry.files) == ["adapted", "base"]
    (tmp_path / "a.png").write_bytes(entry.files["base"])
    assert read_settings(tmp_path / "a.png")["seed"] == 3
    assert b'"seed": 3' in entry.settings_file
    assert entry.thumbnail().size == (16, 8)


def test_the_gallery_keeps_the_newest(engine):
    entries = entries_of(wait(engine.submit(request(count=2))))
    many = added(entries * MOST, entries)
    assert len(many) == MOST
    assert many[:2] == entries[::-1]


def test_the_time_left_is_estimated_from_the_second_step_on(engine):
    job = engine.submit(request("slow", num_inference_steps=30))
    wait_for(lambda: job.step and job.step.step >= 5)
    assert 0 < job.seconds_left < 60
    engine.cancel(job)
    wait(job)


def test_a_picture_to_start_from_reaches_the_process(engine):
    assert wait(engine.submit(request(image=np.zeros((8, 8, 3), np.uint8)))).state == "done"

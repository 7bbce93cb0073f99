"""What TensorBoard, wandb, swanlab and trackio are sent of a run, and that a run does not depend on them."""

import importlib.util
import json
import struct
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from dreambooth_ms.config.load import load, to_yaml
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.training.history import History, read_history
from dreambooth_ms.training.loop import StepReport
from dreambooth_ms.training.trackers import IDS, Trackers, installed_trackers
from tests.tracker_stubs import SERVICES, logged, services  # noqa: F401 - a fixture

TOKEN = "hf_a_token_that_nobody_may_see"
PICTURES = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 200)]
PROMPTS = ["a photo of sks dog", "sks dog, in the snow"]


def configured(folder, *flags):
    """A run in a folder, with a token if one can be given."""
    token = ["--hub_token", TOKEN] if "hub_token" in schema_fields(TrainConfig) else []
    required = ["--pretrained_model_name_or_path=base", "--instance_data_dir=photographs", "--instance_prompt=sks"]
    return load(TrainConfig, [*required, f"--output_dir={folder}", *token, *flags], tell=lambda note: None)


def report(step, loss=0.5):
    return StepReport(step, loss, {"dog": loss / 2}, 1.5, 1e-4, loss_scale=8.0, measured={"validation_loss": 0.25})


class Run:
    """A run that takes its steps in no time, from one that was stopped on."""

    def __init__(self, folder, flags, done=0):
        folder.mkdir(exist_ok=True)
        self.told, self.history = [], History(folder, done)
        self.trackers = Trackers(configured(folder, *flags), done, self.history.reached, self.told.append)

    def take(self, steps, loss=0.5):
        for step in steps:
            for log in (self.history.log, self.trackers.log):
                log(report(step, loss))

    def end(self):
        self.trackers.close()
        self.history.close()
        return self.told


EVERY = ["--report_to", *SERVICES]


def test_a_service_is_sent_the_run_its_steps_and_its_pictures(tmp_path, services, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["dreambooth-ms", "--hub_token", TOKEN])
    run = Run(tmp_path / "dog", EVERY)
    run.take([1, 2])
    run.trackers.images(2, "validation", PICTURES, PROMPTS)
    assert run.end() == []
    assert sys.argv[1:] == ["--hub_token", TOKEN]
    said = capsys.readouterr()
    assert said.out == "" and "a library talks" in said.err
    expected = yaml.safe_load(to_yaml(configured(tmp_path / "dog", *EVERY)))
    for name, service in services.items():
        begun = service.calls[0][1]
        assert [call for call, _, _ in service.calls] == ["init", "log", "log", "log", "finish"]
        assert (begun["project"], begun["resume"], begun["config"]) == ("dreambooth-lora", "allow", expected)
        assert TOKEN not in repr(service.calls)
        steps, history = logged(service), read_history(tmp_path / "dog")
        for line in history:
            sent = steps[line["step"]]
            assert line.items() <= (sent | {"step": line["step"]}).items(), name
            assert sent["step_seconds"] >= 0 and "step_seconds" not in line
        pictures = [steps[2][f"validation/{number}"] for number in range(2)]
        assert [one.caption for one in pictures] == PROMPTS
        assert all(np.array_equal(one.data, picture) for one, picture in zip(pictures, PICTURES, strict=True))
    assert expected["method"]["rank"] == 4


def test_each_library_is_told_the_run_in_its_own_words(tmp_path, services):  # noqa: F811
    folder = tmp_path / "dog"
    Run(folder, [*EVERY, "--tracker_project_name", "pets", "--wandb_run_name", "Rex"]).end()
    begun = {name: service.calls[0][1] for name, service in services.items()}
    ids = {name: own[0] for name, own in json.loads((folder / IDS).read_text()).items()}
    assert {one["project"] for one in begun.values()} == {"pets"}
    assert {"name": "Rex", "id": ids["wandb"], "dir": str(folder)}.items() <= begun["wandb"].items()
    assert {"experiment_name": "Rex", "id": ids["swanlab"]}.items() <= begun["swanlab"].items()
    assert begun["swanlab"]["logdir"].startswith(str(folder))
    assert begun["trackio"]["name"] == f"Rex-{ids['trackio'][:6]}"
    assert len({*ids.values()}) == 3
    assert all(len(own) == 21 and own.isalnum() and own == own.lower() for own in ids.values())


@pytest.mark.parametrize(
    ("method", "project"),
    [("full", "dreambooth"), ("custom_diffusion", "custom-diffusion"), ("textual_inversion", "textual_inversion")],
)
def test_the_project_is_that_of_the_published_script(tmp_path, services, method, project):  # noqa: F811
    word = ["--modifier_token", "<new>"] if method != "full" else []
    Run(tmp_path / "dog", ["--report_to", "wandb", "--method", method, *word]).end()
    assert services["wandb"].calls[0][1]["project"] == project


def test_a_run_that_goes_on_is_the_same_run_and_sends_nothing_twice(tmp_path, services):  # noqa: F811
    """Killed after step 7, and again after step 6; the checkpoint is of step 5."""
    folder, flags = tmp_path / "dog", ["--report_to", "wandb", "trackio"]
    for done, steps in ((0, range(1, 8)), (5, range(6, 7)), (5, range(6, 10))):
        Run(folder, flags, done).take(steps)
    Run(folder, [*EVERY, "--wandb_run_name", "another"], 8).take(range(9, 11))
    for name in ("wandb", "trackio"):
        begun = [values for call, values, _ in services[name].calls if call == "init"]
        assert len(begun) == 4
        assert len({(one.get("id"), one["name"]) for one in begun}) == 1
        assert [values[0] for call, values, _ in services[name].calls if call == "log"] == [*range(1, 11)]
    # It came later, and is sent all that there is from then on.
    assert [*logged(services["swanlab"])] == [9, 10]
    assert [line["step"] for line in read_history(folder)] == [*range(1, 11)]


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_a_service_that_fails_is_told_once_and_left_out(tmp_path, services, moment):  # noqa: F811
    services["wandb"].fails_at.add(moment)
    run = Run(tmp_path / "dog", EVERY)
    run.take([1, 2, 3])
    run.trackers.images(3, "validation", PICTURES, PROMPTS)
    assert run.end() == [f"wandb: no {moment} without a network; the training goes on without it"]
    assert [call for call, _, _ in services["wandb"].calls].count(moment) == 1 or moment == "log"
    assert services["wandb"].calls[-1][0] == moment
    assert [line["step"] for line in read_history(tmp_path / "dog")] == [1, 2, 3]
    for name in ("swanlab", "trackio"):
        assert [*logged(services[name])] == [1, 2, 3]
        assert services[name].calls[-1][0] == "finish"


def test_pictures_that_a_service_does_not_take_and_an_exit_do_not_stop_a_run(tmp_path, services, monkeypatch):  # noqa: F811
    run = Run(tmp_path / "dog", EVERY)
    monkeypatch.setattr(services["wandb"], "Image", None)
    monkeypatch.setattr(services["swanlab"], "finish", lambda: sys.exit(3))
    run.trackers.images(1, "validation", PICTURES, PROMPTS)
    told = run.end()
    assert [line.partition(":")[0] for line in told] == ["wandb", "swanlab"]
    assert "3; the training goes on without it" in told[1]


def test_the_time_of_a_step_is_without_pictures(tmp_path, services, monkeypatch):  # noqa: F811
    clock = [10.0]
    monkeypatch.setattr("dreambooth_ms.training.trackers.time.monotonic", lambda: clock[0])
    run = Run(tmp_path / "dog", ["--report_to", "wandb"])
    for step, seconds in ((1, 2.5), (2, 0.5)):
        clock[0] += seconds
        run.take([step])
        clock[0] += 60
        run.trackers.images(step, "validation", PICTURES, PROMPTS)
    run.end()
    assert [values["step_seconds"] for values in logged(services["wandb"]).values()] == [2.5, 0.5]


def test_a_damaged_record_of_ids_begins_a_new_run(tmp_path, services):  # noqa: F811
    Run(tmp_path / "dog", ["--report_to", "wandb"]).end()
    (tmp_path / "dog" / IDS).write_text('{"wandb": ')
    assert Run(tmp_path / "dog", ["--report_to", "wandb"]).end() == []
    first, second = (values["id"] for call, values, _ in services["wandb"].calls if call == "init")
    assert first != second


# --- Which ---


def test_several_trackers_are_given_in_any_form(tmp_path):
    def chosen(*flags):
        return configured(tmp_path, *flags).run.report_to

    assert chosen() == ["tensorboard"]
    both = ["tensorboard", "wandb"]
    assert chosen("--report_to", *both) == chosen("--report_to", "tensorboard,wandb") == both
    assert chosen("--report_to=tensorboard", "--report_to=wandb") == both
    assert chosen("--log_with", "TensorBoard", "wandb") == both
    assert chosen("--wandb") == ["wandb"]
    assert chosen("--wandb", "False") == ["tensorboard"]
    assert chosen("--report_to", "all") == ["all"]
    assert chosen("--report_to", "none") == chosen("--report_to", "None") == ["none"]
    for written, expected in (("[wandb, trackio]", ["wandb", "trackio"]), ("null", ["none"]), ("wandb", ["wandb"])):
        (tmp_path / "run.yaml").write_text(f"report_to: {written}")
        assert chosen("--config", str(tmp_path / "run.yaml")) == expected


@pytest.mark.parametrize("wrong", ["comet_ml", "wandb,comet_ml", "none,wandb", "all wandb", "x", ""])
def test_another_tracker_is_refused_with_those_that_there_are(tmp_path, wrong):
    with pytest.raises(ConfigError) as refused:
        configured(tmp_path, "--report_to", *wrong.split(" "))
    expected = "expected one or several of tensorboard, wandb, swanlab and trackio, or all, or none"
    assert str(refused.value) == f"--report_to: {expected}, got {', '.join(wrong.replace(',', ' ').split())!r}"


def test_all_are_those_that_are_installed(monkeypatch, tmp_path):
    origins = {"wandb": "wandb/__init__.py", "trackio": None}  # Of trackio a folder in which a library keeps its files.

    def find(name):
        return importlib.util.spec_from_loader(name, None, origin=origins[name]) if name in origins else None

    monkeypatch.setattr("dreambooth_ms.training.trackers.find_spec", find)
    assert installed_trackers(["all"]) == ["tensorboard", "wandb"]
    assert installed_trackers(["wandb", "tensorboard", "wandb"]) == ["wandb", "tensorboard"]
    assert installed_trackers(["none"]) == []
    with pytest.raises(ConfigError, match=r"^--report_to swanlab trackio: not installed; pip install swanlab trackio$"):
        installed_trackers(["swanlab", "wandb", "trackio"])
    run = Run(tmp_path / "dog", ["--report_to", "none"])
    run.take([1])
    assert run.end() == []
    assert [path.name for path in (tmp_path / "dog").iterdir()] == ["history.jsonl"]


# --- What the libraries themselves read ---


def test_tensorboard_reads_a_run_that_was_interrupted(tmp_path):
    folder = tmp_path / "dog"
    first = Run(folder, [])
    first.take(range(1, 6), loss=0.5)
    first.trackers.images(2, "validation", PICTURES, PROMPTS)
    second = Run(folder, [], done=3)
    second.take(range(4, 7), loss=0.25)
    assert first.end() == second.end() == []
    board = EventAccumulator(str(folder / "logs"), {"tensors": 0}).Reload()
    values = {tag: [(one.step, float(one.tensor_proto.float_val[0])) for one in board.Tensors(tag)]
              for tag in ("loss", "dog_loss", "validation_loss")}  # fmt: skip
    assert values["loss"] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25), (5, 0.25), (6, 0.25)]
    assert values["dog_loss"] == [(step, loss / 2) for step, loss in values["loss"]]
    assert [step for step, _ in values["validation_loss"]] == [*range(1, 7)]
    assert {"step_seconds", "learning_rate", "grad_norm", "loss_scale"} <= {*board.Tags()["tensors"]}
    for number, (picture, prompt) in enumerate(zip(PICTURES, PROMPTS, strict=True)):
        (shown,) = board.Tensors(f"validation/{number}")
        *_, content = shown.tensor_proto.string_val
        (tmp_path / "shown.png").write_bytes(content)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "shown.png")), picture)
        assert board.SummaryMetadata(f"validation/{number}").summary_description == prompt
    texts = [one.tensor_proto.string_val[0].decode() for one in board.Tensors("config/text_summary")]
    assert "    instance_prompt: sks\n" in texts[0] and TOKEN not in texts[0]


def test_tensorboard_that_fails_is_left_out(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = Run(tmp_path / "dog", [])
    monkeypatch.setattr(run.trackers._own[0]._board, "flush", full)
    run.take([1, 2])
    assert run.end() == ["tensorboard: [Errno 28] No space left on device; the training goes on without it"]
    assert [line["step"] for line in read_history(tmp_path / "dog")] == [1, 2]


def records_of(path):
    """The records of a wandb run's file: 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, at, block, payload = path.read_bytes(), 7, 32768, b""
    assert content[:4] == b":W&B"
    while len(content) - at >= 7:
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        payload += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield pb2.Record.FromString(payload)
            payload = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_a_run_without_a_network(tmp_path, monkeypatch, capfd):
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", TOKEN.ljust(40, "x"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["dreambooth-ms", "--hub_token", TOKEN])
    importlib.import_module("wandb").teardown()  # It keeps the environment in which it was first used.
    folder = tmp_path / "dog"
    run = Run(folder, ["--report_to", "wandb"])
    run.take([1, 2])
    run.trackers.images(2, "validation", PICTURES, PROMPTS)
    assert run.end() == []
    assert capfd.readouterr().out == ""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    own = json.loads((folder / IDS).read_text())["wandb"][0]
    assert file.name == f"run-{own}.wandb"
    # Its service is another process, which may still write on a busy machine.
    deadline, records = time.monotonic() + 30, []
    while time.monotonic() < deadline and not {"run", "exit"} <= {one.WhichOneof("record_type") for one in records}:
        time.sleep(0.05)
        records = list(records_of(file))
    sent, configuration, begun = {}, {}, None
    for record in records:
        match record.WhichOneof("record_type"):
            case "run":
                begun = record.run
                configuration |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "config":
                configuration |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
            case "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                sent[record.history.step.num] = {name: json.loads(text) for name, text in items.items()}
    assert (begun.display_name, begun.project, begun.run_id) == ("dog", "dreambooth-lora", own)
    assert configuration["data"]["instance_prompt"] == "sks" and configuration["method"]["rank"] == 4
    for line in read_history(folder):
        assert line.items() <= (sent[line["step"]] | {"step": line["step"]}).items()
        assert sent[line["step"]]["step_seconds"] >= 0
    for number, (picture, prompt) in enumerate(zip(PICTURES, PROMPTS, strict=True)):
        key = f"validation/{number}/"
        shown = {name.removeprefix(key): value for name, value in sent[2].items() if name.startswith(key)}
        assert shown["caption"] == prompt
        assert np.array_equal(np.asarray(Image.open(file.parent / "files" / shown["path"])), picture)
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path

"""`dreambooth-ms doctor` reports of each part of an installation whether it works."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dreambooth_ms.cli import doctor
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.shared import DeviceConfig
from dreambooth_ms.errors import DeviceError
from dreambooth_ms.runtime.ascend import Ascend
from dreambooth_ms.runtime.device import Formulation


@pytest.fixture(scope="module")
def examined():
    """What each check says here; every one is looked at once."""
    return {name: doctor.examine(look) for name, look in doctor.checks(DeviceConfig(device_target="CPU")).items()}


def test_everything_works_here(examined):
    assert {name: mark for name, (mark, _) in examined.items()} == dict.fromkeys(examined, "ok"), examined


def test_the_lines_tell_what_was_found(examined):
    found = {name: said for name, (_, said) in examined.items()}
    assert "mindspore 2." in found["versions"]
    assert found["device"].startswith("CPU, ")
    assert "GiB free" in found["memory"] and "GiB free" in found["disk"]
    for name in ("training step", "sampling"):
        error = float(found[name].rpartition("to ")[2])
        # Measured 0 to 1e-6: the stored figures have seven digits.
        assert error < 1e-5
    assert found["compile cache"].startswith("sound")


@pytest.fixture
def checks(monkeypatch):
    """Puts other checks in the place of the command's own."""

    def install(**looks):
        monkeypatch.setattr(doctor, "checks", lambda device: looks)

    return install


def fails(error):
    def look():
        raise error

    return look


def test_one_line_for_each_check_and_status_0(checks, capsys):
    checks(versions=lambda: "all there", memory=lambda: "enough")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["ok", "versions"], ["ok", "memory"]]
    assert lines[2:] == ["everything works"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (doctor.Failed("too little"), "too little"),
        (DeviceError("no Ascend"), "no Ascend"),
        (RuntimeError("line one\nline two"), "RuntimeError: line one"),
    ],
)
def test_a_check_that_fails_is_a_line_the_others_go_on_and_the_status_is_1(checks, capsys, error, said):
    checks(first=fails(error), second=lambda: "fine")
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAILED  first") and said in lines[0]
    assert lines[1].startswith("ok")
    assert lines[2] == "1 check failed"


def test_it_refuses_to_compute_in_half_precision(capsys):
    assert main(["doctor", "--mixed_precision", "fp16"]) == 2
    assert "--mixed_precision: the doctor compares figures in float32" in capsys.readouterr().err


def test_figures_that_are_not_those_stored_fail():
    stored = {"loss": doctor.STORED["loss"], "update": doctor.STORED["update"]}
    assert "as stored" in doctor.compare(stored)
    for wrong in (stored["loss"] * (1 + 2 * doctor.TOLERANCES[Formulation.CPU]), np.nan):
        with pytest.raises(doctor.Failed, match=r"loss .*; expected loss 1"):
            doctor.compare(stored | {"loss": wrong})


def test_a_machine_without_room_fails(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 5 * 10**8))
    with pytest.raises(doctor.Failed, match=r"0\.5 GiB free"):
        doctor.disk()
    monkeypatch.setattr(doctor, "MIN_MEMORY", 10**15)
    with pytest.raises(doctor.Failed, match="the smallest base takes"):
        doctor.memory()


def test_other_versions_than_the_tested_ones_fail(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["mindspore==1.0.0", "numpy"])
    with pytest.raises(doctor.Failed, match=r"tested with mindspore 1\.0\.0"):
        doctor.versions()


def test_without_the_card_that_was_asked_for_it_ends_with_a_page_on_what_to_look_at(capsys):
    assert main(["doctor", "--device_target", "Ascend"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok      versions")
    assert lines[1].startswith("FAILED  device         no Ascend device was found here")
    assert lines[2] == "" and len(lines) < 30
    assert all(word in "\n".join(lines[2:]) for word in ("npu-smi info", "/dev/davinci*", "ASCEND_HOME_PATH", "CPU"))


def test_the_page_shows_what_is_there(tmp_path):
    (tmp_path / "version.cfg").write_text("[7.6.0.1.220:8.5.0]\nversion=[7.6:8.5.0]\n")
    signs = Ascend(("davinci0", "davinci_manager"), str(tmp_path), Path("/cann/set_env.sh"), "libx.so: no such file")
    page = doctor.what_to_look_at(signs)
    found = ["davinci0, davinci_manager", f"ASCEND_HOME_PATH: {tmp_path}"]
    assert all(text in page for text in (*found, "8.5.0;", "source /cann/set_env.sh", "libx.so"))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("compiler/version.info", "Version=8.5.0\nversion_dir=8.5.0\n"),
        ("version.cfg", "# version: 1.0\nruntime_running_version=[7.6.0.1.220:8.5.0]\n"),
    ],
)
def test_the_version_of_cann_is_read_from_its_folder(tmp_path, file, text):
    assert doctor.cann_version(tmp_path) is None
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert doctor.cann_version(tmp_path) == "8.5.0"

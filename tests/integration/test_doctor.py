"""`dreambooth-ms doctor` reports of each part of an installation whether it works."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dreambooth_ms.cli import doctor
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.shared import DeviceConfig
from dreambooth_ms.errors import DeviceError, UserError
from dreambooth_ms.runtime.ascend import Ascend
from dreambooth_ms.runtime.device import Formulation
from tools import ascend_stubs
from tools.simulate_ascend import OLD_INTERFACE, simulate


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
    assert found["device"].endswith("; deterministic True, jit_level left to MindSpore")
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
        (UserError("too little"), "too little"),
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
        with pytest.raises(UserError, match=r"loss .*; expected loss 1"):
            doctor.compare(stored | {"loss": wrong})


def test_a_machine_without_room_fails(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 5 * 10**8))
    with pytest.raises(UserError, match=r"0\.5 GiB free"):
        doctor.disk()
    monkeypatch.setattr(doctor, "MIN_MEMORY", 10**15)
    with pytest.raises(UserError, match="the smallest base takes"):
        doctor.memory()


def test_other_versions_than_the_tested_ones_fail(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["mindspore==1.0.0", "numpy"])
    with pytest.raises(UserError, match=r"tested with mindspore 1\.0\.0"):
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


def test_a_report_holds_the_lines_the_packages_and_no_secret(checks, tmp_path, monkeypatch):
    checks(versions=lambda: f"in {Path.home()}/work", memory=lambda: "enough")
    for name in ("MS_API_TOKEN", "HF_TOKEN", "USER_PASSWORD", "ASCEND_SECRET"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "3600")
    monkeypatch.setenv("PYTHONPATH", f"{Path.home()}/code:{os.environ.get('PYTHONPATH', '')}")
    assert main(["doctor", "--report", str(tmp_path / "report.txt")]) == 0
    text = (tmp_path / "report.txt").read_text()
    assert text.startswith("ok      versions       in ~/work  [0.0 s]\nok      memory")
    assert "everything works" in text and "mindspore==2." in text and "numpy==" in text
    assert "HCCL_EXEC_TIMEOUT=3600" in text and "PYTHONPATH=~/code:" in text
    assert "hidden" not in text and f"{Path.home()}/" not in text


def test_a_report_of_a_failure_has_the_page_on_what_to_look_at(tmp_path):
    assert main(["doctor", "--device_target", "Ascend", "--report", str(tmp_path / "report.txt")]) == 1
    assert "The other checks need the device." in (tmp_path / "report.txt").read_text()


@pytest.mark.parametrize("name", ["there.txt", "nowhere/report.txt", "."])
def test_a_report_replaces_nothing_and_makes_no_folder(checks, tmp_path, capsys, name):
    (tmp_path / "there.txt").write_text("mine")
    checks(first=fails(AssertionError("nothing is looked at")))
    assert main(["doctor", "--report", str(tmp_path / name)]) == 2
    assert "expected the name of a new file, in a folder that is there" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture
def with_cann(tmp_path, monkeypatch):
    """What the driver's check says with a CANN, and with what the driver's file or npu-smi says."""

    def look(cann, file="", program=""):
        (tmp_path / "version.cfg").write_text(f"version=[7.6:{cann}]\n")
        (tmp_path / "version.info").write_text(file)
        (tmp_path / "npu-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{program}\nEND\n")
        (tmp_path / "npu-smi").chmod(0o755)
        monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return doctor.examine(lambda: doctor.driver(tmp_path / "version.info"))

    return look


# As users show them: the head of npu-smi's table, and the driver's file.
NPU_SMI = "| npu-smi {0}            Version: {0}                 |"
DRIVER_FILE = "Version={}\nascendhal_version=7.35.23\naicpu_version=1.0\n"


@pytest.mark.parametrize(
    ("cann", "driver", "said"),
    [
        ("9.1.0", "26.0.rc1", "goes with CANN 9.1.0"),
        ("9.1.0", "25.5.1", "goes with CANN 9.1.0"),
        ("9.1.0", "25.0.rc1.1", "FAILED 25.0.rc1.1: expected with CANN 9.1.0 one of 25.2, 25.3, 25.5, 26.0.rc1, 26.1"),
        ("9.1.0", "24.1.0", "not known whether it goes with CANN 9.1.0"),
        ("9.0.0", "26.0.RC1", "goes with CANN 9.0.0"),
        ("8.5.0", "25.5.0", "goes with CANN 8.5.0"),
        ("8.2.RC1", "25.2.0", "not known whether it goes with CANN 8.2.RC1"),
    ],
)
def test_the_driver_is_paired_with_cann(with_cann, cann, driver, said):
    for found in (with_cann(cann, file=DRIVER_FILE.format(driver)), with_cann(cann, program=NPU_SMI.format(driver))):
        assert said in " ".join(found) and driver in found[1]
    assert "of unknown version" in with_cann(cann)[1]


def test_attention_in_half_precision_is_compared_with_float64(monkeypatch):
    mark, said = doctor.examine(doctor.attention)
    assert mark == "ok" and said.startswith("heads of 40 in parts, 64 in parts, 80 in parts, 160 in parts; to ")
    monkeypatch.setattr(doctor, "ROUNDING", 1e-6)
    assert "expected at most 1e-06" in doctor.examine(doctor.attention)[1]


def test_the_older_interface_is_what_the_simulation_finds():
    assert set(doctor.OLD_INTERFACE) == OLD_INTERFACE.keys()


@pytest.mark.skipif(bool(ascend_stubs.missing_tools()), reason="needs g++ and binutils")
def test_the_simulated_card_has_its_lines():
    """Results are zeros there, so that what is compared fails."""
    code = """
from dreambooth_ms.cli import doctor
from dreambooth_ms.config.shared import DeviceConfig
checks = doctor.checks(DeviceConfig(device_target="Ascend", jit_level="O0"))
for name in ("device", "driver", "attention", "kernels", "environment"):
    print("line", name, *doctor.examine(checks[name]), flush=True)
"""
    reports, printed = simulate(["-c", code])
    report = reports[""]
    assert not report.refused, printed
    assert report.kernels["aclnn"]["FlashAttentionScore"] == 4
    lines = {line.split()[1]: line for line in printed.splitlines() if line.startswith("line")}
    assert "deterministic True, jit_level O0" in lines["device"]
    assert "of unknown version" in lines["driver"]
    assert "heads of 40 fused, 64 fused, 80 fused, 160 fused; relative error 1e+00" in lines["attention"]
    assert "te cannot be imported" in lines["kernels"]
    assert "HCCL_DETERMINISTIC=true" in lines["environment"] and "HCCL_CONNECT_TIMEOUT=600" in lines["environment"]

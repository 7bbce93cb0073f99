"""What `make` says while it installs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import install

PROGRAM = Path(install.__file__)

# An environment whose pip says what real ones say.
PIP = """#!/bin/sh
case "$*" in *--version*) exit 0;; esac
cat <<'END'
Collecting mindspore==2.10.0 (from -r requirements.txt (line 2))
  Downloading mindspore-2.10.0-cp311-cp311-linux_x86_64.whl (812.3 MB)
  Downloading tqdm-4.70.1-py3-none-any.whl (78 kB)
WARNING: Running pip as the 'root' user can result in broken permissions
END
{ending}
"""


def make(folder, ending):
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP.format(ending=ending))
    python.chmod(0o755)
    return subprocess.run([sys.executable, PROGRAM, "-e", "."], cwd=folder, capture_output=True, text=True)


def test_it_says_what_it_takes_and_its_stages_without_the_noise_of_pip(tmp_path):
    ended = make(tmp_path, "echo 'Installing collected packages: mindspore, tqdm'")
    assert (ended.returncode, ended.stderr) == (0, "")
    size, *stages, last = ended.stdout.splitlines()
    assert "GB on disk" in size and last.startswith(".venv: installed in ")
    assert [stage.split()[:2] for stage in stages] == [
        ["downloading", "mindspore-2.10.0-cp311-cp311-linux_x86_64.whl"],
        ["installing", "mindspore,"],
    ]


def test_an_installation_that_fails_shows_why(tmp_path):
    ended = make(tmp_path, "echo 'ERROR: No matching distribution found for mindspore==2.10.0'; exit 1")
    assert ended.returncode == 1
    assert "ERROR: No matching distribution" in ended.stdout and "root" not in ended.stdout
    assert "give the same command again" in ended.stderr


def test_too_little_room_ends_it_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 2 * 10**9))
    assert install.main(["-e", "."]) == 1
    assert "2.0 GB are free for " in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("version", [(3, 9), (3, 13)])
def test_another_python_than_those_supported_is_told(monkeypatch, capsys, version):
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    assert install.main(["-e", "."]) == 1
    assert "Python 3.10, 3.11 or 3.12 is needed" in capsys.readouterr().err

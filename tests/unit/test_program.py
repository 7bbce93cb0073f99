"""The command line as a process: what it prints arrives, its exit status is right, and it ends at once."""

import os
import subprocess
import sys

import pytest

from dreambooth_ms.errors import FAILED_STATUS, USER_ERROR_STATUS

# A command that stands for `train`, whose run is what the test says.
PROGRAM = """
import atexit, sys, types
from dreambooth_ms.cli import main as command_line

class Slow:
    def __del__(self):
        print("torn down", flush=True)

def run(argv):
    sys.never_torn_down = Slow()
    atexit.register(print, "tidied up")
    print("done")
    {ending}

sys.modules["dreambooth_ms.cli.train"] = types.SimpleNamespace(run=run)
sys.argv = ["dreambooth-ms", "train"]
command_line.program()
"""


def run(ending, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.run([sys.executable, "-c", PROGRAM.format(ending=ending)], **options)


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("return 0", 0),
        ("return 130", 130),
        ("raise ValueError('a defect')", FAILED_STATUS),
        ("raise command_line.UserError('a mistake')", USER_ERROR_STATUS),
    ],
)
def test_status_and_output(ending, status):
    """What is registered for the end is called; what Python would take apart after it is left to the system."""
    ended = run(ending)
    assert ended.returncode == status
    assert ended.stdout.splitlines() == ["done", "tidied up"]
    assert ("Traceback" in ended.stderr) == (status == FAILED_STATUS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_output_that_cannot_be_written_is_no_success():
    with open("/dev/full", "w") as full:
        assert run("return 0", stdout=full).returncode != 0


@pytest.mark.parametrize("module", ["dreambooth_ms", "dreambooth_ms.cli.main"])
def test_both_modules_are_programs(module):
    ended = subprocess.run([sys.executable, "-m", module, "no-such-command"], capture_output=True, text=True)
    assert ended.returncode == USER_ERROR_STATUS
    assert "no-such-command: unknown command" in ended.stderr

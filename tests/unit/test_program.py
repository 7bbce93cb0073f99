"""The command line as a process: what it prints arrives, its exit status is right, and it ends at once."""

import os
import re
import subprocess
import sys

import pytest

from dreambooth_ms.errors import FAILED_STATUS, INTERRUPTED_STATUS, USER_ERROR_STATUS

# A command that stands for `train`, whose run is what the test says.
PROGRAM = """
import atexit, sys, types
from dreambooth_ms.cli import main as command_line, output

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


@pytest.mark.parametrize("arguments", [["train", "--help"], ["--version"]])
def test_output_that_nobody_reads_any_more_is_no_traceback(arguments):
    """As in `dreambooth-ms ... | head -1`: long output fails while it is printed, short output at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dreambooth_ms", *arguments]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (FAILED_STATUS, "")


def test_a_ctrl_c_that_mindspore_answers_ends_the_program_with_its_line():
    ended = run("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert (ended.returncode, ended.stderr) == (INTERRUPTED_STATUS, "dreambooth-ms: interrupted\n")
    assert ended.stdout.splitlines() == ["done", "tidied up"]


def test_the_line_of_an_interruption_is_not_within_a_bar():
    ended = run("bar = output.progress(total=3, desc='training'); bar.update(); raise KeyboardInterrupt")
    assert ended.returncode == INTERRUPTED_STATUS
    *_, bar, last = ended.stderr.split("\n")[:-1]
    assert last == "dreambooth-ms: interrupted"
    assert "training" in bar


def test_what_is_told_is_not_within_a_bar():
    ended = run("bar = output.progress(total=3); bar.update(); output.tell('a note'); return 0")
    assert "a note" in re.split("[\r\n]", ended.stderr)


def test_warnings_are_lines_of_their_own_and_libraries_give_none():
    warn = "import warnings; warnings.warn_explicit('{text}', UserWarning, {file}, 1); "
    ours, theirs = warn.format(text="ours", file="command_line.__file__"), warn.format(text="theirs", file="'x.py'")
    assert run(f"{ours}{theirs}return 0").stderr == "warning: ours\n"


@pytest.mark.parametrize(("asked", "level"), [(None, "3"), ("2", "2")])
def test_libraries_are_quiet_unless_the_user_wants_to_hear_them(asked, level):
    environment = {name: value for name, value in os.environ.items() if name != "GLOG_v"}
    environment |= {"GLOG_v": asked} if asked else {}
    code = "import os, dreambooth_ms; print(os.environ['GLOG_v'])"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.stdout == f"{level}\n"


@pytest.mark.parametrize("module", ["dreambooth_ms", "dreambooth_ms.cli.main"])
def test_both_modules_are_programs(module):
    ended = subprocess.run([sys.executable, "-m", module, "no-such-command"], capture_output=True, text=True)
    assert ended.returncode == USER_ERROR_STATUS
    assert "no-such-command: unknown command" in ended.stderr

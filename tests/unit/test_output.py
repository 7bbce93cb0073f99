"""What commands say while they work: bars, and what is compiled meanwhile."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest
from tqdm import tqdm

from dreambooth_ms.cli import output
from dreambooth_ms.cli.device import show_compilation
from dreambooth_ms.runtime.compile_cache import Outlook


def test_elsewhere_than_on_a_terminal_a_compilation_is_a_line_before_and_one_after(capsys):
    for seconds in (None, 44.6):
        with show_compilation("the training step", Outlook(seconds=seconds)):
            print("meanwhile", file=sys.stderr)
    assert capsys.readouterr().err.splitlines() == [
        *("compiling the training step", "meanwhile", "compiled the training step in 0 s"),
        *("compiling the training step, 45 s last time", "meanwhile", "compiled the training step in 0 s"),
    ]


def test_what_comes_from_the_compile_cache_is_no_line(capsys):
    with show_compilation("the training step", Outlook(is_kept=True)):
        pass
    assert capsys.readouterr().err == ""


def test_a_process_that_is_to_be_quiet_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(output, "_quiet", True)
    with show_compilation("the training step", Outlook()):
        pass
    assert capsys.readouterr().err == ""


def test_a_compilation_that_fails_is_not_called_compiled(capsys):
    with pytest.raises(ValueError, match="no"), show_compilation("it", Outlook()):
        raise ValueError("no")
    assert capsys.readouterr().err == "compiling it\n"


ON_A_TERMINAL = """
import time
from dreambooth_ms.cli import output
from dreambooth_ms.cli.device import show_compilation
from dreambooth_ms.runtime.compile_cache import Outlook
with output.progress(total=2, desc="training") as bar:
    with show_compilation("it", Outlook(seconds=45)):
        time.sleep(2.5)
    bar.update()
"""


def test_on_a_terminal_the_time_that_has_gone_is_renewed_and_the_bar_comes_afterwards():
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stderr=terminal)
    os.close(terminal)
    said = b""
    with suppress(OSError):  # When the other end is closed.
        while piece := os.read(reader, 4096):
            said += piece
    os.close(reader)
    assert process.wait() == 0
    pieces = [piece.strip() for piece in re.split("[\r\n]+", said.decode()) if piece.strip()]
    assert pieces[:2] == ["compiling it: 1 s, 45 s last time", "compiling it: 2 s, 45 s last time"]
    assert pieces[2].startswith("training:   0%")


def test_for_a_bar_a_compilation_takes_no_time():
    now = [0.0]
    with output.progress(total=100, file=open(os.devnull, "w")) as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = 0.0
        with output.bars_paused():
            now[0] += 90
        for _ in range(2):
            now[0] += 2
            bar.update()
        assert bar.format_dict["elapsed"] == 4
        assert bar.format_dict["rate"] == pytest.approx(0.5)


def test_a_bar_that_is_paused_within_a_loop_counts_each_item_once(monkeypatch):
    """tqdm's own loop is up to five ahead here."""
    bars = []
    monkeypatch.setattr(output, "tqdm", lambda **options: bars.append(tqdm(**options, file=io.StringIO())) or bars[0])
    for number in output.with_progress(iter(range(11)), 11):
        assert bars[0].n == number
        if number in (0, 3):
            time.sleep(0.11)
            with output.bars_paused():
                time.sleep(0.12)
        time.sleep(0.02)
    assert bars[0].n == 11

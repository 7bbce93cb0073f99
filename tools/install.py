"""Make the environment .venv and install into it, saying what goes on: what `make` calls.

    python3 tools/install.py -e .
    python3 tools/install.py -r tests/requirements.txt

The arguments are those of `pip install`. It needs nothing but Python, and says so to one that is too old.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ENVIRONMENT = Path(".venv")
PYTHON = ENVIRONMENT / "bin" / "python"
QUIETER = ("--disable-pip-version-check", "--progress-bar", "off", "--no-input")
GB = 1e9
WHAT = {"-e": "the toolkit with MindSpore and what else it needs", "-r": "what the tests need"}
SIZES = {"-e": (3.8, 1.0), "-r": (1.2, 0.5)}
"""GB that an installation takes in the end, and for its largest downloads meanwhile."""

STAGES = {
    r"\s*Collecting (\S+)": "looking for {}",
    r"\s*Downloading (\S+ \(.+\))": "downloading {}",
    r"\s*Using cached (\S+ \(.+\))": "{} was downloaded before",
    r"Installing collected packages: (.+)": "installing {}",
    r"WARNING: (Retrying) ": "the package index does not answer; trying again",
}
"""What pip says at the beginning of a stage, and what is said of it here."""


def main(arguments):
    """Install; returns the exit status."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return fail("Python 3.10, 3.11 or 3.12 is needed; name one with make PYTHON=...")
    size, download = SIZES[arguments[0]]
    if not Path(ENVIRONMENT, "installed").exists() or arguments[0] != "-e":
        print(f"{ENVIRONMENT}: installing {WHAT[arguments[0]]}, which takes {size} GB on disk", flush=True)
        lacking = lacking_space({Path.cwd(): size, Path(tempfile.gettempdir()): download})
        if lacking:
            return fail(lacking)
    # What an interrupted or failed `venv` left is made anew.
    if not PYTHON.exists() or subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode:
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)])
        if made.returncode:
            return fail("no environment could be made; on Debian and Ubuntu: apt-get install python3-venv")
    return install(arguments)


def lacking_space(needed):
    """What to say where a disk has less room than the folders on it need; None if all have."""
    disks: dict[int, tuple[list[Path], float]] = {}
    for folder, size in needed.items():
        folders, total = disks.get(os.stat(folder).st_dev, ([], 0.0))
        disks[os.stat(folder).st_dev] = [*folders, folder], total + size
    for folders, size in disks.values():
        free = shutil.disk_usage(folders[0]).free / GB
        if free < size:
            names = " and ".join(map(str, folders))
            return f"{free:.1f} GB are free for {names}, and {size:.1f} GB are needed; free some space"
    return None


def install(arguments):
    """Run pip, with a line for its stage; what it complains about is shown if it fails."""
    command = [str(PYTHON), "-m", "pip", "install", *QUIETER]
    said: list[str] = []
    begun = time.monotonic()
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reader = threading.Thread(target=lambda: said.extend(process.stdout or []), daemon=True)
    reader.start()
    try:
        shown, reads = 0, True
        while reads:
            reader.join(timeout=0.5)
            reads = reader.is_alive()
            shown = show(said, shown, time.monotonic() - begun)
    except KeyboardInterrupt:
        process.kill()
        return fail("interrupted; the same command goes on")
    clear()
    if process.wait():
        print("".join(line for line in said if line.startswith(("ERROR", "error"))) or "".join(said[-20:]), end="")
        return fail("the installation failed; mend what pip says above and give the same command again")
    print(f"{ENVIRONMENT}: installed in {time.monotonic() - begun:.0f} s")
    return 0


def show(said, shown, seconds):
    """Say which stage the newest lines begin: on a terminal in one line with the time, elsewhere large downloads."""
    stages = [stage for line in list(said) for stage in [stage_of(line)] if stage]
    if sys.stdout.isatty():
        text = stages[-1] if stages else "starting"
        width = shutil.get_terminal_size().columns - 10
        print(f"\r\033[K{seconds:4.0f} s  {text[:width]}", end="", flush=True)
        return len(stages)
    for stage in stages[shown:]:
        if stage.startswith("installing") or re.search(r"\d{3}\.\d MB|GB\)", stage):
            print(stage[:100], flush=True)
    return len(stages)


def stage_of(line):
    """The stage that a line of pip begins, in words."""
    for pattern, words in STAGES.items():
        found = re.match(pattern, line)
        if found:
            names = found[1].split(", ")
            return words.format(f"{len(names)} packages" if len(names) > 2 else found[1])
    return None


def clear():
    """Take the line with the stage off the terminal."""
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)


def fail(reason):
    """Say why it ends; returns the exit status."""
    clear()
    print(f"make: error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

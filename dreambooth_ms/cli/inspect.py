"""`dreambooth-ms inspect SOURCE`: what a file or folder is."""

from collections.abc import Sequence
from pathlib import Path

from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.inspect import InspectConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.conversion import describe_source


def run(argv: Sequence[str]) -> int:
    """Inspect by a command line; returns the exit status."""
    wanted = load(InspectConfig, argv, tell).inspection
    for line in describe_source(Path(wanted.source), wanted.base, wanted.variant):
        print(line.encode(errors="backslashreplace").decode())
    return 0

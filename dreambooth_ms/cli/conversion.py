"""`dreambooth-ms inspect`, `convert` and `merge`: what a file or folder is, and models and LoRAs in other formats."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dreambooth_ms import conversion
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.commands import ConvertConfig, InspectConfig, MergeConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.weights.hub import find_adapter, find_model


def inspect(argv: Sequence[str]) -> int:
    """Inspect by a command line; returns the exit status."""
    wanted = load(InspectConfig, argv, tell).inspection
    for line in conversion.describe_source(Path(wanted.source), wanted.base, wanted.variant):
        print(line.encode(errors="backslashreplace").decode())
    return 0


def convert(argv: Sequence[str]) -> int:
    """Convert by a command line; returns the exit status."""
    for line in conversion.convert(load(ConvertConfig, argv, tell).conversion):
        tell(line)
    return 0


def merge(argv: Sequence[str]) -> int:
    """Merge by a command line; returns the exit status."""
    wanted = load(MergeConfig, argv, tell).merging
    base, loras = find_model(wanted.base, wanted.revision, wanted.variant), map(find_adapter, wanted.lora)
    for line in conversion.merge(replace(wanted, base=str(base), lora=list(map(str, loras)))):
        tell(line)
    return 0

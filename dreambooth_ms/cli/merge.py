"""`dreambooth-ms merge --base MODEL --lora LORA --target TARGET`: LoRAs become part of a model."""

from collections.abc import Sequence

from dreambooth_ms.cli.convert import bytes_bar
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.load import load
from dreambooth_ms.config.merge import MergeConfig
from dreambooth_ms.conversion.merge import merge


def run(argv: Sequence[str]) -> int:
    """Merge by a command line; returns the exit status."""
    for line in merge(load(MergeConfig, argv, tell).merging, bytes_bar):
        tell(line)
    return 0

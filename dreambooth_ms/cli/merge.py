"""`dreambooth-ms merge --base MODEL --lora LORA --target TARGET`: LoRAs become part of a model."""

from collections.abc import Sequence
from dataclasses import replace

from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.load import load
from dreambooth_ms.config.merge import MergeConfig
from dreambooth_ms.conversion import merge
from dreambooth_ms.weights.hub import find_adapter, find_model


def run(argv: Sequence[str]) -> int:
    """Merge by a command line; returns the exit status."""
    wanted = load(MergeConfig, argv, tell).merging
    base, loras = find_model(wanted.base, wanted.revision, wanted.variant), map(find_adapter, wanted.lora)
    for line in merge(replace(wanted, base=str(base), lora=list(map(str, loras)))):
        tell(line)
    return 0

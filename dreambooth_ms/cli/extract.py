"""`dreambooth-ms extract`: what a model has learnt, as a LoRA."""

from collections.abc import Sequence
from dataclasses import replace

from dreambooth_ms import conversion
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.commands import ExtractConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.weights.hub import find_model


def run(argv: Sequence[str]) -> int:
    """Extract by a command line; returns the exit status."""
    wanted = load(ExtractConfig, argv, tell).extraction
    base, tuned = (str(find_model(name, None, None)) for name in (wanted.base, wanted.tuned))
    for line in conversion.extract(replace(wanted, base=base, tuned=tuned)):
        tell(line)
    return 0

"""`dreambooth-ms convert SOURCE TARGET`: a model or a LoRA in another format."""

from collections.abc import Sequence

from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.convert import ConvertConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.conversion import convert


def run(argv: Sequence[str]) -> int:
    """Convert by a command line; returns the exit status."""
    for line in convert(load(ConvertConfig, argv, tell).conversion):
        tell(line)
    return 0

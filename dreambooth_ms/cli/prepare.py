"""`dreambooth-ms prepare SOURCE TARGET`: pictures of the sizes of a training, each once."""

from collections.abc import Sequence

from dreambooth_ms.cli.output import tell, with_progress
from dreambooth_ms.config.load import load
from dreambooth_ms.config.prepare import PrepareConfig
from dreambooth_ms.data.preparation import prepare


def run(argv: Sequence[str]) -> int:
    """Prepare by a command line; returns the exit status."""
    wanted = load(PrepareConfig, argv, tell).preparation
    prepare(wanted, tell, lambda records: with_progress(records, len(records), desc="writing", unit="picture"))
    return 0

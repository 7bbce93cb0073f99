"""`dreambooth-ms convert SOURCE TARGET`: a model or a LoRA in another format."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.convert import ConvertConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.conversion.convert import convert
from dreambooth_ms.formats.files.stored import Progress


def run(argv: Sequence[str]) -> int:
    """Convert by a command line; returns the exit status."""
    for line in convert(load(ConvertConfig, argv, tell).conversion, bytes_bar):
        tell(line)
    return 0


@contextmanager
def bytes_bar(total: int) -> Iterator[Progress]:
    """A progress bar over so many bytes."""
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True) as bar:
        yield bar.update

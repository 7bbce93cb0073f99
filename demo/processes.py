"""What the processes that a page starts are given: the repository's modules, and a place for compiled graphs."""

import hashlib
import os
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The environment of a process of the page; what the user has set in it stays.

    With MindSpore's compile cache a model that was drawn with before is ready in a third of the time or less. The
    toolkit keys each graph by all that decides it but its own program, so the program's digest is in the folder's name.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    graphs = {
        "MS_COMPILER_CACHE_ENABLE": "1",
        "MS_COMPILER_CACHE_PATH": str(cache_home / "dreambooth-ms" / f"graphs-{_program_digest()}"),
    }
    return graphs | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@cache
def _program_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "dreambooth_ms").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]

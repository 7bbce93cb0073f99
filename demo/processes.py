"""The environment of the processes that a page starts."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The environment of a process of the page; what the user has set in it stays.

    MindSpore's warnings would stand between the sentences that a page shows of a training.
    """
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"GLOG_v": "3"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

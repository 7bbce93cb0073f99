"""Modules in the place of wandb, swanlab and trackio, which note how they are called."""

import importlib
import sys

import pytest

SERVICES = ("wandb", "swanlab", "trackio")
_TEXT = """
import sys

calls, fails_at = [], set()


class Image:
    def __init__(self, data, caption=None):
        self.data, self.caption = data, caption


def _note(name, values):
    print("a library talks")
    calls.append((name, values, list(sys.argv)))
    if name in fails_at:
        raise RuntimeError(f"no {name}\\nwithout a network")


def init(**arguments):
    _note("init", arguments)


def log(values, step):
    _note("log", (step, dict(values)))


def finish():
    _note("finish", None)
"""


@pytest.fixture
def services(tmp_path, monkeypatch):
    """Such a module for each service, by its name."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name in SERVICES:
        (folder / f"{name}.py").write_text(_TEXT)
    there = {name: sys.modules.pop(name) for name in SERVICES if name in sys.modules}
    monkeypatch.syspath_prepend(folder)
    yield {name: importlib.import_module(name) for name in SERVICES}
    for name in SERVICES:
        del sys.modules[name]
    sys.modules.update(there)


def logged(service):
    """What a service was sent: step -> values."""
    sent = {}
    for name, values, _ in service.calls:
        if name == "log":
            sent.setdefault(values[0], {}).update(values[1])
    return sent

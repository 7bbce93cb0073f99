"""What a command computes with: its device, its base model, and the compiler, whose work is told while it goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dreambooth_ms.cli.output import bars_paused, is_quiet, tell
from dreambooth_ms.config.commands import EvaluateConfig
from dreambooth_ms.config.load import Reads, load
from dreambooth_ms.config.sample import SampleConfig
from dreambooth_ms.config.shared import BaseModelConfig, DeviceConfig
from dreambooth_ms.conversion import trained_base
from dreambooth_ms.errors import ConfigError, UserError, count_of
from dreambooth_ms.runtime.ascend import card_name, find_ascend
from dreambooth_ms.runtime.compile_cache import Outlook
from dreambooth_ms.runtime.compiled_cell import watch_compilations
from dreambooth_ms.runtime.device import Formulation, compute_dtype, formulation, set_up_device, settled_precision
from dreambooth_ms.weights.bundle import ModelBundle, open_bundle
from dreambooth_ms.weights.hub import base_of_card, find_adapter, find_model, find_vae

Config = TypeVar("Config", SampleConfig, EvaluateConfig)

_CLOCK = """
import select, sys, time
begun = time.monotonic()
while not select.select([sys.stdin], [], [], 1)[0]:
    sys.stderr.write(f"\\r{sys.argv[1]}: {time.monotonic() - begun:.0f} s{sys.argv[2]}")
    sys.stderr.flush()
"""
"""A program, because other threads may have to wait for seconds while MindSpore compiles (measured: 3.8 of 24 s)."""


def set_up(wanted: DeviceConfig) -> DeviceConfig:
    """Choose the device and say on what the command computes; returns the settings without what was left open. Raises
    DeviceError if there is no such device, or it cannot compute so."""
    device = set_up_device(wanted.device_target, wanted.ms_mode, wanted.deterministic, wanted.jit_level)
    settled = replace(wanted, mixed_precision=settled_precision(wanted.mixed_precision))
    compute_dtype(settled.mixed_precision)  # What the device cannot compute in ends here.
    watch_compilations(show_compilation)
    obstacle = find_ascend().obstacle
    if wanted.device_target == "auto" and device == "CPU" and obstacle:
        tell(f"warning: the CPU computes, although this machine seems to have an Ascend card: {obstacle}")
    reason = ""
    if wanted.mixed_precision == "auto" and device == "CPU":
        reason = "; --mixed_precision auto is fp16 on Ascend only: on a CPU that is slower"
    tell(f"computing {described(settled)}{reason}")
    return settled


def described(settled: DeviceConfig) -> str:
    """On what is computed and in which precision, in words."""
    cpu = f"the CPU ({count_of(os.cpu_count() or 1, 'core')})"
    where = cpu if formulation() is Formulation.CPU else f"Ascend {card_name()}"
    return f"on {where}, in {str(compute_dtype(settled.mixed_precision)).lower()}"


def open_base(base: BaseModelConfig) -> ModelBundle:
    """Open the base model, on the device that was set up before."""
    vae = find_vae(base.pretrained_vae_model_name_or_path) if base.pretrained_vae_model_name_or_path else None
    path = find_model(base.pretrained_model_name_or_path, base.revision, base.variant)
    bundle = open_bundle(path, base.variant, vae)
    for note in bundle.notes:
        tell(f"{bundle.path}: {note}")
    return bundle


def load_with_weights(schema: type[Config], argv: Sequence[str], read: Reads | None = None) -> Config:
    """`load` for what takes a base model and adapters; where the base is all that is missing, the message names the one
    that the first adapter's run or model card names."""
    try:
        return load(schema, argv, tell, read)
    except ConfigError as error:
        values: dict[str, Any] = {"lora": [], "embedding": []}
        with suppress(UserError):
            values |= load(schema, [*argv, "--pretrained_model_name_or_path", "?"], lambda note: None, read).values()
        for name in (*values["lora"], *values["embedding"]):
            if base := trained_base(Path(name)) or base_of_card(name):
                raise ConfigError(f"{error}; {name} was trained on {base}") from error
        raise


def found_adapters(names: Iterable[str]) -> list[Path]:
    """The files or folders of adapters, see `find_adapter`; which file of a repository it is is told."""
    found = [(name, find_adapter(name)) for name in names]
    for name, path in found:
        if path.is_file() and not (os.path.exists(os.path.expanduser(name)) or name.endswith(path.name)):
            tell(f"{name}: its {path.name}")
    return [path for _, path in found]


@contextmanager
def show_compilation(title: str, outlook: Outlook) -> Iterator[None]:
    """Inside, say that something is compiled: on a terminal with the time that has gone, elsewhere before and after."""
    before = "" if outlook.seconds is None else f", {outlook.seconds:.0f} s last time"
    with bars_paused():
        if is_quiet() or (outlook.is_kept and not sys.stderr.isatty()):
            yield
        elif sys.stderr.isatty():
            with _clock(f"reading {title} from the compile cache" if outlook.is_kept else f"compiling {title}", before):
                yield
        else:
            begun = time.monotonic()
            print(f"compiling {title}{before}", file=sys.stderr)
            yield
            print(f"compiled {title} in {time.monotonic() - begun:.0f} s", file=sys.stderr)


@contextmanager
def _clock(what: str, before: str) -> Iterator[None]:
    """Inside, a line on the terminal that is renewed every second."""
    program = [sys.executable, "-IS", "-c", _CLOCK, what, before]
    try:
        # In a session of its own, so that Ctrl-C does not reach it; it ends with its input.
        with subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True):
            yield
    finally:
        print("\r" + " " * (len(what) + len(before) + 10) + "\r", end="", file=sys.stderr, flush=True)

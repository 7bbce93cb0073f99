"""`dreambooth-ms COMMAND`: finds the command, and turns users' mistakes into lines on stderr. Nothing heavy is imported
until a command runs, so that help and mistakes answer at once."""

import atexit
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NoReturn

from dreambooth_ms import __version__
from dreambooth_ms.cli.output import PROGRAM, complain, complain_of_interruption, tell_warnings
from dreambooth_ms.config import commands
from dreambooth_ms.config.schema import Schema, describe, describe_usual
from dreambooth_ms.errors import FAILED_STATUS, INTERRUPTED_STATUS, USER_ERROR_STATUS, UserError, explain
from dreambooth_ms.processes.launch import exit_at_once, is_launched


def schema_of(name: str) -> type[Schema]:
    """The class that describes the flags of a command."""
    return getattr(commands, f"{name.capitalize()}Config")


COMMANDS = {
    name: (schema_of(name).__doc__ or "").removesuffix(".")
    for name in ["train", "check", "prepare", "sample", "evaluate", "benchmark"]
    + ["inspect", "convert", "merge", "extract", "push", "doctor"]
}
"""Name -> summary. Each has a schema in `config`, and its `run` in `cli`, or is a function of `cli/conversion.py`."""


def program() -> NoReturn:
    """`main` as a process of its own, which ends with it: without what Python and MindSpore do for a longer life."""
    status = FAILED_STATUS

    def end_at_once(*_: object) -> NoReturn:
        nonlocal status
        complain_of_interruption()
        status = INTERRUPTED_STATUS
        atexit._run_exitfuncs()
        raise AssertionError("the last of them ends the process")

    tell_warnings()
    # MindSpore answers Ctrl-C with a SIGTERM to its own process. An exception that comes while it compiles is taken for
    # one of the graph, with a page of its text, or lost (both measured). Processes that train together end otherwise.
    if not is_launched(os.environ):
        signal.signal(signal.SIGTERM, end_at_once)
    # What is registered first is called last.
    atexit.register(lambda: exit_at_once(status))
    status = main()
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except BrokenPipeError:
        return FAILED_STATUS  # Nobody listens any more, as after `| head`.
    except (UserError, OSError) as error:
        explanation = explain(error)
        if explanation is None:
            raise
        complain(explanation)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        complain_of_interruption()
        return INTERRUPTED_STATUS


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else USER_ERROR_STATUS
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"{name}: unknown command; {hint}")
    if not {"-h", "--help", "--help=all"}.isdisjoint(rest):
        print(_command_help(name, everything=not {"all", "--help=all"}.isdisjoint(rest)))
        return 0
    return _import_run(name)(rest)


def _import_run(name: str) -> Callable[[Sequence[str]], int]:
    """What does a command. MindSpore collects garbage whenever it compiles; what a fresh process imports never is any,
    and not to look at it saves a tenth of a second each time, and a fifth of the import (measured)."""
    module, function = ("conversion", name) if name in ("inspect", "convert", "merge", "extract") else (name, "run")
    is_fresh = "mindspore" not in sys.modules
    if is_fresh:
        gc.disable()
    try:
        return getattr(importlib.import_module(f"dreambooth_ms.cli.{module}"), function)
    finally:
        if is_fresh:
            gc.enable()
            gc.freeze()


def _overview() -> str:
    lines = "\n".join(f"  {name:<{max(map(len, COMMANDS))}}  {summary}" for name, summary in COMMANDS.items())
    return f"""usage: {PROGRAM} COMMAND [--config FILE] [--name value ...]

Teach Stable Diffusion a new subject from a few photographs.

commands:
{lines}

`{PROGRAM} COMMAND --help` lists the flags of a command; `{PROGRAM} --version` prints the version."""


def _command_help(name: str, everything: bool) -> str:
    schema = schema_of(name)
    positional = "".join(f" {field.upper()}" for field in schema.POSITIONAL)
    usage = f"""usage: {PROGRAM} {name}{positional} [--config FILE] [--name value ...]

{COMMANDS[name]}."""
    if schema.USUAL and not everything:
        return f"""{usage} For example:

  {PROGRAM} {name} {schema.EXAMPLE}

The flags that are set most; `{PROGRAM} {name} --help all` has the rest:

{describe_usual(schema)}"""
    return f"""{usage}

Values come from the YAML files given by --config, then from the flags. Switches are written --name,
--name True, --name False or --no-name; lists --name a b or --name a,b.

{describe(schema)}"""


if __name__ == "__main__":
    program()

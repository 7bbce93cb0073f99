"""Libraries that stand in for CANN's, so that MindSpore's Ascend backend can be loaded on a machine without it.

They are made of what the installed wheel asks for: the libraries that its Ascend plug-in needs and nobody has, and the
functions in them. Each function returns 0. In MindSpore's simulation none of them decides anything: kernels are chosen
by MindSpore's own tables (traced: nothing but the start and the end of the libraries is called).
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

PLUGIN = "libmindspore_ascend.so.2"
TOOLS = ("g++", "readelf", "nm")

COMPUTING, OPERATORS = "libascendcl.so", "libopapi.so"
RESOURCES = "libmindspore_ascend_res_manager.so"
"""The plug-in's library that looks up functions of `COMPUTING` by name, which stand in it as text."""

GRAPH_ENGINE = """
#include <cstdint>
#include <map>
#include <string>
namespace ge {
struct StatusFactory {
  static StatusFactory *Instance();
  std::map<uint32_t, std::string> errors;
};
StatusFactory *StatusFactory::Instance() { static StatusFactory one; return &one; }
struct Operator { void *table, *implementation, *owners; };
struct OperatorFactory { static Operator CreateOperator(const char *, const char *); };
Operator OperatorFactory::CreateOperator(const char *, const char *) { return {}; }
}
"""
"""What must do something: the table of errors, into which static initialisers write, and an empty operator, which is
copied. In the old ABI of strings, which the plug-in is built for."""
PATIENCE, WAITING = (
    "libpatience.so",
    """
#include <unistd.h>
extern "C" int wait_for_report(int) __asm__("_ZN9mindspore6device6ascend27SimuFuncIaclrtProcessReportIiEET_i");
int wait_for_report(int) { usleep(100000); return 0; }
""",
)
"""A library to be loaded first, for a function of MindSpore's own. Two of its threads wait by it for what a device
reports; in a simulation it comes back at once, so that they keep two cores busy for nothing (measured)."""
HCCL_PACKAGE = {"hccl/__init__.py": "", "hccl/sys_version.py": '__sys_version__ = "0"\n'}
"""CANN's Python package, of which MindSpore wants to know the version before processes compute as one."""
OF_GRAPH_ENGINE = {"_ZN2ge13StatusFactory8InstanceEv", "_ZN2ge15OperatorFactory14CreateOperatorEPKcS2_"}


def mindspore_folder() -> Path:
    """The installed MindSpore; it is not imported."""
    spec = find_spec("mindspore")
    assert spec and spec.origin
    return Path(spec.origin).parent


def missing_tools() -> list[str]:
    """Programs that are needed and not there."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def wheel_folders() -> list[Path]:
    """Where the wheel's libraries are."""
    root = mindspore_folder() / "lib"
    return [root, root / "plugin", root / "plugin" / "ascend"]


def library_folder() -> Path:
    """The folder with the stand-ins, libraries and a Python package; made if they are not there yet for this wheel.

    Its path has `latest` in it, which MindSpore wants of CANN's.

    Raises:
        subprocess.CalledProcessError: they do not compile.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreambooth_ms" / "ascend-stand-ins"
    own, plugin = Path(__file__).read_bytes(), wheel_folders()[1] / PLUGIN
    target = cache / hashlib.sha256(own + plugin.read_bytes()).hexdigest()[:16] / "latest" / "lib64"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / "lib64"
            partial.mkdir()
            _build(partial)
            for name, content in HCCL_PACKAGE.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_text(content, encoding="utf-8")
            try:
                partial.rename(target)
            except OSError:  # Another process was first.
                if not target.is_dir():
                    raise
    return target


def _build(folder: Path) -> None:
    held, lacking = _needed()
    defined, wanted = set[str](), set[str]()
    for path in held:
        defined |= set(_symbols(path, "--defined-only"))
    for path in held:
        if path.is_relative_to(mindspore_folder()):
            wanted |= set(_symbols(path, "--undefined-only"))
    undefined = {name for name in wanted - defined - OF_GRAPH_ENGINE if not re.match("_?Py[A-Z_]", name)}
    looked_up = re.findall(rb"(?<=\0)acl[a-z]*[A-Z]\w+(?=\0)", (wheel_folders()[2] / RESOURCES).read_bytes())
    functions = {COMPUTING: undefined | {one.decode() for one in looked_up}, OPERATORS: {"aclnnInit", "aclnnFinalize"}}
    sources = {name: _functions(sorted(functions.get(name, ()))) for name in lacking | {OPERATORS}}
    if COMPUTING in sources:
        sources[COMPUTING] += GRAPH_ENGINE
    for name, source in {**sources, PATIENCE: WAITING}.items():
        command = ["g++", "-shared", "-fPIC", "-fvisibility-inlines-hidden", "-D_GLIBCXX_USE_CXX11_ABI=0"]
        command += [f"-Wl,-soname,{name}", "-x", "c++", "-"]
        subprocess.run([*command, "-o", str(folder / name)], input=source, text=True, check=True)


def _functions(names: list[str]) -> str:
    """Functions of these names as the linker knows them; those that create something return a place."""
    lines = ["static long place[4096];"]
    for number, name in enumerate(names):
        result = "(long)place" if re.match("acl(op)?Create", name) else "0"
        own = f"stand_in_{number}()"
        lines.append(f'extern "C" long {own} __asm__("{name}"); long {own} {{ return {result}; }}')
    return "\n".join(lines) + "\n"


def _needed() -> tuple[list[Path], set[str]]:
    """The libraries that the plug-in needs, itself among them, by what they need in turn; and names nobody has."""
    system = dict(_system_libraries())
    wheel = {path.name: path for path in (mindspore_folder() / "lib").rglob("*.so*")}
    held, lacking, rest = dict[str, Path](), set[str](), [PLUGIN]
    while rest:
        name = rest.pop()
        if name in held or name in lacking:
            continue
        path = wheel.get(name) or system.get(name)
        if path is None:
            lacking.add(name)
            continue
        held[name] = path
        if name in wheel:
            dynamic = subprocess.run(["readelf", "-dW", str(path)], capture_output=True, text=True, check=True).stdout
            rest += re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    return list(held.values()), lacking


def _system_libraries() -> Iterator[tuple[str, Path]]:
    loader = shutil.which("ldconfig") or "/sbin/ldconfig"
    listed = subprocess.run([loader, "-p"], capture_output=True, text=True, check=True).stdout
    for name, path in re.findall(r"^\s+(\S+) \(.*\) => (\S+)$", listed, re.MULTILINE):
        yield name, Path(path)


def _symbols(library: Path, which: str) -> list[str]:
    """Names of a library's dynamic symbols without their versions; weak ones may stay undefined."""
    command = ["nm", "--dynamic", "--format=posix", which, str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = "U" if which == "--undefined-only" else None
    return [line.split()[0].partition("@")[0] for line in lines if kinds is None or line.split()[1] in kinds]

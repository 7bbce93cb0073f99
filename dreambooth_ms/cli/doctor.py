"""`dreambooth-ms doctor`: does this installation work here? A line for each check; a minute on CPU."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from dreambooth_ms import __version__
from dreambooth_ms.adapters.lora import initialise_lora, inject_lora, lora_trainables
from dreambooth_ms.atomic import write_bytes
from dreambooth_ms.cli import toy_networks
from dreambooth_ms.cli.device import set_up
from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.commands import DoctorConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.config.shared import DeviceConfig
from dreambooth_ms.errors import FAILED_STATUS, ConfigError, UserError, count_of
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.models.parameters import initialise
from dreambooth_ms.models.specs import PUBLISHED_MODELS, read_table
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.models.vae import AutoencoderKL
from dreambooth_ms.ops import MultiHeadAttention
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.runtime import ascend
from dreambooth_ms.runtime.compile_cache import ENABLE, CompileCache, compile_cache, use_compile_cache
from dreambooth_ms.runtime.device import Formulation, formulation
from dreambooth_ms.sampling.schedulers import Denoiser
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
from dreambooth_ms.training.step import DiffusionLoss, TrainStep

DEVICE = "device"
GIB = 2**30
MIN_MEMORY, MIN_DISK = 2 * GIB, 1 * GIB
"""The embedded base trains in 1.2 GiB (docs/performance.md); a LoRA of it with its checkpoints takes some MiB."""

REPORTED = re.compile(
    r"(?!.*(KEY|PASS|SECRET|TOKEN))(ACL|ASCEND|DEVICE|GLOG|HCCL|LD|MINDSPORE|MS|OMP|OMPI|PYTHON|RANK|TE)(_|PATH$)"
)
"""Names of the variables that a report holds: no others, so that nothing private is in it."""

LIBRARIES = ("mindspore", "mindone", "numpy", "transformers")
TABLES = read_table(Path(__file__).with_name("doctor.yaml"))
STORED: dict[str, float] = TABLES["figures"]
TOLERANCES = {Formulation.CPU: 1e-4, Formulation.ASCEND: 1e-2}
"""Relative. On CPU float32 sums may come in another order. On Ascend nothing was measured: convolutions use HF32 by
default there, which keeps 10 bits of a fraction (documented)."""

CANN_ACCEPTED, DRIVER = tuple(TABLES["cann"]), Path("/usr/local/Ascend/driver/version.info")
OLD_INTERFACE: list[str] = TABLES["old_interface"]
READ_BY_CARD = re.compile("ASCEND_|HCCL_|RANK_TABLE|TE_PARALLEL")
"""Beginnings of the variables that decide how a card is used; MindSpore sets some by itself."""

HEADS, TOKENS, ROUNDING = 2, 64, 5e-3
"""Of the attention that is tried, whose relative error in float16 is 6e-4 on a CPU."""


def run(argv: Sequence[str]) -> int:
    """Check by a command line; returns 0, or 1 if a check failed."""
    config = load(DoctorConfig, argv, tell)
    if config.device.mixed_precision not in (None, "no"):
        raise ConfigError("--mixed_precision: the doctor compares figures in float32; leave it out")
    report = config.report.report and Path(config.report.report)
    if report and (report.exists() or not report.parent.is_dir()):
        raise ConfigError(f"--report {report}: expected the name of a new file, in a folder that is there")
    said: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        said.append(line)

    failed = 0
    for name, look in checks(config.device).items():
        started = time.monotonic()
        mark, found = examine(look)
        failed += mark != "ok"
        say(f"{mark:6}  {name:13}  {found}  [{time.monotonic() - started:.1f} s]")
        if name == DEVICE and mark != "ok":
            say(what_to_look_at(ascend.find_ascend()))
            break
    else:
        say("everything works" if not failed else f"{count_of(failed, 'check')} failed")
    if report:
        # Without the user's name, which a home folder has.
        text = re.sub(rf"{re.escape(str(Path.home()))}(?=[/:\s])", "~", "\n".join([*said, *surroundings()]))
        write_bytes(report, text.encode())
        tell(f"wrote {report}")
    return FAILED_STATUS if failed else 0


def surroundings() -> list[str]:
    """System, packages, and what MindSpore, CANN and launchers read of the environment: a line each."""
    packages = {f"{one.name}=={one.version}" for one in importlib.metadata.distributions()}
    return ["", platform.platform(), "", *sorted(packages, key=str.lower), "", *_variables(REPORTED), ""]


def _variables(names: re.Pattern[str]) -> list[str]:
    """What the environment has under names that begin so."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if names.match(name)]


def what_to_look_at(card: ascend.Ascend) -> str:
    """A page on a card that MindSpore cannot use: what each part shows here, and what to do."""
    script = card.script or f"{ascend.CANN_ROOTS[0]}/{ascend.CANN_FOLDERS[0]}/set_env.sh"
    page: str = TABLES["what_to_look_at"]
    return page.format(
        devices=", ".join(card.devices) or "none (/dev/davinci*)",
        npu_smi=shutil.which("npu-smi") or "not on PATH",
        manager=ascend.MANAGER,
        variable=ascend.CANN_HOME,
        home=card.home or "not set",
        cann=cann_version(card.home) or "unknown",
        accepted=", ".join(CANN_ACCEPTED),
        found=card.script or "not found in " + " or ".join(ascend.CANN_ROOTS),
        script=script,
        mindspore=ms.__version__,
        part=card.complaint or "loaded",
    )


def examine(look: Callable[[], str]) -> tuple[str, str]:
    """Whether a check is passed, and one line of what it found."""
    try:
        return "ok", look()
    except UserError as error:
        return "FAILED", str(error)
    except Exception as error:  # noqa: BLE001 - MindSpore fails in many ways, and the other checks still tell something.
        return "FAILED", f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def checks(device: DeviceConfig) -> dict[str, Callable[[], str]]:
    """Name -> check, each after those that it needs. One says what it found, or raises UserError with what to do."""
    of_card = {"driver": driver, "attention": attention, "kernels": kernels}
    of_card["environment"] = lambda: ", ".join(_variables(READ_BY_CARD))
    return {
        "versions": versions,
        DEVICE: lambda: check_device(device),
        **(of_card if device.device_target != "CPU" and ascend.find_ascend().is_usable else {}),
        "memory": memory,
        "disk": disk,
        "training step": lambda: compare(training_figures()),
        "sampling": lambda: compare(sampling_figures()),
        "compile cache": lambda: "not used in PyNative mode" if device.ms_mode == 1 else compile_twice(),
    }


def check_device(wanted: DeviceConfig) -> str:
    """Choose the device as every command does, and say what is known of it."""
    card = ascend.find_ascend()
    if wanted.device_target == "Ascend" and not card.is_usable:
        raise UserError(card.obstacle or ascend.NO_CARD)
    set_up(wanted)
    how = f"deterministic {wanted.deterministic}, jit_level {wanted.jit_level or 'left to MindSpore'}"
    if formulation() is Formulation.CPU:
        return f"CPU, {count_of(os.cpu_count() or 1, 'core')}, {platform.machine()}; {how}"
    cann = cann_version(card.home)
    if cann and not cann.startswith(CANN_ACCEPTED):
        raise UserError(f"CANN {cann}: expected one of {', '.join(CANN_ACCEPTED)}")
    count = ms.hal.device_count("Ascend")
    where = f"in {card.home}" if card.home else f"{ascend.CANN_HOME} is not set"
    return f"{count} x Ascend {ascend.card_name()}, CANN {cann or 'of unknown version'} ({where}); {how}"


def cann_version(home: Path | str | None) -> str | None:
    """The version that CANN gives in its folder."""
    for path in (Path(home, "compiler", "version.info"), Path(home, "version.cfg")) if home else ():
        if path.is_file() and (match := re.search(r"(?i)version[^\n=]*=\W*(?:.*:)?([0-9][\w.]+)", path.read_text())):
            return match[1]
    return None


def driver(file: Path = DRIVER) -> str:
    """The driver's version, and whether it is known to go with this CANN."""
    said = file.read_text() if file.is_file() else ""
    if not said and (program := shutil.which("npu-smi")):
        said = subprocess.run([program, "info"], capture_output=True, text=True, timeout=60, check=False).stdout
    match = re.search(r"(?m)(?:^|\s)Version[=:]\s*(\S+)", said)
    if not match:
        return f"of unknown version: neither {file} nor npu-smi tells it (a container sees what it was started with)"
    cann = cann_version(os.environ.get(ascend.CANN_HOME)) or "of unknown version"
    known: dict[str, bool] = next((drivers for name, drivers in TABLES["drivers"].items() if cann.startswith(name)), {})
    fits = next((fits for name, fits in known.items() if match[1].lower().startswith(name)), None)
    if fits is False:
        fitting = ", ".join(name for name in known if known[name])
        raise UserError(f"{match[1]}: expected with CANN {cann} one of {fitting}")
    return f"{match[1]}, {'goes' if fits else 'not known whether it goes'} with CANN {cann}"


def attention() -> str:
    """Attention in float16 with heads of every size in the published bases, beside float64."""
    unets = [model.unet for model in PUBLISHED_MODELS]
    sizes = {spec.block_out_channels[level] // heads for spec in unets for level, heads in enumerate(spec.num_heads)}
    found = {size: _attention_error(size) for size in sorted(sizes)}
    said = ", ".join(f"{size} {'fused' if is_fused else 'in parts'}" for size, (is_fused, _) in found.items())
    worst = max(error for _, error in found.values())
    if not worst <= ROUNDING:
        raise UserError(f"heads of {said}; relative error {worst:.0e}, expected at most {ROUNDING:g}")
    return f"heads of {said}; to {worst:.0e}"


def _attention_error(size: int) -> tuple[bool, float]:
    """Whether attention with such heads is one kernel, and the relative error of its result."""
    cell = MultiHeadAttention(HEADS, size)
    rows = [standard_normal((1, TOKENS, HEADS * size), size, name).astype(np.float16) for name in "qkv"]
    q, k, v = (x.astype(np.float64).reshape(TOKENS, HEADS, size).transpose(1, 0, 2) for x in rows)
    weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(size))
    expected = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(1, TOKENS, HEADS * size)
    result = cell(*map(Tensor, rows)).asnumpy()
    return cell.fuses, float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def kernels() -> str:
    """By which interface of CANN kernels are reached, in MindSpore's simulation."""
    te = "can be imported" if importlib.util.find_spec("te") else "cannot be imported: source CANN's set_env.sh"
    return f"aclnn, but acl, compiled by CANN (te {te}) when first used, of {', '.join(OLD_INTERFACE)}"


def compile_twice() -> str:
    """The same graph compiled and read back gives the same bits, with a cache of its own."""
    latents = toy_networks.normal("latents", *toy_networks.LATENTS)
    with tempfile.TemporaryDirectory() as folder:
        cache = CompileCache(Path(folder))
        with use_compile_cache(cache):
            first, second = (_decoder()(latents).asnumpy() for _ in range(2))
    if (cache.found, cache.kept) != (1, 1):
        raise UserError(f"MindSpore did not read its graph again; set {ENABLE}=0")
    if not np.array_equal(first, second):
        raise UserError(f"a graph from the cache gives other numbers; set {ENABLE}=0")
    where = compile_cache()
    return f"sound; graphs are kept in {where.folder}" if where else f"sound, and switched off; {ENABLE}=1 is on"


def compare(figures: dict[str, float]) -> str:
    """Whether figures are those that are stored."""
    tolerance = TOLERANCES[formulation()]
    errors = {name: abs(value / STORED[name] - 1) for name, value in figures.items()}
    found = ", ".join(f"{name} {value:.6g}" for name, value in figures.items())
    wrong = [name for name, error in errors.items() if not error <= tolerance]
    if wrong:
        expected = ", ".join(f"{name} {STORED[name]:.6g}" for name in wrong)
        raise UserError(f"{found}; expected {expected}, to {tolerance:.0e}")
    return f"{found}; as stored, to {max(errors.values()):.0e}"


def versions() -> str:
    """What is installed, and whether it is what was tested."""
    lines = (line.partition(";")[0].strip() for line in importlib.metadata.requires("dreambooth-ms") or ())
    required = dict(line.split("==") for line in lines if "==" in line)
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    others = [f"{name} {version}" for name, version in required.items() if found.get(name, version) != version]
    own = f"dreambooth_ms {__version__}, Python {platform.python_version()}"
    said = ", ".join([own, *map(" ".join, found.items())])
    if others:
        raise UserError(f"{said}; tested with {', '.join(others)}: pip install -r requirements.txt")
    return said


def memory() -> str:
    """Memory that is free in this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    said = f"{free / GIB:.1f} GiB free"
    if free < MIN_MEMORY:
        raise UserError(f"{said}; the smallest base takes {MIN_MEMORY / GIB:.0f} GiB")
    return said


def disk() -> str:
    """Space that is free where runs are written by default, which is here."""
    free = shutil.disk_usage(".").free
    said = f"{free / GIB:.1f} GiB free in {Path.cwd()}"
    if free < MIN_DISK:
        raise UserError(f"{said}; a run with a real base takes more: free some space or go elsewhere")
    return said


def training_figures() -> dict[str, float]:
    """Loss, norm of the gradients, and norm of the adapters' second factors after a LoRA step."""
    unet = UNet2DConditionModel(toy_networks.SD_UNET)
    initialise(unet, toy_networks.SEED)
    layers = inject_lora(unet, 2, 2.0, ["to_q", "to_k", "to_v", "to_out.0"])
    initialise_lora(layers, toy_networks.SEED)
    trainables = lora_trainables(layers)
    optimiser = AdamW(trainables, Hyperparameters())
    step = TrainStep(DiffusionLoss(unet), trainables, optimiser, 1.0)
    text = toy_networks.normal("text", toy_networks.ROWS, toy_networks.TOKENS, toy_networks.SD_UNET.cross_attention_dim)
    optimiser.prepare(1, 1e-3)
    loss, _, norm = step(*toy_networks.batch(encoder_hidden_states=text).tensors())
    update = _norm([layer.factors()[1] for layer in layers.values()])
    return {"loss": float(loss.asnumpy()), "gradient norm": float(norm.asnumpy()), "update": update}


def sampling_figures() -> dict[str, float]:
    """Norms of a guided prediction and of a decoded picture."""
    unet = UNet2DConditionModel(toy_networks.SDXL_UNET)
    initialise(unet, toy_networks.SEED)
    rows, spec = toy_networks.ROWS, toy_networks.SDXL_UNET
    latents = toy_networks.normal("latents", *toy_networks.LATENTS)
    prediction = Denoiser(unet, guided=True)(
        latents,
        Tensor(np.array([500], np.float32)),
        Tensor(np.array([5, 0], np.float32)),
        toy_networks.normal("text", rows, toy_networks.TOKENS, spec.cross_attention_dim),
        toy_networks.normal("pooled", rows, toy_networks.POOLED),
        toy_networks.add_time_ids(),
    )
    return {"prediction": _norm([prediction.asnumpy()]), "picture": _norm([_decoder()(latents).asnumpy()])}


def _decoder() -> CellMethod:
    vae = AutoencoderKL(toy_networks.VAE)
    initialise(vae, toy_networks.SEED)
    return CellMethod(vae.decode)


def _norm(arrays: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(array.astype(np.float64)).sum() for array in arrays)))

"""On what a command computes: it is told, and a card that MindSpore cannot use is told with what to do."""

import subprocess
import sys

import mindspore as ms
import pytest

from dreambooth_ms.cli import device as cli_device
from dreambooth_ms.cli.device import set_up
from dreambooth_ms.config.load import load
from dreambooth_ms.config.sample import SampleConfig
from dreambooth_ms.config.shared import DeviceConfig
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import DeviceError
from dreambooth_ms.runtime import ascend, device
from dreambooth_ms.runtime.ascend import find_ascend
from dreambooth_ms.runtime.device import Formulation, set_up_device, settled_precision
from tools import ascend_stubs
from tools.simulate_ascend import simulate

NODES = ("davinci0", "davinci_manager")


@pytest.fixture
def machine(tmp_path):
    """Makes a machine's folders and looks at them."""

    def look(nodes=(), cann=None, sourced=False):
        for node in nodes:
            (tmp_path / node).touch()
        if cann:
            (tmp_path / "Ascend" / cann).mkdir(parents=True)
            (tmp_path / "Ascend" / cann / "set_env.sh").touch()
        environment = {"ASCEND_HOME_PATH": "/somewhere"} if sourced else {}
        return find_ascend(tmp_path, environment, [str(tmp_path / "none"), str(tmp_path / "Ascend")])

    return look


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ({}, None),
        ({"cann": "cann"}, "no card (/dev/davinci*); install the driver, or start the container"),
        ({"sourced": True}, "no card (/dev/davinci*)"),
        ({"nodes": NODES[:1]}, "/dev/davinci_manager is missing"),
        ({"nodes": NODES}, "CANN's environment is not set; install CANN"),
        ({"nodes": NODES, "cann": "cann"}, "Ascend/cann/set_env.sh"),
        ({"nodes": NODES, "cann": "ascend-toolkit"}, "Ascend/ascend-toolkit/set_env.sh"),
        # MindSpore's loader says what it misses; here that is all of CANN.
        ({"nodes": NODES, "sourced": True}, "not loaded (libge_runner.so: cannot open shared object file"),
    ],
)
def test_what_keeps_mindspore_from_the_card_is_said_with_what_to_do(machine, signs, said):
    found = machine(**signs)
    assert not found.is_usable
    assert (found.obstacle is None) if said is None else said in found.obstacle


def test_a_card_that_mindspore_can_use_has_no_obstacle():
    found = ascend.Ascend(NODES, "/cann", None, "")
    assert found.is_usable and found.obstacle is None


def test_a_card_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(DeviceError, match=r"no Ascend device was found here; .*--device_target CPU"):
        set_up_device("Ascend", 0)


def told(capsys, **wanted):
    return set_up(DeviceConfig(**wanted)), capsys.readouterr().err.splitlines()


def test_the_device_and_the_precision_are_told(capsys):
    for precision, dtype in ((None, "float32"), ("fp16", "float16")):
        settled, (line,) = told(capsys, mixed_precision=precision)
        assert line.startswith("computing on the CPU (") and line.endswith(f"in {dtype}")
        assert settled.mixed_precision == precision


def test_auto_is_float32_on_a_cpu_and_says_why(capsys, monkeypatch):
    settled, (line,) = told(capsys, mixed_precision="auto")
    assert settled == DeviceConfig()
    assert line.endswith("in float32; --mixed_precision auto is fp16 on Ascend only: on a CPU that is slower")
    monkeypatch.setattr(device, "_formulation", Formulation.ASCEND)
    assert settled_precision("auto") == "fp16"
    assert [settled_precision(one) for one in (None, "no", "bf16")] == [None, "no", "bf16"]


def test_a_card_that_cannot_be_used_is_a_warning_unless_the_cpu_was_asked_for(capsys, monkeypatch, machine):
    signs = machine(nodes=NODES, cann="cann")
    monkeypatch.setattr(cli_device, "find_ascend", lambda: signs)
    _, (warning, _) = told(capsys)
    assert warning.startswith("warning: the CPU computes") and "source " in warning
    assert len(told(capsys, device_target="CPU")[1]) == 1


LEVELS = """
import mindspore as ms
from dreambooth_ms.cli.device import set_up
from dreambooth_ms.config.shared import DeviceConfig
from dreambooth_ms.ops import MultiHeadAttention
from dreambooth_ms.runtime.graph_key import graph_key
for level in (None, "O0", "O1"):
    set_up(DeviceConfig(device_target="CPU", jit_level=level))
    print(ms.get_context("jit_config").get("jit_level"), graph_key(MultiHeadAttention(1, 8), ()))
"""


def test_the_jit_level_is_mindspores_and_part_of_a_graphs_key():
    """In a process of its own, all of which it is for."""
    done = subprocess.run([sys.executable, "-c", LEVELS], stdout=subprocess.PIPE, text=True, check=True)
    levels, keys = zip(*map(str.split, done.stdout.splitlines()), strict=True)
    assert levels == ("None", "O0", "O1") and len(set(keys)) == 3


def test_a_cpu_is_deterministic_without_being_asked(capsys, monkeypatch):
    monkeypatch.setattr(ms, "set_deterministic", lambda on: pytest.fail("it would only slow it down"))
    assert told(capsys, deterministic=True)[0] == DeviceConfig()


@pytest.mark.skipif(bool(ascend_stubs.missing_tools()), reason="needs g++ and binutils")
def test_a_card_is_made_deterministic_once_unless_it_is_not_to_be():
    code = """
import os, mindspore as ms
from dreambooth_ms.runtime.device import set_up_device
for wanted in (False, True, True):
    set_up_device("Ascend", 0, deterministic=wanted)
    print("seen", ms.get_context("deterministic"), os.environ.get("HCCL_DETERMINISTIC"))
"""
    reports, said = simulate(["-c", code])
    assert not reports[""].refused, said
    assert [line for line in said.splitlines() if line.startswith("seen")] == ["seen OFF None", *["seen ON true"] * 2]


SDXL = ("finetune_dreambooth_lora_910a", "finetune_dreambooth_lora_910b", "finetune_dreambooth_textencoder_lora_910b")


def test_the_configurations_under_mindones_names_have_its_precision():
    """mindone's `ms_amp_level` is O2 by default, which is fp16 on Ascend."""
    pictures = ["--instance_data_dir", "d", "--instance_prompt", "p", "--class_data_dir", "c", "--class_prompt", "q"]
    for name in SDXL:
        config = load(TrainConfig, ["--config", f"configs/training/sd_xl_base_{name}.yaml", *pictures])
        assert config.device.mixed_precision == "auto"
    for name in ("base", "refiner"):
        sampled = load(SampleConfig, ["--config", f"configs/inference/sd_xl_{name}.yaml", "--prompt", "p"])
        assert sampled.device.mixed_precision == "auto"

"""Two processes, started by mpirun or msrun, train as one process with two batches would.

The programs run as users run them. OpenMPI's mpirun comes from a package of the system: openmpi-bin in Debian.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.adapters.file import FILE_NAME
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.open import read_tensors
from dreambooth_ms.training.checkpoint import MANIFEST, STATE, find_latest
from dreambooth_ms.training.history import read_history
from tests.tiny_model import write_random_model, write_random_sdxl

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 600
END_SECONDS = 60
STEPS = 10

# Sums over rows in another order, as a share of what the weights moved in the last 5 of 10 steps.
TOLERANCE = 1e-3

WORD = ["--modifier_token", "<new1>", "--instance_prompt", "a photo of <new1> star"]
VALIDATION = ["--validation_loss", "--validation_loss_steps", "5"]


def launched(launcher, count=2):
    """The command that starts Python's processes, under one of the launchers."""
    if launcher == "msrun":
        port = str(20000 + os.getpid() % 10000)
        return [
            str(Path(sys.executable).parent / "msrun"),
            *(f"--worker_num={count}", f"--local_worker_num={count}", "--join=True"),
            *("--log_dir=msrun", f"--master_port={port}", "--tail_worker_log=0"),
        ]
    if shutil.which("mpirun") is None:
        pytest.fail("mpirun is missing: install OpenMPI (Debian: apt-get install openmpi-bin)")
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(count)]


class Place:
    """A folder with base models and pictures, where commands are run."""

    def __init__(self, root):
        self.root = root
        write_random_model(root / "sd", levels=0)
        write_random_sdxl(root / "sdxl", levels=0)
        for folder, count in (("dog", 3), ("class", 2)):
            (root / folder).mkdir()
            for number in range(count):
                pixels = np.random.default_rng([count, number]).integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{number}.png")

    def start(self, launcher, arguments, is_parallel="True", **variables):
        python = "python" if launcher == "msrun" else sys.executable
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MS_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [*launched(launcher), python, "-m", "dreambooth_ms", *arguments, "--is_parallel", is_parallel],
            cwd=self.root,
            env=environment | {"PYTHONPATH": str(REPOSITORY), "PATH": path} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, launcher, arguments, **variables):
        process = self.start(launcher, arguments, **variables)
        printed, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, printed
        return printed

    def weights(self, name, step=STEPS):
        tensors, _ = read_tensors(self.root / name / f"checkpoint-{step}" / STATE)
        return {key: value for key, value in tensors.items() if "moment" not in key}

    def count_in_graphs(self, primitive, folder):
        """How often a primitive is in each of the graphs that rank 0 left."""
        graphs = [path.read_text() for path in (self.root / folder / "rank_0").rglob("*validate*.ir")]
        return [len(re.findall(rf"= (?:PrimFunc_)?{primitive}\(", graph)) for graph in graphs]

    def files_of_checkpoint(self, name, step):
        """What each holds, byte by byte; not the manifest, which has the configuration and digests of the others."""
        folder = self.root / name / f"checkpoint-{step}"
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert files.pop(Path(MANIFEST))
        return files


def train(family, name, *flags, steps=STEPS, batch=1, method="lora"):
    """A training with prior preservation into the folder `name`."""
    return [
        *("train", "--seed", "7", "--output_dir", name, "--max_train_steps", str(steps), "--method", method),
        *("--pretrained_model_name_or_path", family, "--resolution", "32", "--random_flip", "--center_crop"),
        *("--instance_data_dir", "dog", "--instance_prompt", "a photo of star", "--train_batch_size", str(batch)),
        *("--with_prior_preservation", "--class_data_dir", "class", "--class_prompt", "a photo"),
        *("--num_class_images", "4", "--infer_steps", "2", "--sample_batch_size", "2", "--checkpointing_steps", "5"),
        *(("--learning_rate", "1e-4") if method == "full" else ()),
        *flags,
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("runs"))


def dump_into(folder):
    """The variables that let MindSpore leave its compiled graphs in a folder."""
    return {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_DUMP_IR_PASSES": "validate", "MS_DEV_SAVE_GRAPHS_PATH": folder}


def difference(place, one, other):
    """How far two runs ended from each other, over how far the second went in its last 5 steps."""
    ours, theirs, before = place.weights(one), place.weights(other), place.weights(other, 5)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 0
    return _distance(ours, theirs) / _distance(before, theirs)


def _distance(one, other):
    return float(np.sqrt(sum(np.square(one[name] - other[name], dtype=np.float64).sum() for name in one)))


@pytest.fixture(scope="module")
def two(place):
    """A LoRA of two processes under mpirun, which left its compiled graphs too; gives what it printed."""
    return place.run("mpirun", train("sd", "two", *VALIDATION), **dump_into("graphs"))


@pytest.fixture(scope="module")
def one(place, two):
    """The same rows in one process, with the class pictures of the other run."""
    here = Path.cwd()
    os.chdir(place.root)
    try:
        assert main(train("sd", "one", *VALIDATION, batch=2)) == 0
    finally:
        os.chdir(here)


class TestTheSameTraining:
    def test_two_processes_are_one_with_twice_the_batch(self, place, two, one):
        assert difference(place, "two", "one") < TOLERANCE

    @pytest.mark.parametrize(
        ("launcher", "family", "method", "flags", "flags_alone"),
        [
            ("msrun", "sd", "full", ["--zero_stage", "1"], []),
            ("msrun", "sdxl", "lora", ["--train_text_encoder"], ["--train_text_encoder"]),
            ("mpirun", "sdxl", "full", ["--gradient_accumulation_steps", "2"], ["--train_batch_size", "4"]),
            ("mpirun", "sd", "custom_diffusion", [*WORD, "--zero_stage", "1"], WORD),
        ],
    )
    def test_so_with_every_method_and_family(self, place, monkeypatch, launcher, family, method, flags, flags_alone):
        name = f"{family}-{method}"
        place.run(launcher, train(family, f"{name}-two", *flags, method=method))
        monkeypatch.chdir(place.root)
        assert main(train(family, f"{name}-one", *flags_alone, method=method, batch=2)) == 0
        assert difference(place, f"{name}-two", f"{name}-one") < TOLERANCE

    def test_checkpoints_are_the_same_files_whatever_the_zero_stage(self, place, two):
        place.run("mpirun", train("sd", "zero", "--zero_stage", "1", steps=5), **dump_into("graphs-zero"))
        assert sum(place.count_in_graphs("AllGather", "graphs-zero")) == 1
        ours, theirs = place.files_of_checkpoint("zero", 5), place.files_of_checkpoint("two", 5)
        assert {path.name for path in ours} == {STATE, FILE_NAME}
        assert ours == theirs

    def test_half_precision_skips_the_same_step_everywhere(self, place, monkeypatch):
        """The first step overflows: its scale is 2^32, and 2^12 from then on."""
        half = ["--mixed_precision", "fp16", "--init_loss_scale", str(2.0**32), "--loss_scale_factor", str(2.0**20)]
        place.run("mpirun", train("sd", "half-two", *half))
        monkeypatch.chdir(place.root)
        assert main(train("sd", "half-one", *half, batch=2)) == 0
        two, one = read_history(place.root / "half-two"), read_history(place.root / "half-one")
        assert [step["skipped_steps"] for step in two] == [step["skipped_steps"] for step in one] == [1] * STEPS
        assert [step["loss_scale"] for step in two] == [2.0**32] + [2.0**12] * (STEPS - 1)
        assert difference(place, "half-two", "half-one") < TOLERANCE

    def test_the_loss_shown_is_that_of_all_rows(self, place, two, one):
        reported, expected = read_history(place.root / "two"), read_history(place.root / "one")
        assert [step["step"] for step in reported] == list(range(1, STEPS + 1))
        assert [step["step"] for step in reported if "validation_loss" in step] == list(range(5, STEPS + 1, 5))
        for ours, theirs in zip(reported, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)

    def test_a_resumed_run_may_have_another_number_of_processes(self, place, two, one, monkeypatch):
        shutil.copytree(place.root / "two" / "checkpoint-5", place.root / "resumed" / "checkpoint-5")
        shutil.copy(place.root / "two" / "config.yaml", place.root / "resumed")
        monkeypatch.chdir(place.root)
        assert main(train("sd", "resumed", batch=2)) == 0
        assert difference(place, "resumed", "one") < TOLERANCE

    def test_but_not_of_rows(self, place, two, monkeypatch, capfd):
        monkeypatch.chdir(place.root)
        assert main(train("sd", "two", batch=1)) == 2
        assert "--num_processes: 2 there, 1 here" in capfd.readouterr().err


class TestWorkIsShared:
    def test_all_gradients_are_summed_in_one_reduction(self, place, two):
        assert sorted(place.count_in_graphs("AllReduce", "graphs"))[-2:] == [0, 1]
        assert not any(place.count_in_graphs("AllGather", "graphs"))

    def test_class_pictures_are_sampled_once_each(self, place, two):
        assert len(list((place.root / "class").glob("*.png"))) == 4
        assert [path.name for path in sorted((place.root / "class").glob("class-*"))] == [
            "class-00000.png",
            "class-00001.png",
        ]

    def test_one_process_speaks(self, two):
        assert two.count(" parameters in ") == 1
        assert "WARNING" not in two


class TestMistakes:
    def test_a_mistake_is_told_once(self, place):
        process = place.start("mpirun", train("sd", "wrong", "--instance_data_dir", "nowhere"))
        printed, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 2
        assert [line for line in printed.splitlines() if "error:" in line] == [
            "dreambooth-ms: error: nowhere: no such folder; expected a folder with pictures "
            "(png, jpg, jpeg, jfif, jpe, webp, bmp, tif, tiff, gif, avif, heic, heif, hif)"
        ]

    def test_several_processes_need_the_flag(self, place):
        process = place.start("mpirun", train("sd", "wrong"), is_parallel="False")
        printed, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 2
        assert "mpirun started 2 processes; give --is_parallel True" in printed

    def test_the_flag_needs_several_processes(self, place, monkeypatch, capfd):
        monkeypatch.chdir(place.root)
        assert main([*train("sd", "wrong"), "--is_parallel", "True"]) == 2
        assert "this process was started alone; start several by mpirun -n 2" in capfd.readouterr().err


def workers(process):
    """The processes of a run that train, by rank: the children of its launcher that have a place of theirs."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
            parents = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if b"dreambooth_ms\0train" not in command or int(parents[1]) != process.pid:
            continue
        variables = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
        rank = variables.get(b"OMPI_COMM_WORLD_RANK", variables.get(b"MS_NODE_ID"))
        if rank is not None and variables.get(b"MS_ROLE") != b"MS_SCHED":
            found[int(rank)] = int(folder.name)
    return found


def left_behind(process):
    """Commands that still run of those that a launcher started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if session == process.pid and command:
            found.append(command)
    return found


class TestDeath:
    @pytest.mark.parametrize(("launcher", "victim", "moment"), [("mpirun", 1, "step"), ("msrun", 0, "saving")])
    def test_a_rank_that_dies_ends_the_run_and_loses_nothing(self, place, launcher, victim, moment):
        name = f"killed-{moment}"
        process = place.start(launcher, train("sd", name, "--checkpointing_steps", "1", steps=5000))
        self.wait_for(process, place.root / name, 3)
        if moment == "saving":
            while not list((place.root / name).glob(".*")) and process.poll() is None:
                time.sleep(0.001)
        os.kill(workers(process)[victim], signal.SIGKILL)
        killed = time.monotonic()
        printed, _ = process.communicate(timeout=TIMEOUT)
        assert time.monotonic() - killed < END_SECONDS
        assert process.returncode != 0
        log = place.root / "msrun" / f"worker_{1 - victim}.log"
        said = printed + (log.read_text() if launcher == "msrun" else "")
        assert f"rank {victim} ended without a word" in said or f"rank {victim} with PID" in said, said
        assert left_behind(process) == []
        assert find_latest(place.root / name).step >= 2  # The third may be the one that was being saved.

    @staticmethod
    def wait_for(process, folder, steps):
        while len(read_history(folder)) < steps and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0]

    @pytest.mark.real
    def test_twenty_kills_at_random_moments(self, place):
        """From before the first import to steps and saves, a rank at random, both launchers in turns: about 10 min."""
        draws = random.Random(3)
        name, saved = "killed-often", 0
        # Compiled graphs are kept from here, so that on a busy machine too the moments reach into the steps.
        place.run("mpirun", train("sd", "compiled", "--checkpointing_steps", "1", steps=1))
        for attempt in range(20):
            launcher, victim = ("mpirun", "msrun")[attempt % 2], draws.randrange(2)
            process = place.start(launcher, train("sd", name, "--checkpointing_steps", "1", steps=100000))
            give_up = time.monotonic() + draws.random() * 40
            while time.monotonic() < give_up or victim not in workers(process):
                time.sleep(0.01)
            os.kill(workers(process)[victim], signal.SIGKILL)
            killed = time.monotonic()
            printed, _ = process.communicate(timeout=TIMEOUT)
            print(f"{attempt}: {launcher}, rank {victim}, ended after {time.monotonic() - killed:.1f} s")
            assert time.monotonic() - killed < END_SECONDS
            assert process.returncode != 0
            assert left_behind(process) == []
            found = find_latest(place.root / name)
            assert (found.step if found else 0) >= saved, printed
            saved = found.step if found else 0
        assert saved > 20


@pytest.mark.real
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip (Debian: iproute2)")
def test_two_machines_each_with_its_own_msrun(place):
    """Two network namespaces stand for the machines; the folders are on a file system that both see."""
    hosts = ("dreambooth_a", "dreambooth_b")
    links = [["netns", "add", host] for host in hosts] + [["-n", host, "link", "set", "lo", "up"] for host in hosts]
    links.append(["link", "add", "da", "netns", hosts[0], "type", "veth", "peer", "name", "db", "netns", hosts[1]])
    for host, device, address in zip(hosts, ("da", "db"), ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
        links += [["-n", host, "addr", "add", address, "dev", device], ["-n", host, "link", "set", device, "up"]]
    try:
        for link in links:
            subprocess.run(["ip", *link], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MS_")}
        environment |= {
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        msrun = ["msrun", "--worker_num=2", "--local_worker_num=1", "--master_addr=10.77.0.1", "--join=True"]
        started = [
            subprocess.Popen(
                [
                    *("ip", "netns", "exec", host, *msrun, f"--node_rank={rank}", f"--log_dir={host}"),
                    *("python", "-m", "dreambooth_ms", *train("sd", "machines"), "--is_parallel", "True"),
                ],
                cwd=place.root,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, host in enumerate(hosts)
        ]
        printed = [process.communicate(timeout=TIMEOUT)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], printed
        assert len(read_history(place.root / "machines")) == STEPS
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], check=False)

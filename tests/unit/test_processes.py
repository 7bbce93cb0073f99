"""The processes of a run connect, exchange values, and all end: in real processes, but without MindSpore."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from textwrap import dedent, indent

import pytest

from dreambooth_ms.errors import DeviceError
from dreambooth_ms.processes.group import ALONE, Processes
from dreambooth_ms.processes.launch import SCHEDULER, find_launch
from dreambooth_ms.processes.rendezvous import connect, listen, wait_until_listening

REPOSITORY = Path(__file__).parents[2]
END_SECONDS = 60
"""Within this, the death of one process must have ended all."""

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "PMIX_NAMESPACE": "1914241025",
}
MSRUN = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "8", "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118"}

PROGRAM = """
import os, signal, sys, time
from dreambooth_ms.errors import DataError
from dreambooth_ms.processes import rendezvous
from dreambooth_ms.processes.launch import find_launch
from dreambooth_ms.processes.group import run_in_group
rendezvous.START_SECONDS = {start_seconds}

def work(processes):
    rank = processes.rank
{work}
    return 0

def complain(line):
    print("error: " + line, file=sys.stderr)

sys.exit(run_in_group(find_launch(os.environ), work, complain, exchange_seconds=5))
"""


class Run:
    """Some processes, started as msrun starts its workers; its scheduler is a process of the same kind."""

    def __init__(self, work, count=2, absent=(), start_seconds=15):
        program = PROGRAM.replace("{work}", indent(dedent(work), "    "))
        program = program.replace("{start_seconds}", str(start_seconds))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        place = {"MS_WORKER_NUM": str(count), "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": port}
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | place
        scheduler = (
            "import os; from dreambooth_ms.processes.launch import find_launch\n"
            "from dreambooth_ms.processes import rendezvous\n"
            f"rendezvous.START_SECONDS = {start_seconds}\n"
            "rendezvous.Rendezvous(find_launch(os.environ), 5, print).wait_for_end()"
        )
        self.workers = {
            rank: self._start(program, environment | {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank)})
            for rank in range(count)
            if rank not in absent
        }
        self.scheduler = self._start(scheduler, environment | {"MS_ROLE": "MS_SCHED"})

    def _start(self, program, environment):
        return subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self):
        """Exit statuses, what was printed, and the lines of errors, of all workers, by rank."""
        give_up = time.monotonic() + END_SECONDS
        printed = {
            rank: process.communicate(timeout=max(give_up - time.monotonic(), 1))
            for rank, process in [*self.workers.items(), (SCHEDULER, self.scheduler)]
        }
        statuses = [process.returncode for process in self.workers.values()]
        errors = [line for _, said in printed.values() for line in said.splitlines() if line.startswith("error:")]
        return statuses, [out.strip() for rank, (out, _) in printed.items() if rank != SCHEDULER], errors


class TestWhatTheLauncherSays:
    def test_a_process_that_was_started_alone(self):
        assert find_launch({"PATH": "/bin"}) is None

    def test_openmpi(self):
        launch = find_launch(OPENMPI)
        assert (launch.launcher, launch.rank, launch.count, launch.host) == ("mpirun", 3, 8, "127.0.0.1")

    def test_ranks_of_a_job_meet_at_one_port_and_other_jobs_at_another(self):
        here, there = find_launch(OPENMPI), find_launch(OPENMPI | {"OMPI_COMM_WORLD_RANK": "0"})
        assert (here.host, here.port) == (there.host, there.port)
        others = {find_launch(OPENMPI | {"PMIX_NAMESPACE": str(number)}).port for number in range(50)}
        assert len(others) > 45
        assert all(20000 <= port < 32768 and port % 2 == 0 for port in others)

    def test_openmpi_over_several_machines_meets_where_mpirun_runs(self):
        several = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
        uri = {"OMPI_MCA_orte_hnp_uri": "1914241024.0;tcp://10.0.0.7,192.168.0.2:45705;tcp6://[fd00::2]:53763"}
        assert find_launch(several | uri).host == "10.0.0.7"
        assert find_launch(several | uri | {"MS_SCHED_HOST": "10.0.0.9", "MS_SCHED_PORT": "9000"}).host == "10.0.0.9"
        assert find_launch(several | {"MS_SCHED_HOST": "10.0.0.9"}).host == "10.0.0.9"
        with pytest.raises(DeviceError, match="-x MS_SCHED_HOST="):
            find_launch(several)

    def test_msrun(self):
        launch = find_launch(MSRUN | {"MS_NODE_ID": "5"})
        assert (launch.launcher, launch.rank, launch.count) == ("msrun", 5, 8)
        assert (launch.host, launch.port, launch.channel_port) == ("10.0.0.1", 8118, 8119)

    def test_the_scheduler_of_msrun(self):
        assert find_launch(MSRUN | {"MS_ROLE": "MS_SCHED"}).rank == SCHEDULER

    def test_msrun_without_node_rank_is_refused(self):
        with pytest.raises(DeviceError, match="give every machine its --node_rank"):
            find_launch(MSRUN)

    def test_the_environment_of_a_place_leads_back_to_it(self):
        launch = find_launch(OPENMPI)
        again = find_launch(launch.scheduler_environment)
        assert (again.rank, again.count, again.host, again.port) == (3, 8, launch.host, launch.port)
        assert find_launch(replace(launch, rank=SCHEDULER).scheduler_environment).rank == SCHEDULER


class TestMachines:
    @pytest.mark.parametrize(("rank", "count"), [(0, 2), (1, 1), (2, 2)])
    def test_processes_on_the_same_one_are_counted(self, rank, count):
        assert Processes(rank, 3, exchange=lambda what, value: ["a", "b", "a"]).count_on_this_machine() == count

    def test_two_processes_here_are_on_one_machine(self):
        _, printed, _ = Run("print(processes.count_on_this_machine())").end()
        assert printed == ["2", "2"]

    def test_a_process_alone_is_one(self):
        assert ALONE.count_on_this_machine() == 1


class TestOneProcess:
    def test_is_the_first_of_one(self):
        assert ALONE.is_first
        assert ALONE.exchange("x", 7) == [7]
        assert ALONE.from_first("x", lambda: "found") == "found"
        assert ALONE.share([1, 2, 3]) == [1, 2, 3]

    @pytest.mark.parametrize(("items", "count"), [(0, 2), (1, 2), (5, 2), (7, 3), (8, 8)])
    def test_every_item_is_in_one_share(self, items, count):
        shares = [Processes(rank, count).share(range(items)) for rank in range(count)]
        assert sorted(item for share in shares for item in share) == list(range(items))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


class TestGoodOrder:
    def test_values_arrive_by_rank_everywhere(self):
        run = Run(
            """
            print(processes.exchange("numbers", rank * 10), processes.from_first("word", lambda: f"of {rank}"))
            """,
            count=3,
        )
        assert run.end() == ([0, 0, 0], ["[0, 10, 20] of 0"] * 3, [])

    def test_the_first_goes_ahead(self, tmp_path):
        run = Run(
            f"""
            with processes.first_goes_ahead("the file"):
                if rank == 0:
                    time.sleep(0.5)
                    open({str(tmp_path / "file")!r}, "w").write("made by 0")
                print(open({str(tmp_path / "file")!r}).read())
            """
        )
        assert run.end() == ([0, 0], ["made by 0"] * 2, [])

    def test_a_status_is_kept(self):
        assert Run("processes.wait_for_all('stop')\nreturn 130").end()[0] == [130, 130]

    def test_a_stranger_at_the_port_is_sent_away(self):
        run = Run("return 0", absent=(1,), start_seconds=8)
        launch = find_launch(_environment_of(run.workers[0]))
        wait_until_listening(launch.host, launch.channel_port, 15, "rank 0")
        for stranger in (replace(launch, rank=1, job="another"), replace(launch, rank=1, count=3)):
            with pytest.raises(DeviceError, match="rank 0 does not answer at 127"):
                connect(stranger, 15)
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x7f\xff\xff\xff", bytes(100)):
            with socket.create_connection((launch.host, launch.channel_port)) as other_program:
                other_program.sendall(said)
        assert connect(replace(launch, rank=7), 5).receive() is None, "a rank that the run does not have"
        connect(launch, 5).send(["no", "message"])
        run.scheduler.kill()
        assert run.end()[0] == [1]


class TestFailure:
    def test_a_users_mistake_on_one_rank_is_told_once_and_ends_all(self):
        statuses, _, errors = Run(
            """
            processes.wait_for_all("the start")
            if rank == 1:
                raise DataError("cat.png: not a picture")
            processes.wait_for_all("the end")
            """
        ).end()
        assert (statuses, errors) == ([2, 2], ["error: rank 1: cat.png: not a picture"])

    def test_a_mistake_that_all_make_is_told_once(self):
        statuses, _, errors = Run("raise DataError('no pictures')", count=3).end()
        assert (statuses, errors) == ([2, 2, 2], ["error: no pictures"])

    def test_a_full_disk_is_told_as_of_one_process(self):
        statuses, _, errors = Run(
            """
            if rank == 1:
                raise OSError(28, "No space left on device", "cat.safetensors")
            time.sleep(60)
            """
        ).end()
        said = "cat.safetensors: cannot be written (No space left on device); free some space"
        assert (statuses, errors) == ([2, 2], [f"error: rank 1: {said} and run the same command again"])

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_crash_names_its_rank_and_reason(self, rank):
        statuses, _, errors = Run(
            f"""
            if rank == {rank}:
                raise ValueError("no such thing")
            time.sleep(60)
            """
        ).end()
        assert statuses == [1, 1]
        assert errors == ["error: " + ("rank 1: " if rank else "") + "ValueError: no such thing"]

    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_a_kill_is_noticed_and_names_the_rank(self, rank):
        started = time.monotonic()
        statuses, _, errors = Run(
            f"""
            processes.wait_for_all("the start")
            if rank == {rank}:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
            """,
            count=3,
        ).end()
        assert sorted(statuses) == [-9, 1, 1]
        assert len(errors) == 1
        assert errors[0].startswith(f"error: rank {rank} ended without a word: it was killed, or crashed.")
        assert time.monotonic() - started < 30

    def test_a_rank_that_does_not_come_is_waited_for_only_so_long(self):
        statuses, _, errors = Run(
            """
            processes.wait_for_all("the start")
            if rank == 1:
                time.sleep(60)
            processes.wait_for_all("the checkpoint")
            """
        ).end()
        assert (statuses, errors) == ([1, 1], ["error: rank 1 did not come to the checkpoint within 5 s"])

    def test_a_rank_that_never_starts_is_named(self):
        run = Run("return 0", absent=(1,), start_seconds=3)
        status = run.workers[0].wait(timeout=END_SECONDS)
        assert status != 0
        assert "rank 1: not started within 3 s" in run.workers[0].stderr.read()
        assert run.scheduler.wait(timeout=END_SECONDS) is not None

    def test_an_address_of_another_machine_is_refused_with_the_flags_to_change(self):
        with pytest.raises(DeviceError, match=r"cannot listen at 203\.0\.113\.1:9000 .*--master_addr"):
            listen(find_launch(MSRUN | {"MS_NODE_ID": "0", "MS_SCHED_HOST": "203.0.113.1", "MS_SCHED_PORT": "8999"}))

    def test_twenty_kills_at_random_moments_end_everything(self, tmp_path):
        """Eight at a time; each rank exchanges, and rank 0 replaces a file, as in steps and checkpoints."""
        draws = random.Random(5)
        work = """
        for step in range(10000):
            processes.exchange(f"step {step}", rank)
            if rank == 0:
                open(target + ".new", "w").write(str(step) * 1000)
                os.replace(target + ".new", target)
            processes.wait_for_all("the checkpoint")
        """
        for block in range(0, 20, 8):
            targets = [str(tmp_path / str(number)) for number in range(block, min(block + 8, 20))]
            runs = [Run(f"target = {target!r}\n" + dedent(work), start_seconds=5) for target in targets]
            time.sleep(0.2)
            for run in runs:
                time.sleep(draws.random() * 0.4)
                run.workers[draws.randrange(2)].send_signal(signal.SIGKILL)
            for run, target in zip(runs, targets, strict=True):
                statuses, _, errors = run.end()
                assert -signal.SIGKILL in statuses
                assert 0 not in statuses
                assert len(errors) <= 1
                if os.path.exists(target):
                    content = Path(target).read_text()
                    assert content == content[: len(content) // 1000] * 1000


def _environment_of(process):
    entries = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    return dict(entry.decode().split("=", 1) for entry in entries if entry)

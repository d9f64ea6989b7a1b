"""The check of nodes before a training: sound ones pass, and what is wrong is named."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch.distributed as dist

from moebius.data.corpus import Corpora
from moebius.trainer.checkpoint.plan import listing, plan, total_bytes
from moebius.trainer.config import RunConfig
from moebius.trainer.preflight import judge
from moebius.trainer.preflight.facts import Axis, Device, Facts, Place, driver_version
from moebius.trainer.preflight.limits import Finding, Limits
from moebius.trainer.preflight.places import checkpoint_bytes
from moebius.trainer.run import Run
from tests.faults.restarts import FORK, enter
from tests.trainer.helpers import REPOSITORY, write_config

SAME_SPEED = ("--slow-device=0.01", "--slow-link=0.01")
"""for tests in which processes share cores with whatever else runs"""
NEW_MOUNTS = 0x20000
"""CLONE_NEWNS"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
pytestmark = pytest.mark.usefixtures("warm")


@dataclass
class Launch:
    """How a check ended."""

    exit_codes: list[int | None]
    output: str
    folder: Path

    @property
    def report(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((self.folder / "preflight.json").read_text())
        return tree

    @property
    def bad_nodes(self) -> list[str]:
        path = self.folder / "preflight-bad-nodes"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def error(self) -> str:
        """The one line of an error."""
        assert "Traceback" not in self.output, self.output
        (line,) = [x for x in self.output.splitlines() if x.startswith("error: ")][-1:]
        return line


def environment(size: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": "1"}
    return world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def launch(
    tree: dict[str, Any],
    folder: Path,
    *words: str,
    ranks: Sequence[int] = (0, 1),
    size: int = 2,
    own_words: Callable[[int], list[str]] = lambda rank: [],
    before: Callable[[int], None] = lambda rank: None,
    start: Callable[[list[str], dict[str, str], int, Path], None] = enter,
    during: Callable[[list[BaseProcess]], None] = lambda processes: None,
) -> Launch:
    """The check on processes that say they are on nodes n0, n1 and so on."""
    log, world = folder / "log", environment(size)
    path = write_config(tree, folder / "run.yaml")

    def child(rank: int) -> None:
        before(rank)
        own = ["preflight", str(path), *words, *own_words(rank)]
        start(own, world | {"SLURMD_NODENAME": f"n{rank}"}, rank, log)

    processes: list[BaseProcess] = [FORK.Process(target=child, args=(rank,)) for rank in ranks]
    for process in processes:
        process.start()
    during(processes)
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    return Launch([p.exitcode for p in processes], log.read_text(), Path(tree["run_dir"]))


def test_sound_processes_pass(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """With checkpoints at a URL; what an earlier check said of nodes is gone."""
    folder = Path(run_tree["run_dir"])
    folder.mkdir()
    (folder / "preflight-bad-nodes").write_text("n7\n")
    tree = run_tree | {
        "parallel": {"tp": 2},
        "checkpoint": {"dir": f"file://{tmp_path}/saved", "keep": 2},
    }
    done = launch(tree, tmp_path, *SAME_SPEED)
    assert done.exit_codes == [0, 0], done.output
    assert "preflight passed: 2 processes in " in done.output
    report = done.report
    assert report["verdict"] == "passed"
    assert report["nodes"] == ["n0", "n1"]
    assert done.bad_nodes == []
    for number, process in enumerate(report["processes"]):
        assert process["rank"] == number
        assert process["flops"] > 0
        (axis,) = process["axes"]
        assert (axis["name"], axis["ranks"]) == ("tp", [0, 1])
        assert min(axis["all_reduce"], axis["all_to_all"], axis["latency"]) > 0
        assert process["near"] is None
        assert process["far"] > 0, "each is on a node of its own"
        run_dir, saved = process["places"]
        assert run_dir["problem"] == saved["problem"] == ""
        assert saved["written"] > 0
        assert abs(process["clock"]) < 1
        assert process["versions"]["moebius sources"]
    assert report["checkpoint"]["seconds"] > 0
    assert [path.name for path in folder.iterdir()] == ["preflight.json"]
    assert not list((tmp_path / "saved").iterdir()), "probes are deleted"


def test_one_process_is_enough(run_tree: dict[str, Any], tmp_path: Path) -> None:
    done = launch(run_tree, tmp_path, ranks=(0,), size=1)
    assert done.exit_codes == [0], done.output
    assert done.report["world_size"] == 1
    assert "link" not in done.output.replace("links     one process", "")


def once_connected(act: Callable[[], object]) -> Callable[[int], None]:
    """On rank 1: do something as soon as it is connected to the others."""

    def wait() -> None:
        while not dist.is_initialized():
            time.sleep(0.01)
        act()

    return lambda rank: Thread(target=wait, daemon=True).start() if rank == 1 else None


def test_a_slow_process_is_named(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Stopped and continued all the time, it runs for a twentieth of it, whatever the other has."""
    connected = tmp_path / "connected"

    def hold(processes: list[BaseProcess]) -> None:
        slow = processes[1]
        assert slow.pid
        while not connected.exists() and slow.exitcode is None:
            time.sleep(0.01)
        while slow.exitcode is None:
            os.kill(slow.pid, signal.SIGSTOP)
            time.sleep(0.095)
            os.kill(slow.pid, signal.SIGCONT)
            time.sleep(0.005)

    done = launch(run_tree, tmp_path, before=once_connected(connected.touch), during=hold)
    assert done.exit_codes == [7, 7], done.output
    assert done.error.startswith("error: preflight: rank 1 on node n1: ")
    assert "GFLOP/s; expected: 0.75 of the median " in done.error
    assert done.bad_nodes == ["n1"]
    assert done.report["verdict"] == "failed"


def other_copy(folder: Path) -> Path:
    """The package with one changed file, below a folder."""
    shutil.copytree(REPOSITORY / "moebius", folder / "moebius")
    with (folder / "moebius" / "files.py").open("a") as file:
        file.write("# changed\n")
    return folder


def mount(*words: str | Path) -> None:
    """In this process alone, and in those that it starts."""
    assert ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", *words], check=True)


@needs_root
def test_changed_files_of_the_package_are_named(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """A process with mounts of its own sees another copy where the package is."""
    other = other_copy(tmp_path / "other") / "moebius"

    def replace_package(rank: int) -> None:
        if rank == 0:
            mount("--bind", other, REPOSITORY / "moebius")

    done = launch(run_tree, tmp_path, ranks=(0, 1, 2), size=3, before=replace_package)
    assert done.exit_codes == [7, 7, 7], done.output
    assert done.error.startswith("error: preflight: rank 0 on node n0: moebius sources ")
    assert done.bad_nodes == ["n0"], "the main process is in the minority"


@pytest.mark.slow
def test_another_copy_of_the_package_is_named(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """A process that imports it from elsewhere."""
    other = other_copy(tmp_path / "other")

    def start(words: list[str], world: dict[str, str], rank: int, log: Path) -> None:
        if rank != 2:
            enter(words, world, rank, log)
        world |= {"RANK": "2", "LOCAL_RANK": "2", "PYTHONPATH": str(other)}
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(tmp_path)
        command = [sys.executable, "-m", "moebius.trainer", *words]
        os.execve(sys.executable, command, os.environ | world)

    done = launch(run_tree, tmp_path, ranks=(0, 1, 2), size=3, start=start)
    assert done.exit_codes == [7, 7, 7], done.output
    assert done.error.startswith("error: preflight: rank 2 on node n2: moebius sources ")
    assert done.bad_nodes == ["n2"]


def test_other_settings_are_named(run_tree: dict[str, Any], tmp_path: Path) -> None:
    done = launch(run_tree, tmp_path, own_words=lambda rank: ["optim.lr=0.5"] if rank == 1 else [])
    assert done.exit_codes == [7, 7]
    expected = "rank 1 on node n1: optim.lr 0.5; expected: 0.01, as others have"
    assert done.error.startswith(f"error: preflight: {expected}")
    assert done.bad_nodes == []


def test_a_mistake_in_the_run_file_is_no_matter_of_nodes(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    done = launch(run_tree, tmp_path, "optim.lr=fast")
    assert done.exit_codes == [2, 2], "as any command"
    assert done.output.count("error: ") == 1
    assert "optim.lr" in done.error
    assert done.bad_nodes == []


def test_a_folder_that_cannot_be_written_is_one_line(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """It lies below a file, so that not even root can make it; the report is told all the same."""
    (tmp_path / "file").write_text("")
    done = launch(run_tree | {"run_dir": str(tmp_path / "file" / "run")}, tmp_path, *SAME_SPEED)
    assert done.exit_codes == [7, 7], done.output
    assert f"run_dir: '{tmp_path}/file/run': Not a directory" in done.error
    assert "choose another run_dir" in done.error
    assert "preflight.json' is not written: Not a directory" in done.output
    assert "products  " in done.output, "the table is there"


@pytest.mark.slow
@needs_root
def test_a_node_that_does_not_see_the_folder_is_named(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """A process with mounts of its own has another file system where the run's folder is."""
    shared = tmp_path / "shared"
    shared.mkdir()

    def hide(rank: int) -> None:
        if rank == 1:
            mount("-t", "tmpfs", "tmpfs", shared)

    # Checkpoints elsewhere: both places would be waited for.
    tree = run_tree | {
        "run_dir": str(shared / "run"),
        "checkpoint": {"dir": str(tmp_path / "saved")},
    }
    done = launch(tree, tmp_path, *SAME_SPEED, before=hide)
    assert done.exit_codes == [7, 7], done.output
    assert f"rank 1 on node n1: run_dir: '{shared}/run': a file of rank 0 is not seen" in done.error
    assert done.bad_nodes == ["n1"]


def test_a_missing_process_is_named(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 of 3 is never started."""
    done = launch(run_tree, tmp_path, "--wait=2", ranks=(0, 2), size=3)
    assert done.exit_codes == [7, 7], done.output
    assert done.output.count("error: ") == 1
    assert done.error.startswith("error: rank 1 has not come to 'start' in 2 s; expected: all 3")
    assert done.report["findings"][0]["line"] in done.error


@pytest.mark.slow
def test_a_stopped_process_is_named(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """SIGSTOP once it is connected to the others, which wait for it in a collective."""

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def end_it(processes: list[BaseProcess]) -> None:
        processes[0].join(60)
        processes[1].kill()

    done = launch(run_tree, tmp_path, "--wait=4", before=once_connected(stop), during=end_it)
    assert done.exit_codes == [7, -signal.SIGKILL], done.output
    assert done.output.count("error: ") == 1
    assert done.error.startswith("error: rank 1 on node n1 ")
    assert done.bad_nodes == ["n1"]


@pytest.mark.slow
def test_torchrun_starts_it(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Its store is used, and one process prints."""
    path = write_config(run_tree, tmp_path / "run.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["--nproc-per-node=2", "-m", "moebius.trainer", "preflight", str(path), *SAME_SPEED]
    done = subprocess.run(
        [*launcher, *program],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("preflight passed: 2 processes in ") == 1
    report = json.loads((Path(run_tree["run_dir"]) / "preflight.json").read_text())
    assert len(report["nodes"]) == 1
    assert all(process["near"] > 0 for process in report["processes"])


def test_the_size_of_a_checkpoint_is_known(run_config: RunConfig, corpora: Corpora) -> None:
    index = plan([listing(Run(run_config, corpora, []).layout.parts())])
    assert checkpoint_bytes(run_config) == total_bytes(index)


def facts(rank: int, node: str, **changes: Any) -> Facts:
    device = Device("cpu", "some", 8 << 30, 8 << 30, cores=(2 * rank, 2 * rank + 1), threads=2)
    sound = Facts(rank, 0, node, {"torch": "2"}, "a", device, 8 << 30, 1 << 30, flops=1e11)
    return replace(sound, **changes)


GPU = Device("cuda", "fast", 80 << 30, 79 << 30, identity="u0", visible=1)
LIMITS = Limits()


def place(**changes: Any) -> Place:
    sound = Place("checkpoint.dir", "saved", seen_after=0.0, written=1e9, read=1e9, free=10**12)
    return replace(sound, **changes)


def axis(ranks: tuple[int, ...], rate: float) -> list[Axis]:
    return [Axis("tp", ranks, rate, rate, 1e-5)]


def versions(*found: dict[str, str]) -> list[Finding]:
    return [*judge.judge_versions([facts(r, f"n{r}", versions=v) for r, v in enumerate(found)])]


def test_versions_are_judged_by_the_majority() -> None:
    assert not versions({"torch": "2"}, {"torch": "2"})
    (finding,) = versions({"torch": "1"}, {"torch": "2"}, {"torch": "2"})
    assert (finding.kind, finding.node, finding.rank) == ("error", "n0", 0)
    assert "torch 1; expected: 2" in finding.line
    (finding,) = versions({"torch": "2"}, {"torch": "2"}, {"torch": "2", "triton": "3"})
    assert (finding.node, "triton 3; expected: none" in finding.text) == ("n2", True)
    (finding,) = versions({"driver": "550"}, {"driver": "550"}, {"driver": "535"})
    assert finding.kind == "warning"
    (finding,) = versions({"torch": "1"}, {"torch": "2"})
    assert (finding.kind, finding.node) == ("error", None), "it may be the first one's that is bad"
    assert "rank 1 on node n1: torch 2; expected: 1, as others have" in finding.line


@pytest.mark.parametrize(
    ("rates", "slow"),
    [
        ([1.0, 1.0, 1.0, 1.0], []),
        ([1.0, 0.76, 1.0, 1.3], []),
        ([1.0, 0.74, 1.0, 1.0], [1]),
        ([1.0, 0.5], [1]),
        ([0.1, 0.1, 1.0, 1.0, 1.0], [0, 1]),
    ],
)
def test_outliers_are_far_below_the_median(rates: list[float], slow: list[int]) -> None:
    everyone = [facts(r, f"n{r}", flops=1e12 * rate) for r, rate in enumerate(rates)]
    found = [*judge.judge_products(everyone, LIMITS)]
    assert [finding.rank for finding in found] == slow
    assert all(finding.kind == "error" for finding in found)


def test_a_process_that_sends_less_than_the_median_is_named() -> None:
    rates = [9e9, 8e9, 3e9, 9e9, None]
    everyone = [facts(r, f"n{r}", far=rate, near=50e9) for r, rate in enumerate(rates)]
    (finding,) = judge.judge_messages(everyone, LIMITS)
    assert (finding.kind, finding.node, finding.rank) == ("error", "n2", 2)
    assert "sends 3.00 GB/s to other nodes; expected: 0.50 of the median 8.50" in finding.text
    assert not [*judge.judge_messages(everyone[:3], LIMITS)], "both neighbours are as slow"
    within = [facts(r, "n", near=rate) for r, rate in enumerate([9e9, 9e9, 4e9, 9e9])]
    assert [finding.rank for finding in judge.judge_messages(within, LIMITS)] == [2]
    assert not [*judge.judge_messages(within[1:], LIMITS)]


def test_groups_are_compared_with_those_that_span_as_many_nodes() -> None:
    nodes = ["a", "a", "b", "b", "c", "c", "a", "b"]
    groups = {(0, 1): 8e9, (2, 3): 3e9, (4, 5): 8e9, (6, 7): 1e9}
    everyone = [
        facts(rank, nodes[rank], axes=axis(ranks, rate))
        for ranks, rate in groups.items()
        for rank in ranks
    ]
    found = [*judge.judge_links(everyone, LIMITS)]
    assert {(f.node, f.rank) for f in found} == {("b", 2)}, "(6, 7) crosses nodes, as no other"
    assert "along tp of ranks 2, 3 on b: 3.00 GB/s; expected: 0.50 of the median 8.00" in (
        found[0].text
    )


def test_devices_are_alike_and_not_shared() -> None:
    def judged(*devices: Device, node: str = "n") -> list[Finding]:
        return [*judge.judge_devices([facts(r, node, device=d) for r, d in enumerate(devices)])]

    second = replace(GPU, identity="u1")
    assert not judged(GPU, second)
    (finding,) = judged(GPU, GPU)
    assert (finding.kind, finding.rank) == ("error", 1)
    (finding,) = judged(GPU, second, replace(second, identity="u2", name="slow"))
    assert (finding.rank, "device name slow; expected: fast" in finding.text) == (2, True)
    (finding,) = judged(GPU, replace(second, free=40 << 30))
    assert "42.9 of 85.9 GB of its GPU are free" in finding.text
    (finding,) = judged(GPU, replace(second, unreachable=(0, 3)))
    assert "GPUs 0, 3" in finding.text


def test_overlapping_pins_are_reported() -> None:
    def judged(*pins: tuple[tuple[int, ...], int]) -> list[Finding]:
        sound = facts(0, "n").device
        devices = [replace(sound, cores=cores, threads=threads) for cores, threads in pins]
        return [*judge.judge_devices([facts(r, "n", device=d) for r, d in enumerate(devices)])]

    both = (0, 1)
    assert not judged((both, 1), (both, 1)), "two threads, two cores"
    assert not judged(((0,), 1), ((1,), 1))
    (finding,) = judged(((0,), 1), ((0,), 1))
    assert (finding.kind, finding.rank) == ("warning", 1)
    assert "2 threads of it and of rank 0 share the cores 0" in finding.text
    (finding,) = judged((both, 1), (both, 1), (both, 1))
    assert "3 threads of 3 processes on 2 cores" in finding.text


@pytest.mark.parametrize(
    ("changes", "there", "said"),
    [
        ({}, 0, ""),
        ({"free": 29 * 10**9}, 0, "29.00 GB are free; expected: 30.00 GB for 3 checkpoints"),
        ({"free": 29 * 10**9}, 1, ""),
        ({"free": 9 * 10**9}, 9, "9.00 GB are free; expected: 10.00 GB for 1 checkpoints"),
        ({"free": None}, 0, ""),
        ({"written": 1e6}, 0, "a checkpoint of 10.00 GB takes 5000 s; expected: 600 s"),
        ({"problem": "No space left"}, 0, "checkpoint.dir: 'saved': No space left; expected: "),
        ({"seen_after": None}, 0, "a file of rank 0 is not seen"),
    ],
)
def test_room_and_speed_of_checkpoints(changes: dict[str, Any], there: int, said: str) -> None:
    everyone = [
        facts(0, "n0", places=[place(**changes)]),
        facts(1, "n1", places=[place(**changes)]),
    ]
    found = [*dict.fromkeys(judge.judge_places(everyone, LIMITS, 10**10, 2, there))]
    assert all(said in finding.text for finding in found)
    assert bool(found) == bool(said)


def test_a_folder_that_one_node_cannot_write_to_names_it() -> None:
    bad = place(problem="Read-only file system")
    everyone = [facts(r, f"n{r}", places=[bad if r == 1 else place()]) for r in range(3)]
    (finding,) = judge.judge_places(everyone, LIMITS, 1, 2, 0)
    assert (finding.kind, finding.node, finding.rank) == ("error", "n1", 1)


def test_clocks_are_compared_with_the_median() -> None:
    clocks = {"n0": 0.0, "n1": -30.0, "n2": 0.9, "n3": None}
    everyone = [facts(r, node, clock=clock) for r, (node, clock) in enumerate(clocks.items())]
    (finding,) = judge.judge_clocks(everyone, LIMITS)
    assert (finding.kind, finding.node) == ("warning", "n1")
    assert "-30.0 s" in finding.text


def test_memory_of_a_node_is_for_all_its_processes() -> None:
    everyone = [facts(0, "n0"), facts(1, "n0"), facts(2, "n1")]
    assert not [*judge.judge_memory(everyone, 4 << 30)]
    (finding,) = judge.judge_memory(everyone, 5 << 30)
    assert (finding.kind, finding.node) == ("warning", "n0")
    (finding,) = judge.judge_memory([facts(0, "n", shared_memory=1 << 20)], 0)
    assert "1 MB are free in /dev/shm" in finding.text


def test_the_version_of_a_driver_is_read() -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024"
    assert driver_version(text) == "550.54.15"
    assert driver_version("") == "unknown"

"""Real launches: torchrun, several processes, one of them killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moebius.data.audit import compare, read_audit
from tests.conftest import model_tree
from tests.trainer.helpers import logged, train_run, write_config
from tests.trainer.test_resume import config_in

PARALLEL = {"ep": 2, "tp": 2}


def launch(
    config: Path, processes: int, *arguments: str, module: str = "moebius.trainer"
) -> subprocess.Popen[str]:
    """`torchrun` as a user starts it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [f"--nproc-per-node={processes}", "--monitor-interval=0.1", *arguments]
    return subprocess.Popen(
        [*launcher, *options, "-m", module, "train", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What was reported of training steps."""
    return [line for line in logged(folder) if "train/loss" in line]


def workers_of(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    command = "moebius.trainer"
    return [int(p) for p in children if command in Path(f"/proc/{p}/cmdline").read_text()]


def assert_same_course(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Every step once and in order, with the losses, norms and routing of one process."""
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5), a["step"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_no_thread_of_a_group_is_left_to_the_end(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """One that lets go of a tensor while the interpreter ends would abort the process."""
    config = write_config(run_tree | {"parallel": {"rp": 2}}, tmp_path / "run.yaml")
    output, errors = launch(config, 2, module="tests.faults.ending").communicate(timeout=300)
    assert output.count("left: []") == 2, output + errors


def test_four_processes_train_like_one(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """The product of both routings with expert, tensor and sequence parallelism."""
    one = train_run(config_in(run_tree, tmp_path / "one"))
    tree = run_tree | {"run_dir": str(tmp_path / "four"), "parallel": PARALLEL}
    launcher = launch(write_config(tree, tmp_path / "four.yaml"), 4)
    output, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    assert_same_course(steps_of(tmp_path / "four"), steps_of(Path(one.folder)))
    assert output.count("starting: 6 steps") == 1, "one process prints"
    assert "tp = 2: ranks 0, 1 and so on, within a node" in output
    assert "rank 0 holds " in output


@pytest.mark.slow
def test_a_killed_worker_is_restarted(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL in the middle: `--max-restarts` goes on from the last checkpoint, and every report is
    the one of a run that nobody disturbed."""
    tree = run_tree | {
        "train": run_tree["train"] | {"num_steps": 16},
        "checkpoint": {"interval": 4, "keep": 2},
        "model": model_tree(),
        "log": run_tree["log"] | {"audit": True},
        "parallel": PARALLEL,
    }
    for name in ("whole", "killed"):
        folder = tmp_path / name
        config = write_config(tree | {"run_dir": str(folder)}, tmp_path / f"{name}.yaml")
        launcher = launch(config, 4, "--max-restarts=1")
        if name == "killed":
            kill_one(launcher, (folder / "checkpoints" / "step-00000008").exists)
        output, errors = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, errors
        assert output.count("continuing after step") == (name == "killed"), output
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    audits = [read_audit(tmp_path / name / "audit") for name in ("whole", "killed")]
    assert compare(*audits) == (16 * 4, -1)


def kill_one(launcher: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    """Kill the last worker when it is time."""
    deadline = time.monotonic() + 240
    while not is_time():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(workers_of(launcher.pid)[-1], signal.SIGKILL)


@pytest.mark.slow
def test_a_ring_killed_in_a_step_goes_on_as_a_ring_and_as_one(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL between two checkpoints: both continuations have the losses of an unbroken run."""
    tree = run_tree | {
        "train": run_tree["train"] | {"num_steps": 20, "micro_batch_size": 1},
        "checkpoint": {"interval": 5, "keep": 2},
        "log": run_tree["log"] | {"audit": True},
        "parallel": {"rp": 2},
    }
    configs = {
        name: write_config(tree | {"run_dir": str(tmp_path / name)}, tmp_path / f"{name}.yaml")
        for name in ("whole", "killed")
    }
    launcher = launch(configs["whole"], 2)
    output, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    assert "are the home of every micro-batch in turn" in output
    assert "a step of 4 micro-batches is planned to wait " in output

    launcher = launch(configs["killed"], 2)
    kill_one(launcher, lambda: (tmp_path / "killed").exists() and has_step(tmp_path / "killed", 12))
    launcher.communicate(timeout=300)
    assert launcher.returncode != 0
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")

    launcher = launch(configs["killed"], 2)
    output, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    assert "continuing after step 10" in output
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")

    alone = train_run(config_in(tree, tmp_path / "alone", parallel={}))
    assert alone.step == 20
    assert_same_course(steps_of(tmp_path / "alone"), steps_of(tmp_path / "whole"))

    audits = {name: read_audit(tmp_path / name / "audit") for name in ("whole", "killed", "alone")}
    assert len(audits["whole"]) == 20 * 4
    for name in ("killed", "alone"):
        assert compare(audits[name], audits["whole"]) == (20 * 4, -1)


def has_step(folder: Path, step: int) -> bool:
    """Whether a step has been reported."""
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()

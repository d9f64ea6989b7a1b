"""A real controller and three node daemons: submitted, preempted, killed, lost, requeued, equal."""

import sys
from pathlib import Path
from typing import Any

import pytest

from moebius.data.audit import compare, read_audit
from moebius.trainer.checkpoint.storage import LocalStorage
from tests.cluster.machines import Cluster, until
from tests.cluster.runs import Submitted, command, submit
from tests.faults.restarts import until_done
from tests.trainer.helpers import error_line, logged, write_config

pytestmark = pytest.mark.slow
STEPS, ROWS = 36, 4
SAME_SPEED = ("--slow-device=0.01", "--slow-link=0.01")
"""of preflights: processes share cores with whatever else runs"""
ON_TWO = ("--nodes", "2", "--processes-per-node", "1", "--no-preflight")


def tree_in(run_tree: dict[str, Any], folder: Path, seconds: float = 0.0) -> dict[str, Any]:
    """A run whose steps take so long that something can happen to it."""
    slow = {"kind": "slow", "rank": 0, "phase": "data", "seconds": seconds, "times": 1000}
    return run_tree | {
        "run_dir": str(folder),
        "train": run_tree["train"] | {"num_steps": STEPS, "batch_size": ROWS},
        "evaluation": {"interval": 1000, "num_batches": 1},
        "checkpoint": {"interval": 5, "keep": 2},
        "log": {"interval": 1, "audit": True},
        "faults": [slow] if seconds else [],
    }


def test_preempted_killed_and_nodes_lost_without_a_trace(
    cluster: Cluster, run_tree: dict[str, Any], tmp_path: Path, warm: None
) -> None:
    """All in one job: it saves, is requeued, restarts inside, moves to other nodes twice, and ends
    with the losses and samples of a run that nobody disturbed."""
    folder = tmp_path / "run"
    config = write_config(tree_in(run_tree, folder, 0.25), tmp_path / "run.yaml")
    run = submit(cluster, folder, config, *ON_TWO, "--max-requeues", "1")
    run.reaches(6)
    assert cluster.facts(run.job)["NodeList"] == "n[1-2]"
    assert {line.split(", ")[0] for line in run.log.splitlines() if line.startswith("node ")} == {
        f"node 0 is n1 ({cluster.host})",
        f"node 1 is n2 ({cluster.host})",
    }
    found = run.status()
    assert (found["state"], found["num_steps"], found["attempts"]) == ("running", STEPS, 1)
    assert found["step"] >= 6
    assert found["seconds_left"] > 0
    assert found["jobs"][0]["state"] == "RUNNING"
    was_preempted(run)
    run.logs("continuing after step")
    run.reaches(LocalStorage(folder / "checkpoints").steps()[-1] + 5)
    run.kill_worker(1)
    run.logs("continuing after step", 2)
    assert cluster.facts(run.job)["Restarts"] == "1", "the job has gone on"
    run.reaches(LocalStorage(folder / "checkpoints").steps()[-1] + 3)
    cluster.lose("n2")
    run.logs("to be requeued: the training failed or lost a node")
    # What SLURM finds out later; it does so itself with the other node, below.
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    run.requeued(2)
    run.logs("continuing after step", 3)
    assert cluster.facts(run.job)["NodeList"] == "n[1,3]"
    cluster.start_node("n2")
    run.reaches(LocalStorage(folder / "checkpoints").steps()[-1] + 3)
    cluster.lose("n1", silently=True)  # the shell of the job with it: here SLURM has to requeue
    run.requeued(3)
    run.logs("continuing after step", 4)
    assert cluster.facts(run.job)["NodeList"] == "n[2-3]"
    cluster.start_node("n1")
    run.ends("COMPLETED")
    found = run.status()
    assert (found["state"], found["step"], found["jobs"][0]["restarts"]) == ("complete", STEPS, "3")
    assert found["checkpoint"]["step"] == STEPS

    whole = tree_in(run_tree, tmp_path / "whole")
    words = ["train", str(write_config(whole, tmp_path / "whole.yaml"))]
    until_done(words, [(2, ())], tmp_path / "logs", 1)
    assert logged(folder) == logged(tmp_path / "whole")
    audits = [read_audit(path / "audit") for path in (folder, tmp_path / "whole")]
    assert compare(*audits) == (STEPS * ROWS, -1)


def was_preempted(run: Submitted) -> None:
    """USR1 to the shell of the job, as it comes before the time limit."""
    run.cluster.call("scancel", "--batch", "--signal=USR1", run.job)
    until(lambda: run.cluster.facts(run.job)["Restarts"] == "1", 60, lambda: run.log)
    until(lambda: run.state == "PENDING", 60, lambda: run.log)
    found = run.status()
    assert (found["state"], found["reason"]) == ("queued", "BeginTime")
    saved = LocalStorage(run.folder / "checkpoints").steps()[-1]
    assert f"stopped at step {saved} of {STEPS}: " in run.log
    assert found["checkpoint"]["step"] == found["step"] == saved
    run.requeued(1)


def test_cancelled_jobs_save_and_stay_away(
    cluster: Cluster, run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """scancel is the wish of a person; so is the file STOP. The same command then goes on."""
    folder = tmp_path / "run"
    config = write_config(tree_in(run_tree, folder, 0.25), tmp_path / "run.yaml")
    run = submit(cluster, folder, config, *ON_TWO)
    run.reaches(2)
    cluster.call("scancel", run.job)
    run.ends("CANCELLED")
    until(lambda: "not requeued" in run.log, 60, lambda: run.log)
    found = run.status()
    assert (found["state"], found["reason"]) == ("stopped", "SIGTERM")
    assert found["checkpoint"]["step"] == found["step"] < STEPS
    assert cluster.facts(run.job)["Restarts"] == "0"

    run = submit(cluster, folder, config, *ON_TWO)
    run.logs(f"continuing after step {found['step']}")
    (folder / "STOP").touch()
    run.ends("FAILED")
    assert "not requeued" in run.log
    found = run.status()
    assert (found["state"], found["reason"]) == ("stopped", "there is a file STOP in run_dir")
    assert cluster.facts(run.job)["Restarts"] == "0"
    assert cluster.facts(run.job)["ExitCode"] == "75:0"
    assert (folder / "submissions" / "2" / "config.yaml").exists()


def test_an_array_of_a_sweep_and_a_chain(
    cluster: Cluster, run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """Two runs, each its folder; the second job of the chain finds nothing left to do."""
    tree = tree_in(run_tree, tmp_path / "run")
    tree["train"] |= {"num_steps": 3}
    config = write_config(tree, tmp_path / "run.yaml")
    words = ("--processes-per-node", "1", "--no-preflight", "--chain", "2")
    run = submit(cluster, tmp_path / "run", config, *words, "--sweep", "train.seed=1,2")
    until(lambda: run.log.count("the run is complete") == 2, 120, lambda: run.log)
    assert run.log.count("the training has ended with code 0: complete") == 2
    losses = []
    for number in (0, 1):
        member = Submitted(cluster, run.folder / str(number), run.job)
        found = member.status()
        assert (found["state"], found["step"], len(found["jobs"])) == ("complete", 3, 2)
        losses.append(
            [line["train/loss"] for line in logged(member.folder) if "train/loss" in line]
        )
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[0] != losses[1]
    line = error_line(command(cluster, "status", run.folder))
    assert "holds the runs of a sweep" in line


PYTHON = """\
#!/usr/bin/env bash
# On one node no file can be larger than a megabyte.
if [ "$SLURMD_NODENAME" = n3 ]; then ulimit -f 1024; fi
exec {python} "$@"
"""


def test_a_bad_node_is_left_out(cluster: Cluster, run_tree: dict[str, Any], tmp_path: Path) -> None:
    """The preflight names it, which ends a job, or has it go on elsewhere, if that is wanted."""
    folder = tmp_path / "run"
    tree = tree_in(run_tree, folder)
    tree["train"] |= {"num_steps": 3}
    config = write_config(tree, tmp_path / "run.yaml")
    program = tmp_path / "python"
    program.write_text(PYTHON.format(python=sys.executable))
    program.chmod(0o755)
    words = ["--nodes", "2", "--processes-per-node", "1", "--python", str(program)]
    words += [f"--preflight-option={option}" for option in SAME_SPEED]
    words += ["--option=--exclude=n1"]
    run = submit(cluster, folder, config, *words)
    run.ends("FAILED")
    said = f"error: preflight: rank 1 on node n3: checkpoint.dir: '{folder}/checkpoints': File too "
    assert run.log.count(said) == 1, run.log
    assert run.log.splitlines()[-1].endswith(
        f"error: the preflight failed, bad nodes: n3; see {folder}/preflight.json"
    )
    assert not (folder / "standing.json").exists()

    run = submit(cluster, folder, config, *words, "--exclude-bad-nodes", "--max-requeues", "1")
    until(
        lambda: run.state == "PENDING" and "from now on excluded" in run.log, 120, lambda: run.log
    )
    excluded = cluster.facts(run.job)["ExcNodeList"].split(",")
    assert sorted(excluded) == ["n1", "n3"], "with the one that a person excluded"
    assert len((folder / "submissions" / "2" / f"failures-{run.job}").read_text().splitlines()) == 1
    cluster.call("scontrol", "update", f"JobId={run.job}", "ExcNodeList=n3")
    run.requeued(1)
    run.ends("COMPLETED")
    assert cluster.facts(run.job)["NodeList"] == "n[1-2]"
    assert "preflight passed: 2 processes in " in run.log
    assert run.status()["step"] == 3


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(
    cluster: Cluster, run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """Stopped before its first step, as where `time` is too short for a start."""
    config = write_config(tree_in(run_tree, tmp_path / "run"), tmp_path / "run.yaml")
    words = ("--processes-per-node", "1", "--no-preflight", "--max-requeues", "0")
    run = submit(cluster, tmp_path / "run", config, "train.time_limit=0.001", *words)
    run.ends("FAILED")
    assert "error: it was stopped before it had made a step; not requeued" in run.log


def test_nodes_that_cannot_be_found(
    cluster: Cluster, run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """No node goes on alone: the job ends and says why."""
    config = write_config(tree_in(run_tree, tmp_path / "run"), tmp_path / "run.yaml")
    lost = "scontrol() { echo 'error: no such command' >&2; return 1; }"
    run = submit(cluster, tmp_path / "run", config, *ON_TWO, "--setup", lost)
    run.ends("FAILED")
    assert "error: scontrol does not know the address of node ''" in run.log
    assert "torch" not in run.log


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--partition", "night"], "partition"),
        (["--nodes", "4", "train.batch_size=8"], "configuration is not available"),
        (["--gpus-per-node", "3"], "configuration is not available"),
        (["--account", "a", "--option=--constraint=h100"], "feature"),
    ],
)
def test_what_slurm_refuses_is_one_line(
    cluster: Cluster, run_tree: dict[str, Any], tmp_path: Path, words: list[str], expected: str
) -> None:
    config = write_config(tree_in(run_tree, tmp_path / "run"), tmp_path / "run.yaml")
    overrides = [word for word in words if "." in word]
    options = [word for word in words if "." not in word]
    if "--gpus-per-node" not in options:
        options += ["--processes-per-node", "1"]
    result = command(cluster, "submit", config, *overrides, *options)
    assert result.returncode == 7, result.stderr
    assert expected in error_line(result).lower()
    assert not (tmp_path / "run").exists()

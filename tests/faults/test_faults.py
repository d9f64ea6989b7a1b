"""Processes that stop, disks that fill up, numbers that go wrong: what a run does about them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moebius.data.audit import read_audit
from moebius.trainer.checkpoint.loader import files_of, open_checkpoint, verify
from moebius.trainer.checkpoint.storage import LocalStorage
from moebius.trainer.recovery.goodput import read_accounts
from tests.faults.restarts import attempt, until_done
from tests.trainer.helpers import logged, write_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm")]
ROWS = 4


def tree_in(run_tree: dict[str, Any], folder: Path, *faults: dict[str, Any]) -> dict[str, Any]:
    return run_tree | {
        "run_dir": str(folder),
        "train": run_tree["train"] | {"num_steps": 16, "batch_size": ROWS},
        "checkpoint": {"interval": 4, "keep": 2},
        "log": {"interval": 1, "audit": True},
        "faults": list(faults),
    }


def words(tree: dict[str, Any], folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return ["train", str(write_config(tree, folder / "run.yaml"))]


def events(folder: Path, stragglers: bool = False) -> list[tuple[str, str]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    found = [(line["event"], line["text"]) for line in map(json.loads, lines)]
    return [event for event in found if stragglers or event[0] != "straggler"]


def test_a_stopped_process_is_named_and_the_run_goes_on(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """SIGSTOP in the middle of a step: all stacks are written down, and the next attempt ends."""
    limit = 8.0
    stop = {"kind": "stop", "rank": 1, "step": 6, "phase": "backward"}
    tree = tree_in(run_tree, tmp_path / "run", stop) | {"watchdog": {"step": limit}}
    attempts = until_done(words(tree, tmp_path), [(2, ())], tmp_path / "logs", 2)
    first, second = attempts
    assert first.exit_codes == [-9, -9]
    assert first.seconds < limit + 30
    assert "continuing after step 4" in second.output
    (line,) = [line for line in first.output.splitlines() if line.startswith("watchdog: ")]
    assert "rank 1 (pid " in line
    assert ", stopped) has been in 'step' of step 6 for " in line
    (report,) = (tmp_path / "run" / "watchdog").glob("*.txt")
    text = report.read_text()
    assert text.count("=== rank ") == 2
    assert text.count(" in train_step\n") == 2
    assert "all_reduce" in text or "reduce_scatter" in text, "where the other one waits"
    whole = tree_in(run_tree, tmp_path / "whole")
    until_done(words(whole, tmp_path / "w"), [(2, ())], tmp_path / "whole-logs", 1)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """A disk of its own that has room for one checkpoint and a half, which is noticed before."""
    tree = tree_in(run_tree, tmp_path / "probe")
    until_done(words(tree, tmp_path), [(2, ())], tmp_path / "logs", 1)
    size = sum(
        f.stat().st_size for f in (tmp_path / "probe" / "checkpoints" / "step-00000016").iterdir()
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        tree = tree_in(run_tree, tmp_path / "run")
        tree["checkpoint"] |= {"dir": str(disk / "checkpoints")}
        failed = attempt(words(tree, tmp_path), 2, 0, tmp_path / "full.log")
        assert_full(failed, disk, "bytes are needed in")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def assert_full(failed: Any, disk: Path, said: str) -> None:
    assert failed.exit_codes == [4, 4], failed.output
    lines = [line for line in failed.output.splitlines() if line.startswith("error")]
    assert all(said in line for line in lines), lines
    assert "the checkpoints of before are untouched" in lines[0]
    assert "Traceback" not in failed.output
    storage = LocalStorage(disk / "checkpoints")
    (step,) = storage.steps()
    found = open_checkpoint(storage, step)
    verify(found, files_of(found.record, ("model", "optimizer")))


def test_a_disk_that_fills_up_while_it_is_written_to(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    full = {"kind": "full_disk", "rank": 1, "step": 8, "phase": "write"}
    tree = tree_in(run_tree, tmp_path / "run", full)
    until_done(words(tree, tmp_path / "once"), [(2, ())], tmp_path / "logs", 1)
    ((kind, text),) = events(tmp_path / "run")
    assert kind == "save failed"
    assert "No space left on device" in text
    tree = tree_in(run_tree, tmp_path / "twice", full, full | {"step": 9})
    failed = attempt(words(tree, tmp_path / "t"), 2, 0, tmp_path / "twice.log")
    assert_full(failed, tmp_path / "twice", "No space left on device")


NAN = {"kind": "nan", "rank": 1}


def test_a_step_that_is_not_finite_changes_nothing(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """One rank's gradient is NaN at two samples: these steps are left out, and a run that is killed
    after them has the same course."""
    at = [NAN | {"sample": 5 * ROWS}, NAN | {"sample": 9 * ROWS + 1}]
    kill = {"kind": "kill", "rank": 0, "step": 10, "phase": "optimizer"}
    for name, faults in (("whole", at), ("killed", [*at, kill])):
        tree = tree_in(run_tree, tmp_path / name, *faults)
        attempts = until_done(
            words(tree, tmp_path / f"{name}-logs"), [(2, ())], tmp_path / f"{name}-logs", 2
        )
        assert len(attempts) == (2 if name == "killed" else 1)
    told = [(kind, text) for kind, text in events(tmp_path / "whole") if kind == "skipped"]
    assert [text.split(":")[0] for _, text in told] == ["step 6", "step 10"]
    assert "gradient norm nan; it changes nothing" in told[0][1]
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    losses = [line["train/loss"] for line in logged(tmp_path / "whole") if "train/loss" in line]
    assert len(losses) == 16
    assert all(loss is not None and loss == loss for loss in losses), "the weights stay sound"


def test_too_many_of_them_send_the_run_back(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Three in a row where two may be left out: back to step 8, and their samples are left out;
    killed after that, the run does all of it again."""
    at = [NAN | {"sample": number * ROWS} for number in (9, 10, 11)]
    kill = {"kind": "kill", "rank": 1, "step": 10, "phase": "data", "times": 2}
    for name, faults in (("whole", at), ("killed", [*at, kill])):
        tree = tree_in(run_tree, tmp_path / name, *faults) | {"recovery": {"max_skipped": 2}}
        until_done(words(tree, tmp_path / f"{name}-logs"), [(2, ())], tmp_path / f"{name}-logs", 3)
    told = [text for kind, text in events(tmp_path / "whole") if kind == "rewound"]
    assert len(told) == 1
    assert "2 steps before were left out already; from step 12 back to step 8" in told[0]
    assert f"without samples {8 * ROWS} to {12 * ROWS - 1}" in told[0]
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    rows = read_audit(tmp_path / "whole" / "audit")
    assert not set(range(8 * ROWS, 12 * ROWS)) & set(rows[:, 0].tolist())
    assert (rows == read_audit(tmp_path / "killed" / "audit")).all()


@pytest.mark.parametrize("action", ["report", "skip", "rewind"])
def test_a_spike_is_told_skipped_or_sends_the_run_back(
    run_tree: dict[str, Any], tmp_path: Path, action: str
) -> None:
    """The logits of one step are far too large."""
    spike = {"kind": "spike", "rank": 0, "sample": 13 * ROWS}
    tree = tree_in(run_tree, tmp_path / "run", spike)
    tree |= {"recovery": {"spike": {"action": action, "window": 8, "threshold": 20.0}}}
    until_done(words(tree, tmp_path), [(2, ())], tmp_path / "logs", 1)
    told = events(tmp_path / "run")
    kinds = [kind for kind, _ in told]
    assert kinds == [{"report": "spike", "skip": "skipped", "rewind": "rewound"}[action]]
    assert "step 14: the loss is" in told[0][1]
    steps = [line["step"] for line in logged(tmp_path / "run") if "train/loss" in line]
    assert steps == list(range(1, 17))


def test_a_checkpoint_from_which_a_run_crashes_is_passed_over(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """Three starts end in the step after it; so do three from the one before, which has written it
    again, and then there is none left."""
    crash = {"kind": "exception", "rank": 1, "step": 9, "phase": "forward", "times": 100}
    tree = tree_in(run_tree, tmp_path / "run", crash)
    run = words(tree, tmp_path)
    attempts = [attempt(run, 2, n, tmp_path / f"{n}.log") for n in range(8)]
    starts = [a.output.partition("continuing after step ")[2].partition(":")[0] for a in attempts]
    assert starts == ["", "8", "8", "8", "4", "4", "4", ""]
    assert "error: no checkpoint is left" in attempts[-1].output
    assert attempts[-1].exit_codes == [4, 4]
    (kind, text), *_ = events(tmp_path / "run")
    assert kind == "walked back"
    assert "3 starts from it have crashed at the same step" in text


def test_a_damaged_newest_checkpoint_while_the_run_goes_on(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """Corruption right after a commit, and a kill: the restart sees it."""
    faults = [
        {"kind": "corrupt", "rank": 0, "step": 9, "phase": "data"},
        {"kind": "kill", "rank": 1, "step": 10, "phase": "data"},
    ]
    tree = tree_in(run_tree, tmp_path / "run", *faults)
    attempts = until_done(words(tree, tmp_path), [(2, ())], tmp_path / "logs", 3)
    assert len(attempts) == 2
    kind, text = events(tmp_path / "run")[0]
    assert kind == "walked back"
    assert "model-00000.safetensors was changed after its commit" in text


def test_a_signal_to_one_process_stops_and_saves_all(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """SIGTERM, twice in a moment, as schedulers send it; the run then goes on as if undisturbed."""
    signals = {"kind": "terminate", "rank": 1, "step": 5, "times": 2}
    tree = tree_in(run_tree, tmp_path / "run", signals)
    first = attempt(words(tree, tmp_path), 2, 0, tmp_path / "a.log")
    assert first.exit_codes == [75, 75], first.output
    assert "stopped at step 6 of 16: SIGTERM" in first.output
    assert LocalStorage(tmp_path / "run" / "checkpoints").steps()[-1] == 6
    second = attempt(words(tree, tmp_path), 2, 1, tmp_path / "b.log")
    assert second.succeeded, second.output
    whole = tree_in(run_tree, tmp_path / "whole")
    until_done(words(whole, tmp_path / "w"), [(2, ())], tmp_path / "whole-logs", 1)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_stops_at_a_time_limit_and_by_a_file(run_tree: dict[str, Any], tmp_path: Path) -> None:
    slow = {"kind": "slow", "rank": 1, "phase": "data", "seconds": 0.5, "times": 100}
    tree = tree_in(run_tree, tmp_path / "run", slow)
    tree["train"] |= {"time_limit": 4 / 60}
    first = attempt(words(tree, tmp_path), 2, 0, tmp_path / "a.log")
    assert first.exit_codes == [75, 75], first.output
    assert "train.time_limit is over" in first.output
    tree["train"] |= {"time_limit": None}
    (tmp_path / "run" / "STOP").touch()
    second = attempt(words(tree, tmp_path), 2, 1, tmp_path / "b.log")
    assert second.exit_codes == [75, 75]
    assert "a file STOP in run_dir" in second.output
    (tmp_path / "run" / "STOP").unlink()
    third = attempt(words(tree, tmp_path), 2, 2, tmp_path / "c.log")
    assert third.succeeded, third.output
    steps = [line["step"] for line in logged(tmp_path / "run") if "train/loss" in line]
    assert steps == list(range(1, 17))


def test_a_slow_process_and_one_that_computes_wrongly_are_named(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """One flipped bit of a gradient of rank 1, and half a second more for each batch of rank 0."""
    faults = [
        {"kind": "flip", "rank": 1, "step": 4},
        {"kind": "slow", "rank": 0, "phase": "optimizer", "seconds": 0.5, "times": 100},
    ]
    tree = tree_in(run_tree, tmp_path / "run", *faults) | {"recovery": {"repeat_interval": 2}}
    until_done(words(tree, tmp_path), [(3, ())], tmp_path / "logs", 1)
    told = events(tmp_path / "run", stragglers=True)
    ((_, text),) = [event for event in told if event[0] == "corruption"]
    assert text.startswith("step 5: rank 1 computed other gradients")
    slow = [text for kind, text in told if kind == "straggler"]
    assert len(slow) > 10
    assert all(text.startswith("rank 0 works ") for text in slow)


def test_the_time_of_all_attempts_is_accounted_for(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """Steps that a kill has undone are lost, and do not count twice."""
    faults = [
        {"kind": "slow", "rank": 0, "phase": "optimizer", "seconds": 0.2, "times": 1000},
        {"kind": "kill", "rank": 1, "step": 7, "phase": "optimizer"},
    ]
    tree = tree_in(run_tree, tmp_path / "run", *faults)
    until_done(words(tree, tmp_path), [(2, ())], tmp_path / "logs", 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    shares = [line for line in lines if "goodput/steps" in line][-1]
    shares = {name[8:]: value for name, value in shares.items() if name.startswith("goodput/")}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    attempts = read_accounts(tmp_path / "run" / "time.jsonl")
    assert [attempt.accounts[0].step for attempt in attempts] == [0, 4]
    total = attempts[-1].accounts[-2].at - attempts[0].began
    assert shares["lost"] * total > 3 * 0.2, "steps 5 to 7"
    assert shares["steps"] * total > 16 * 0.2
    assert shares["down"] > 0
    assert shares["evaluate"] > 0

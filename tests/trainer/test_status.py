"""moebius status and what it reads: how a run says that it stands."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from moebius.trainer.callbacks.interrupt import VARIABLE
from moebius.trainer.cli import main
from moebius.trainer.folder import lock_folder
from moebius.trainer.overview import seconds_left, state_of
from moebius.trainer.recovery.goodput import Account, Attempt
from moebius.trainer.standing import Standing, read_standing, write_standing
from tests.trainer.helpers import write_config

RUNNING = Standing("running", True, step=2, num_steps=6, launch="7.1")


@pytest.fixture
def config_path(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    tree = run_tree | {"watchdog": {"enabled": False}}
    return write_config(tree, tmp_path / "run.yaml")


def status(folder: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", folder, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_from_its_stop_to_its_end(
    config_path: Path,
    run_tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run_tree["run_dir"]
    words = ["train", str(config_path)]
    (tmp_path / "stop").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "stop"))
    assert main([*words, "--stopped-exit-code", "0"]) == 0
    found = read_standing(Path(folder))
    assert found is not None
    assert (found.state, found.again, found.reason) == ("stopped", True, "its job is about to end")
    assert main(words) == 75
    monkeypatch.delenv(VARIABLE)
    (Path(folder) / "STOP").touch()
    assert main(words) == 75
    found = read_standing(Path(folder))
    assert found is not None
    assert (found.state, found.again) == ("stopped", False), "a person wants it to stop"
    (Path(folder) / "STOP").unlink()
    seen = status(folder, capsys)
    assert (seen["state"], seen["reason"]) == ("stopped", "there is a file STOP in run_dir")
    assert (seen["step"], seen["num_steps"], seen["seconds_left"]) == (0, 6, None)

    assert main(words) == 0
    found = read_standing(Path(folder))
    assert found is not None
    assert (found.state, found.again, found.step) == ("complete", False, 6)
    seen = status(folder, capsys)
    assert (seen["state"], seen["step"], seen["attempts"]) == ("complete", 6, 4)
    assert seen["checkpoint"]["step"] == 6
    assert sum(seen["goodput"].values()) == pytest.approx(1, abs=0.02)
    line = json.dumps({"time": "", "step": 3, "event": "spike", "text": "[red] 7"})
    (Path(folder) / "events.jsonl").write_text(f"{line}\n{line[:9]}")
    assert main(["status", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["state", "step", "checkpoint", "attempts", "time", "spike"]
    assert [line.split()[0] for line in lines] == names
    assert lines[-1].split(maxsplit=1)[1].strip() == "step 3: [red] 7"
    assert lines[1].split() == ["step", "6", "of", "6"]

    with lock_folder(Path(folder)):
        write_standing(Path(folder), Standing("running", True, step=6, launch="7.1"))
        assert status(folder, capsys)["state"] == "running"
        assert main(words) == 4, "somebody else trains there"
        found = read_standing(Path(folder))
        assert found is not None
        assert found.state == "running", "whose word stays"
    seen = status(folder, capsys)
    assert (seen["state"], seen["reason"]) == (
        "failed",
        "it has ended without a word, as killed processes do",
    )


def test_errors_are_noted_with_whether_it_helps_to_start_again(
    config_path: Path, run_tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(run_tree["run_dir"])
    words = ["train", str(config_path), "data.dir=/nowhere", "data.source=null"]
    assert main(words) in (2, 3)
    assert not folder.exists(), "a run that could not be built leaves no trace"
    folder.mkdir()
    words = ["train", str(config_path), f"model.vocab_size={256 + 2}"]
    assert main(words) == 3
    said = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
    found = read_standing(folder)
    assert found is not None
    assert (found.state, found.again, found.reason) == ("failed", False, said)
    assert status(str(folder), capsys)["state"] == "failed"
    assert main(["status", str(folder.parent)]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no run folder" in line


@pytest.mark.parametrize(
    ("standing", "job", "locked", "expected"),
    [
        (None, "", False, "new"),
        (None, "PENDING", False, "queued"),
        (None, "RUNNING", False, "starting"),
        (None, "FAILED", False, "failed"),
        (RUNNING, "RUNNING", False, "running"),
        (RUNNING, "RUNNING", True, "running"),
        (RUNNING, "", True, "running"),
        (RUNNING, "", False, "failed"),
        (RUNNING, "NODE_FAIL", False, "failed"),
        (RUNNING, "PENDING", False, "queued"),
        (Standing("running", True, launch="7.0"), "RUNNING", False, "starting"),
        (Standing("stopped", True, launch="7.1"), "PENDING", False, "queued"),
        (Standing("stopped", True, launch="7.1"), "CANCELLED", False, "stopped"),
        (Standing("stopped", True, launch="7.1"), "COMPLETING", False, "stopped"),
        (Standing("complete", False, launch="6.0"), "PENDING", False, "complete"),
        (Standing("failed", False, launch="7.1"), "FAILED", False, "failed"),
    ],
)
def test_who_is_believed(standing: Standing | None, job: str, locked: bool, expected: str) -> None:
    """Stretch 1 of job 7 in some state, or no job at all."""
    jobs = [{"job": "7", "restarts": "1", "state": job, "reason": "Priority"}] if job else []
    assert state_of(standing, jobs, locked)[0] == expected


def test_time_left_is_that_of_steps() -> None:
    began = time.time() - 40
    accounts = [
        Account(began, 10, {"start": 5.0}),
        Account(began + 40, 30, {"start": 5.0, "step": 20.0, "save": 20.0}),
    ]
    left = seconds_left([Attempt(accounts)], 60)
    assert left is not None
    assert 20 < left <= 30, "a second for each"
    assert seconds_left([Attempt(accounts[:1])], 60) is None
    assert seconds_left([], 60) is None

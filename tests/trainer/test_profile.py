"""Profiles of steps: what they hold, and that a training does not notice them."""

import gzip
import json
import time
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.config import RunConfig
from moebius.trainer.recovery.rewind import Rewind
from moebius.trainer.run import Run
from tests.conftest import model_tree
from tests.faults.test_torchrun import launch
from tests.trainer.helpers import error_line, logged, moebius, train_run, write_config
from tests.trainer.test_resume import config_in, same_state

PHASES = ("data", "forward", "backward", "optimizer")


@pytest.fixture
def run_tree(run_tree: dict[str, Any]) -> dict[str, Any]:
    """A smaller model: a step of the usual one has ten thousand events."""
    ffn = {"kind": "dense", "intermediate_size": 48}
    return run_tree | {"model": model_tree(ffn=ffn, depth={"num_layers": 2})}


def profiled(
    run_tree: dict[str, Any], folder: Path, steps: Sequence[int] = (3, 4), **options: Any
) -> RunConfig:
    return config_in(run_tree, folder, profile={"steps": steps, **options})


def events_of(path: Path) -> list[dict[str, Any]]:
    """The trace in a file."""
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def ranges(path: Path) -> Counter[str]:
    """How often each range of our own is in a trace."""
    names = [e["name"] for e in events_of(path) if e.get("cat") == "user_annotation"]
    return Counter(name for name in names if name in PHASES or name.startswith("step "))


def phases(steps: int) -> dict[str, int]:
    """How often each phase has a range, with two micro-batches a step."""
    return {"data": steps, "forward": 2 * steps, "backward": 2 * steps, "optimizer": steps}


def files_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "profile").glob("*"))


def test_chosen_steps_are_recorded_and_change_nothing(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """With an evaluation and a checkpoint between them: each step and phase once, and nothing of
    other steps; numbers and weights are those of a run without a profile."""
    plain = train_run(config_in(run_tree, tmp_path / "plain"))
    console = Console(file=StringIO(), width=100)
    run = train_run(profiled(run_tree, tmp_path / "run"), console=console)
    assert same_state(run, plain)
    assert logged(tmp_path / "run") == logged(tmp_path / "plain")
    assert len(run.progress.listeners) == len(plain.progress.listeners)

    assert files_in(tmp_path / "run") == ["step-3-rank-0.json.gz"]
    path = tmp_path / "run" / "profile" / "step-3-rank-0.json.gz"
    assert ranges(path) == Counter({"step 3": 1, "step 4": 1, **phases(2)})
    spans = [e for e in events_of(path) if e["name"] in ("step 3", "step 4")]
    for name in ("forward", "aten::mm"):  # products of the evaluation are outside
        found = [e for e in events_of(path) if e["name"] == name]
        assert all(any(inside(e, span) for e in found) for span in spans)

    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"profile: steps 3 to 4: {path}" in printed
    assert f"steps 3 to 4: {path}" in (tmp_path / "run" / "events.jsonl").read_text()
    rows = [line.split() for line in printed.split("phase  ", 1)[1].splitlines()]
    shares = {row[0]: row[-1] for row in rows if row and row[-1].endswith("%")}
    assert shares["step"] == "100.0%"
    parts = [float(shares[name].rstrip("%")) for name in (*PHASES, "rest")]
    assert sum(parts) == pytest.approx(100, abs=0.3)
    measured = next(float(row[1]) for row in rows if row and row[0] == "step")
    assert measured <= sum(span["dur"] for span in spans) / 2 / 1e3 + 0.01, "steps alone"
    calls = {row[0]: row[1] for row in rows if row and row[0].startswith("aten::")}
    assert len(calls) <= 12
    products = [e for e in events_of(path) if e["name"] == "aten::mm"]
    within = [e for e in products if any(inside(e, span) for span in spans)]
    assert len(within) < len(products)
    assert calls["aten::mm"] == f"{len(within) / 2:g}"


def inside(event: dict[str, Any], span: dict[str, Any]) -> bool:
    """Whether an event begins in the time of another."""
    return bool(span["ts"] <= event["ts"] < span["ts"] + span["dur"])


@pytest.mark.parametrize("steps", [(1, 1), (6, 6), (2, 6)])
def test_first_and_last_steps(
    run_tree: dict[str, Any], tmp_path: Path, steps: tuple[int, int]
) -> None:
    """With nothing before to warm up in, and nothing after."""
    first, last = steps
    train_run(profiled(run_tree, tmp_path / "run", steps))
    assert files_in(tmp_path / "run") == [f"step-{first}-rank-0.json.gz"]
    found = ranges(tmp_path / "run" / "profile" / f"step-{first}-rank-0.json.gz")
    once = [f"step {step}" for step in range(first, last + 1)]
    assert found == Counter({**dict.fromkeys(once, 1), **phases(len(once))})


@pytest.mark.parametrize(
    ("stop", "files"),
    [
        (1, {2: [2, 3, 4, 5]}),
        (2, {2: [2], 3: [3, 4, 5]}),
        (4, {2: [2, 3, 4], 5: [5]}),
        (5, {2: [2, 3, 4, 5]}),
    ],
)
def test_stopped_among_the_steps(
    run_tree: dict[str, Any], tmp_path: Path, stop: int, files: dict[int, list[int]]
) -> None:
    """What was recorded is written, the rest when the run goes on, which it does exactly."""
    whole = train_run(config_in(run_tree, tmp_path / "whole"))
    config = profiled(run_tree, tmp_path / "run", (2, 5))
    train_run(config, stop_after=stop)
    run = train_run(config)
    assert same_state(run, whole)
    assert files_in(tmp_path / "run") == [f"step-{first}-rank-0.json.gz" for first in files]
    for first, steps in files.items():
        found = ranges(tmp_path / "run" / "profile" / f"step-{first}-rank-0.json.gz")
        assert [f"step {step}" in found for step in range(1, 7)] == [
            step in steps for step in range(1, 7)
        ]


def test_a_run_may_be_continued_with_another_profile(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    train_run(config_in(run_tree, tmp_path / "run"), stop_after=2)
    train_run(profiled(run_tree, tmp_path / "run", (5, 5)), stop_after=5)
    assert files_in(tmp_path / "run") == ["step-5-rank-0.json.gz"]
    train_run(profiled(run_tree, tmp_path / "other", (5, 5)), stop_after=4)
    train_run(profiled(run_tree, tmp_path / "other", (2, 3)))
    assert not (tmp_path / "other" / "profile").exists()
    events = (tmp_path / "other" / "events.jsonl").read_text()
    assert "steps 2 to 3 lie behind step 4: none recorded" in events


def test_a_list_of_no_processes(run_tree: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="at least 1 item"):
        RunConfig.model_validate(run_tree | {"profile": {"steps": [1, 2], "ranks": []}})


class RaiseIn(Callback):
    """Raises an error once, in the optimizer's phase of a step."""

    name = "raise_in"

    def __init__(self, step: int, error: Exception) -> None:
        self.step = step
        self.errors = [error]

    def on_start(self, run: Run) -> None:
        def listen(section: str, phase: str) -> None:
            if phase == "optimizer" and run.step + 1 == self.step and self.errors:
                raise self.errors.pop()

        run.progress.listeners[:] = [listen]

    def on_step_end(self, run: Run, report: StepReport) -> None:
        while run.saver.writing:  # so that it is known which checkpoint is complete
            time.sleep(0.01)


@pytest.mark.parametrize(("step", "first"), [(2, 3), (3, 3), (5, 4)])
def test_a_crash_in_a_step(run_tree: dict[str, Any], tmp_path: Path, step: int, first: int) -> None:
    """In the one that warms up, the first or the last: nothing is written, the profiler is free
    again, and the next start records what is left."""
    config = profiled(run_tree, tmp_path / "run", (3, 5))
    with pytest.raises(RuntimeError, match="on purpose"):
        train_run(config, beside=[RaiseIn(step, RuntimeError("on purpose"))])
    assert files_in(tmp_path / "run") == []
    train_run(config)
    assert files_in(tmp_path / "run") == [f"step-{first}-rank-0.json.gz"]


@pytest.mark.parametrize(("step", "before"), [(4, []), (5, []), (6, [3])])
def test_going_back(run_tree: dict[str, Any], tmp_path: Path, step: int, before: list[int]) -> None:
    """To step 3, from one that is recorded or from the one after: steps that are made again are
    recorded again."""
    config = profiled(run_tree, tmp_path / "run", (3, 5))
    run = train_run(config, beside=[RaiseIn(step, Rewind("a fault"))])
    assert run.step == 6
    names = [f"step-{first}-rank-0.json.gz" for first in [*before, 4]]
    assert files_in(tmp_path / "run") == names
    found = ranges(tmp_path / "run" / "profile" / "step-4-rank-0.json.gz")
    assert found == Counter({"step 4": 1, "step 5": 1, **phases(2)})


def test_calls_of_python(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """With stacks they are in the trace, but are no operations. Where there is little room, names
    are cut and not numbers."""
    console = Console(file=StringIO(), width=44)
    train_run(profiled(run_tree, tmp_path / "run", (2, 2), stacks=True), console=console)
    events = events_of(tmp_path / "run" / "profile" / "step-2-rank-0.json.gz")
    called = {event["name"] for event in events if event.get("cat") == "python_function"}
    assert any("train_step" in name for name in called)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert ".py(" not in printed
    assert "…" in printed
    assert printed.count("ms per step  ") == 2


def test_a_file_that_cannot_be_written_stops_nothing(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("no folder")
    run = train_run(profiled(run_tree, tmp_path / "run"))
    assert run.step == 6
    assert "steps 3 to 4 could not be written: " in (run.folder / "events.jsonl").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Kernels are in the table, ranges are not, and there is a snapshot of memory."""
    tree = run_tree | {"train": run_tree["train"] | {"device": "cuda"}}
    console = Console(file=StringIO(), width=100)
    train_run(profiled(tree, tmp_path / "run", memory=True), console=console)
    names = ["step-3-rank-0.json.gz", "step-3-rank-0.pickle"]
    assert files_in(tmp_path / "run") == names
    events = events_of(tmp_path / "run" / "profile" / names[0])
    assert any(event.get("cat") == "kernel" for event in events)
    rows = console.file.getvalue().split("operation  ", 1)[1]  # type: ignore[attr-defined]
    assert "others" in rows
    assert "aten::" not in rows
    assert not any(line.startswith(("step 3", *PHASES)) for line in rows.splitlines())


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"steps": [5, 7]}, "profile.steps: [5, 7]; allowed: a first and a last step of 1 to "),
        ({"steps": [4, 3]}, "profile.steps: [4, 3]; allowed: "),
        ({"steps": [0, 3]}, "profile.steps"),
        ({"steps": [3]}, "profile.steps"),
        ({"steps": [3, 4], "ranks": [0, 1]}, "profile.ranks: 1, but there are 1 processes"),
        ({"steps": [3, 4], "memory": True}, "profile.memory: true, but the device is cpu"),
    ],
)
def test_what_cannot_be_profiled_is_one_line(
    run_tree: dict[str, Any], tmp_path: Path, profile: dict[str, Any], message: str
) -> None:
    file = write_config(run_tree | {"profile": profile}, tmp_path / "run.yaml")
    assert message in error_line(moebius("train", file))
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "written"), [([1], [1]), (None, [0, 1])])
def test_each_chosen_process_writes_its_file(
    run_tree: dict[str, Any], tmp_path: Path, ranks: list[int] | None, written: list[int]
) -> None:
    """And one process prints."""
    tree = run_tree | {"profile": {"steps": [3, 4], "ranks": ranks}}
    launcher = launch(write_config(tree, tmp_path / "run.yaml"), 2)
    output, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    assert files_in(tmp_path / "run") == [f"step-3-rank-{rank}.json.gz" for rank in written]
    for rank in written:
        assert ranges(tmp_path / "run" / "profile" / f"step-3-rank-{rank}.json.gz")["step 4"] == 1
    assert output.count("ms per step") == (2 if 0 in written else 0)

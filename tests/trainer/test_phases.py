"""The time of a step by phase."""

import json
from pathlib import Path
from typing import Any

import pytest

from moebius.trainer.config import RunConfig
from moebius.trainer.watch import phases
from moebius.trainer.watch.phases import PhaseClock
from tests.trainer.helpers import train_run


def test_phases_end_where_another_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks of other sections and without a name end nothing; `stop` does."""
    moments = iter([1.0, 3.0, 7.0, 8.0, 20.0, 21.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(moments))
    clock = PhaseClock()
    clock.mark("step", "forward")
    clock.mark("save", "write")
    clock.mark("step", "")
    clock.mark("step", "backward")
    clock.mark("step", "forward")
    clock.stop()
    clock.mark("step", "optimizer")
    clock.stop()
    assert clock.take() == {"forward": 2.0 + 1.0, "backward": 4.0, "optimizer": 1.0}
    assert clock.take() == {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}


def test_phases_make_up_a_step(run_tree: dict[str, Any]) -> None:
    """Each takes its time, and together no more than the step."""
    folder: Path = train_run(RunConfig.model_validate(run_tree)).folder
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    for line in (line for line in lines if "speed/step_seconds" in line):
        times = [line[f"speed/{name}_seconds"] for name in phases.PHASES]
        assert min(times) > 0
        assert sum(times) + line["speed/data_wait"] * line["speed/step_seconds"] < (
            1.001 * line["speed/step_seconds"]
        )

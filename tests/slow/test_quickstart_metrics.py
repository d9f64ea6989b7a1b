"""The quickstart, killed three times: what TensorBoard's own reader finds in its folder."""

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    IMAGES,
    SCALARS,
    TENSORS,
    EventAccumulator,
)

from moebius.trainer.tags import (
    BOTH_KINDS,
    DEPTH,
    EVALUATION,
    EXPERT_CHOICE,
    MOE,
    PICTURES,
    PLANNED,
    SINGLE,
    TAGS,
    TEXTS,
    Tag,
    documented,
)
from tests.trainer.helpers import REPOSITORY

HERE = {"", MOE, BOTH_KINDS, DEPTH, EXPERT_CHOICE, EVALUATION, PLANNED, SINGLE}
"""what is true of the quickstart with `log.plan`"""
STEPS, KILLS, INTERVAL = 40, (7, 18, 29), 4
EVERYTHING = SCALARS, IMAGES, TENSORS


def command(run_dir: Path) -> list[str]:
    words = {
        "run_dir": run_dir,
        "data.dir": run_dir.parent / "data",
        "train.num_steps": STEPS,
        "train.batch_size": 2,
        "evaluation.interval": 10,
        "evaluation.num_batches": 1,
        "checkpoint.interval": INTERVAL,
        "log.interval": 1,
        "log.picture_interval": 10,
        "log.plan": "true",
    }
    options = [f"{name}={value}" for name, value in words.items()]
    return [sys.executable, "-m", "moebius.trainer", "train", "configs/quickstart.yaml", *options]


def train(run_dir: Path, kill_at: int | None = None) -> None:
    """To the end, or to a SIGKILL once a step is in the log."""
    output = (run_dir.parent / "output").open("a")
    process = subprocess.Popen(command(run_dir), cwd=REPOSITORY, stdout=output, stderr=output)
    log = run_dir / "metrics.jsonl"
    while kill_at is not None and process.poll() is None:
        if log.exists() and f'{{"step": {kill_at}, "train/loss"' in log.read_text():
            process.kill()
        time.sleep(0.02)
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert process.wait(timeout=600) == expected, (run_dir.parent / "output").read_text()


def of_run(tags: tuple[Tag, ...]) -> list[Tag]:
    """Those that the quickstart has."""
    return [tag for tag in tags if tag.when in HERE]


@pytest.mark.slow
def test_every_documented_tag_and_no_step_twice(tmp_path: Path) -> None:
    """All that is documented for such a run, nothing else, and one curve of each."""
    run_dir = tmp_path / "run"
    for step in KILLS:
        train(run_dir, step)
    train(run_dir)
    found = EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance=dict.fromkeys(EVERYTHING, 0)
    ).Reload()
    assert len(list((run_dir / "tensorboard").iterdir())) == len(KILLS) + 1

    names = found.Tags()["scalars"]
    assert [name for name in names if documented(name) is None] == []
    assert [tag.name for tag in of_run(TAGS) if not any(map(tag.matches, names))] == []
    assert {documented(name) for name in names} <= set(of_run(TAGS))
    assert set(found.Tags()["images"]) == {tag.name for tag in of_run(PICTURES)}
    texts = {name.removesuffix("/text_summary") for name in found.Tags()["tensors"]}
    assert texts - {"custom_scalars__config__"} == {tag.name for tag in TEXTS}

    for name in names:
        steps = [event.step for event in found.Scalars(name)]
        assert max(Counter(steps).values()) == 1, name
        assert steps == sorted(steps), name
    every = list(range(1, STEPS + 1))
    for name in ("train/loss", "width/load_max_over_mean", "depth/agreement", "health/starts"):
        assert [event.step for event in found.Scalars(name)] == every
    assert [event.step for event in found.Scalars("eval/loss")] == [0, 10, 20, 30, 40]
    assert [event.step for event in found.Images("width/load")] == [10, 20, 30, 40]
    assert found.Scalars("health/starts")[-1].value == len(KILLS) + 1

"""Sixty SIGKILLs in all phases of a run, which ends as if nothing had happened."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch import Tensor

from moebius.data.audit import compare, read_audit
from moebius.model.decoder import Decoder
from moebius.trainer.config import RunConfig
from moebius.trainer.restore import load_model, open_run
from tests.faults.restarts import until_done
from tests.trainer.helpers import logged, write_config

STEP_PHASES = ("data", "forward", "backward", "optimizer", "evaluate")
SAVE_PHASES = ("stage", "write", "commit", "retain")
LOAD_PHASES = ("start", "load", "read")
INTERVAL = 4
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm")]


def kills(count: int, processes: int, num_steps: int, seed: int) -> list[dict[str, Any]]:
    """Kills in every phase, of random processes at random steps."""
    chance = random.Random(seed)
    phases = [*STEP_PHASES, *SAVE_PHASES, *LOAD_PHASES] * count
    found: list[dict[str, Any]] = []
    for phase in phases[:count]:
        victim = 0 if phase == "retain" else chance.randrange(processes)
        fault: dict[str, Any] = {"kind": "kill", "rank": victim, "phase": phase}
        if phase in STEP_PHASES:
            fault["step"] = chance.randrange(num_steps)
        if phase in SAVE_PHASES:  # a checkpoint is committed one step after it was begun, or later
            fault["step"] = None
        if phase == "evaluate":
            fault["step"] = chance.randrange(1, num_steps // INTERVAL) * INTERVAL
        found.append(fault)
    return found


def tree_of(run_tree: dict[str, Any], num_steps: int, rows: int = 12) -> dict[str, Any]:
    return run_tree | {
        "train": {
            "num_steps": num_steps,
            "batch_size": rows,
            "micro_batch_size": 3,
            "device": "cpu",
        },
        "optim": {"lr": 1e-3, "schedule": {"kind": "cosine", "warmup_steps": 2}},
        "evaluation": {"interval": INTERVAL, "num_batches": 1},
        "checkpoint": {"interval": INTERVAL, "keep": 2, "max_crashes": 1000},
        "log": {"interval": 1, "audit": True},
    }


def weights(folder: Path) -> dict[str, Tensor]:
    config, checkpoint = open_run(folder, None)
    decoder = Decoder(config.model)
    load_model(checkpoint, decoder)
    return decoder.state_dict()


def optimizer_files(folder: Path) -> dict[str, str]:
    """Hashes of what the last checkpoint holds."""
    return {n: f.sha256 for n, f in open_run(folder, None)[1].record.files.items()}


def campaign(
    tree: dict[str, Any],
    folder: Path,
    layouts: Sequence[tuple[int, Sequence[str]]],
    faults: list[dict[str, Any]],
) -> None:
    """Train in `folder/whole` undisturbed with the first layout, and in `folder/killed` with all
    kills."""
    for name, given, used in (("whole", [], layouts[:1]), ("killed", faults, layouts)):
        run = tree | {"run_dir": str(folder / name), "faults": given}
        config = write_config(run, folder / f"{name}.yaml")
        RunConfig.model_validate(run)
        words = ["train", str(config)]
        attempts = until_done(words, used, folder / f"{name}-logs", len(given) + 1)
    assert len(attempts) > len(faults) / 2  # two may be killed in one attempt
    assert len(list((folder / "killed" / "faults").iterdir())) == len(faults), "all have happened"


def assert_same_samples(folder: Path, count: int) -> None:
    audits = [read_audit(folder / name / "audit") for name in ("whole", "killed")]
    assert compare(*audits) == (count, -1)


@pytest.mark.parametrize(
    ("processes", "options", "count", "num_steps", "rows"),
    [
        (2, ("parallel.data=zero1",), 18, 24, 12),
        (4, ("parallel.tp=2", "parallel.ep=2"), 12, 16, 6),
    ],
)
def test_kills_leave_no_trace(
    run_tree: dict[str, Any],
    tmp_path: Path,
    processes: int,
    options: Sequence[str],
    count: int,
    num_steps: int,
    rows: int,
) -> None:
    """Bit for bit: every report, the weights, the optimizer's state, the samples."""
    faults = kills(count, processes, num_steps, seed=count)
    campaign(tree_of(run_tree, num_steps, rows), tmp_path, [(processes, options)], faults)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    whole, own = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], own[name]) for name in whole)
    assert optimizer_files(tmp_path / "whole") == optimizer_files(tmp_path / "killed")
    assert_same_samples(tmp_path, num_steps * rows)
    assert_one_curve(tmp_path / "killed", range(1, num_steps + 1))


def assert_one_curve(folder: Path, steps: Iterable[int]) -> None:
    """TensorBoard shows every step once, however often it was done."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    names = events.Tags()["scalars"]
    assert "train/loss" in names
    for name in names:
        seen = [event.step for event in events.Scalars(name)]
        assert len(seen) == len(set(seen)), name
    assert [event.step for event in events.Scalars("train/loss")] == list(steps)


LAYOUTS: list[tuple[int, Sequence[str]]] = [
    (2, ("parallel.data=zero1",)),
    (4, ("parallel.tp=2", "parallel.ep=2")),
    (3, ("parallel.data=ddp",)),
    (2, ("parallel.rp=2",)),
    (2, ("parallel.data=fsdp2",)),
    (2, ("parallel.pp=2",)),
    (3, ("parallel.data=zero1",)),
]


def test_kills_and_resumes_on_other_layouts(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Every attempt has another layout than the one before; numbers differ by rounding only."""
    num_steps, count = 32, 30
    faults = kills(count, 2, num_steps, seed=7)
    campaign(tree_of(run_tree, num_steps), tmp_path, LAYOUTS, faults)
    losses = [
        [line for line in logged(tmp_path / name) if "train/loss" in line]
        for name in ("killed", "whole")
    ]
    for ours, theirs in zip(*losses, strict=True):
        assert ours["step"] == theirs["step"]
        for name, value in theirs.items():  # one decision of a router shows in its statistics
            close = {"rel": 2e-3} if name.startswith("train/") else {"rel": 0.05, "abs": 0.02}
            assert ours[name] == pytest.approx(value, **close), (ours["step"], name)
    whole, own = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name in whole:
        torch.testing.assert_close(own[name], whole[name], rtol=1e-2, atol=1e-3)
    assert_same_samples(tmp_path, num_steps * 12)

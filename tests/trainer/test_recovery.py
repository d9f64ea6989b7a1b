"""What a run does about faults, the parts of it by themselves."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.data.corpus import open_corpora
from moebius.errors import CheckpointError, TrainingError
from moebius.model.parameters import Role
from moebius.parallel.config import ParallelConfig
from moebius.parallel.consensus import Consensus
from moebius.parallel.engine import Holding, clip
from moebius.parallel.mesh import Mesh
from moebius.trainer.callbacks.checkpointing import CheckpointCallback
from moebius.trainer.callbacks.metrics import stragglers
from moebius.trainer.config import RunConfig
from moebius.trainer.loop import train_step
from moebius.trainer.recovery.config import SpikeConfig
from moebius.trainer.recovery.crashes import crashed
from moebius.trainer.recovery.goodput import (
    Account,
    Attempt,
    goodput,
    read_accounts,
    write_account,
)
from moebius.trainer.recovery.rewind import Rewind
from moebius.trainer.recovery.spikes import SpikeDetector
from moebius.trainer.resume import resume
from moebius.trainer.run import Run
from tests.parity.forks import run_forked
from tests.trainer.helpers import train_run


def test_spikes_are_told_from_noise_and_from_a_trend() -> None:
    """Of a falling loss with noise none is one; one far above is, and then does not count."""
    chance = random.Random(0)
    detector = SpikeDetector(SpikeConfig(window=32, threshold=8))
    for step in range(500):
        assert detector.limit == math.inf or step >= 32
        assert not detector.add(2 + 4 * math.exp(-step / 100) + chance.gauss(0, 0.05))
    limit = detector.limit
    assert detector.add(limit + 0.01)
    assert detector.limit == limit
    assert not detector.add(limit - 0.01)


def test_the_score_is_the_robust_one() -> None:
    detector = SpikeDetector(SpikeConfig(window=9, threshold=3))
    detector.load([1, 2, 3, 4, 5, 6, 7, 8, 100])
    assert detector.limit == pytest.approx(5 + 3 * 1.4826 * 2)


def test_losses_that_hardly_differ_make_no_spikes() -> None:
    detector = SpikeDetector(SpikeConfig(window=8, threshold=8))
    detector.load([2.0] * 8)
    assert not detector.add(2.01)
    assert detector.add(2.2)


def test_crashes_count_where_they_come_at_the_furthest_step(tmp_path: Path) -> None:
    def attempt(begin: int, end: int, ended: bool = False) -> None:
        path = tmp_path / "time.jsonl"
        write_account(path, Account(0, begin, {}), begins=True)
        write_account(path, Account(0, end, {}), ends=ended)

    assert crashed(tmp_path, 8) == 0
    attempt(0, 10)
    for end in (11, 9, 11):
        attempt(8, end)
    attempt(8, 11, ended=True)  # a stop
    attempt(4, 11)
    assert (crashed(tmp_path, 8), crashed(tmp_path, 4), crashed(tmp_path, 0)) == (2, 1, 0)
    attempt(4, 12)
    assert (crashed(tmp_path, 8), crashed(tmp_path, 4)) == (0, 1)


def votes() -> list[dict[str, int]]:
    import torch.distributed as dist

    consensus = Consensus(("stop", "rewind"))
    found = [dict(consensus.decide())]
    if dist.get_rank() == 1:
        consensus.vote("stop", 15)
        consensus.vote("stop", 2)
    if dist.get_rank() == 2:
        consensus.vote("rewind", 1)
    found.append(dict(consensus.decide()))
    found.append(dict(consensus.decide()))
    return found


def test_all_decide_alike(warm: None) -> None:
    nothing = {"stop": 0, "rewind": 0}
    for found in run_forked(3, votes):
        assert found == [nothing, {"stop": 15, "rewind": 1}, nothing]


def test_stragglers_are_above_the_median_by_a_ratio() -> None:
    assert stragglers([1.0, 1.1, 1.6, 0.9], 1.5) == [2]
    assert stragglers([1.0, 1.1, 1.4, 0.9], 1.5) == []
    assert stragglers([1e-5, 1e-4], 1.5) == []


def attempt(began: float, first: int, *accounts: tuple[float, int, float]) -> Attempt:
    """Accounts of (clock, step, seconds in steps), the rest of the time in `start`."""
    seconds = [(began, first, 0.0), *accounts]
    return Attempt(
        [
            Account(at, step, {"start": at - began - inside, "step": inside})
            for at, step, inside in seconds
        ]
    )


def test_lost_steps_are_those_after_the_point_that_a_later_attempt_goes_on_from() -> None:
    attempts = [
        attempt(100, 0, (110, 4, 8.0), (120, 8, 16.0)),  # 4 s start
        attempt(125, 8, (135, 12, 8.0)),  # 2 s start, then back before the first one's end
        attempt(140, 4, (150, 8, 9.0)),
    ]
    assert goodput(attempts[:1]) == pytest.approx(
        {"steps": 16 / 20, "lost": 0, "down": 0, "start": 4 / 20}
    )
    assert goodput(attempts) == pytest.approx(
        {"steps": (8 + 9) / 50, "lost": (8 + 8) / 50, "down": 10 / 50, "start": (4 + 2 + 1) / 50}
    )


def test_accounts_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "time.jsonl"
    assert read_accounts(path) == []
    made = [attempt(100, 0, (110, 4, 8.0)), attempt(120, 4, (130, 6, 5.0))]
    for one in made:
        for number, account in enumerate(one.accounts):
            write_account(path, account, begins=number == 0)
    with path.open("a") as file:
        file.write('{"begins": fal')
    assert read_accounts(path) == made


def test_a_gradient_that_is_clipped_apart_counts_when_it_is_not_finite() -> None:
    """An auxiliary router's gradient is no part of the norm, but must not be applied either."""
    mesh = Mesh(ParallelConfig())
    gradients = [
        Holding("a", torch.zeros(3), torch.full((3,), 2.0), Role.MATRIX, 1),
        Holding("b", torch.zeros(1), torch.tensor([0.5]), Role.AUX_ROUTER, 1),
    ]
    assert float(clip(gradients, mesh, 1.0)) == pytest.approx(12**0.5)
    gradients[1] = Holding("b", torch.zeros(1), torch.tensor([math.nan]), Role.AUX_ROUTER, 1)
    assert not math.isfinite(float(clip(gradients, mesh, 1.0)))


def test_a_run_whose_config_was_changed_can_go_back(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """With --allow-changes, and before the next checkpoint."""
    tree = run_tree | {"checkpoint": {"interval": 2}, "train": run_tree["train"] | {"num_steps": 8}}
    train_run(RunConfig.model_validate(tree), stop_after=4)
    changed = RunConfig.model_validate(tree | {"optim": tree["optim"] | {"lr": 1e-3}})
    run = Run(changed, open_corpora(changed.data), [CheckpointCallback()])
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.01 -> 0\.001"):
        resume(run)
    resume(run, allow_changes=True)
    train_step(run)
    run.step += 1
    run.rewind(Rewind("a fault"))
    assert (run.step, run.stream.position) == (4, 20)
    assert run.skipped == [(16, 20)]

    again = Run(changed, open_corpora(changed.data), [CheckpointCallback()])
    resume(again, allow_changes=True)
    assert (again.step, again.stream.position) == (4, 20), "a restart does not forget it"
    assert (again.skipped, again.rewound) == (run.skipped, run.rewound)
    train_step(again)
    again.step += 1
    again.rewind(Rewind("the same fault"))
    assert again.step == 2, "going back to step 4 did not help"
    again.step += 1
    with pytest.raises(TrainingError, match="the run has gone back 2 times"):
        again.rewind(Rewind("the same fault"))

"""Every way of using layers several times: neither the cut of a batch nor recomputation counts.

Each model of `SYSTEMS` makes two optimizer steps with its controllers in float64, in the middle of
its schedules. Four rows at once must leave what four micro-batches of one row leave.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.context import Recompute, StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.model.objective import TeacherModel
from moebius.model.parameters import Role, named_specs
from moebius.model.program import Site
from tests.model.helpers import rows_of
from tests.model.recursion.conftest import one_thread
from tests.model.recursion.systems import DENSE, SYSTEMS, depth, documents, expert, system

__all__ = ["one_thread"]
ROWS = 4
STEPS = (20, 21)
"""where warm-ups are half done, and the second of which ends `full_depth_steps`"""
RATE = 0.05
SEED = 7
"""draws the last exit in the first of the two steps and another in the second"""


@dataclass
class Left:
    """What two steps left behind."""

    losses: list[dict[str, Tensor]]
    booked: list[dict[str, Tensor]]
    statistics: list[dict[Site, dict[str, Tensor]]]
    gradients: list[dict[str, Tensor]]
    states: list[dict[str, Tensor]]


def train(
    decoder: Decoder, rows: int, recompute: Recompute, teacher: TeacherModel | None = None
) -> Left:
    """Two SGD steps on the same batch in micro-batches of so many rows."""
    executor = LocalExecutor(copy.deepcopy(decoder))
    batch = documents(ROWS)
    parts = [rows_of(batch, start, start + rows) for start in range(0, ROWS, rows)]
    left = Left([], [], [], [], [])
    for step in STEPS:
        context = StepContext(
            "topk", Ledger(), step=step, seed=SEED, training=True, recompute=recompute
        )
        result = executor.accumulate_gradients(parts, context, teacher)
        left.losses.append(result.losses)
        left.booked.append(result.ledger.losses)
        left.statistics.append(result.ledger.statistics)
        left.gradients.append({})
        for name, parameter in executor.decoder.named_parameters():
            if parameter.grad is not None:
                left.gradients[-1][name] = parameter.grad
                parameter.data -= RATE * parameter.grad
                parameter.grad = None
        executor.decoder.update_routers(result.ledger, step)
        left.states.append(copy.deepcopy(executor.decoder.state_dict()))
    return left


def assert_equal(got: Any, expected: Any, path: str) -> None:
    """The same tree of tensors, to 1e-9 in absolute terms."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(
            got, expected, rtol=0, atol=1e-9, msg=lambda text: f"{path}: {text}"
        )
    elif isinstance(expected, dict):
        assert list(got) == list(expected), path
        for key, value in expected.items():
            assert_equal(got[key], value, f"{path}/{key}")
    else:
        assert len(got) == len(expected), path
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_equal(one, other, f"{path}/{number}")


def assert_no_cut_matters(decoder: Decoder, teacher: TeacherModel | None = None) -> Left:
    """1 x 4 rows against 4 x 1, each with and without recomputation."""
    expected = train(decoder, ROWS, recompute="none", teacher=teacher)
    for rows, recompute in [(1, "none"), (1, "full"), (1, "selective"), (ROWS, "full")]:
        got = train(decoder, rows, recompute, teacher)
        assert_equal(vars(got), vars(expected), f"{rows} rows, recompute {recompute}")
    return expected


def assert_all_learn(decoder: Decoder, left: Left) -> None:
    """Every parameter, and of those with an entry for each depth every entry, has a gradient."""
    for name, parameter, spec in named_specs(decoder):
        per_depth = spec.role is Role.ADAPTER or name.endswith(("gain", "magnitude"))
        entries = range(len(parameter)) if per_depth else [slice(None)]
        for entry in entries:
            sizes = [float(g[name][entry].abs().max()) for g in left.gradients if name in g]
            assert sizes, f"{name} has no gradient"
            assert max(sizes) > 1e-8, f"{name}[{entry}] has a gradient of zeros"


def assert_exercised(decoder: Decoder, left: Left) -> None:
    """Controllers moved at every site, and no pass was left out."""
    initial = decoder.state_dict()
    for key in [key for key in initial if "controllers" in key or ".last_" in key]:
        moved = torch.stack([state[key] != initial[key] for state in left.states])
        assert bool(moved.any(dim=0).flatten(1).any(dim=1).all()), key
    for statistics in left.statistics:
        for site, sums in statistics.items():
            assert int(sums["selected" if "selected" in sums else "tokens"]) > 0, site


@pytest.mark.parametrize("name", SYSTEMS)
def test_cut_and_recomputation_change_nothing(name: str) -> None:
    """Losses, gradients, statistics, and parameters and controllers after two steps."""
    decoder = system(**SYSTEMS[name]).decoder
    left = assert_no_cut_matters(decoder)
    assert_all_learn(decoder, left)
    assert_exercised(decoder, left)


def test_no_cut_matters_with_a_teacher() -> None:
    """Distillation, beside the losses of exits and of the depth router."""
    student = system(
        depth=depth(router=expert()), exits={"after": [2, 3], "self_distillation": 0.5}
    )
    teacher = system(seed=5, depth={"num_layers": 2}, ffn=DENSE)
    left = assert_no_cut_matters(student.decoder, TeacherModel(teacher, 0.5, 2.0))
    assert set(left.losses[0]) == {
        "loss",
        "distillation_loss",
        "exit_2_loss",
        "exit_3_loss",
    }
    assert all(parameter.grad is None for parameter in teacher.decoder.parameters())

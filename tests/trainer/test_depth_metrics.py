"""Numbers of a report that must be those of what ran, however the batch was cut."""

from typing import Any

import pytest
import torch

from moebius.model.context import StepContext
from moebius.model.cost import planned_work
from moebius.model.extent import Extent
from moebius.model.ledger import Ledger
from moebius.trainer.metrics import depth_metrics, ffn_flops_per_token
from tests.conftest import MOE
from tests.model.helpers import build, random_batch, rows_of, scale_parameters

DENSE = {"kind": "dense", "intermediate_size": 48}
LOOP = {"num_layers": 8, "sharing": "middle_cycle", "num_recursions": 3}
TOKEN = {"kind": "token_choice"}


def ledger_of(rows: int, step: int = 0, **changes: Any) -> tuple[Any, Ledger]:
    """A decoder, and what a step on four rows in micro-batches of so many left."""
    executor = build(torch.float64, **({"ffn": DENSE} | changes))
    scale_parameters(executor, "embedding", 20.0)
    scale_parameters(executor, "depth_routers", 30.0)
    batch = random_batch(4, 12)
    parts = [rows_of(batch, start, start + rows) for start in range(0, 4, rows)]
    context = StepContext("topk", Ledger(), step=step, training=True)
    return executor.decoder, executor.accumulate_gradients(parts, context).ledger


@pytest.mark.parametrize("ffn", [DENSE, MOE | {"shared": {"intermediate_size": 8}}])
def test_ffn_flops_are_those_of_the_tokens_that_entered(ffn: dict[str, Any]) -> None:
    found = []
    for rows in (1, 4):
        decoder, ledger = ledger_of(rows, ffn=ffn, depth=LOOP | {"router": TOKEN})
        found.append(ffn_flops_per_token(decoder, ledger, 48))
    slots = [ledger.work.visits[v].tokens for v in decoder.program.visits if v.depth == 2]
    entered = int(ledger.statistics[decoder.program.segments[1].site(2)]["selected"])
    assert slots[0] > entered > 0, "rows must keep different numbers of tokens"
    assert found[0] == found[1] > 0
    if ffn["kind"] == "dense":
        sums = [ledger.statistics[decoder.program.segments[1].site(r)] for r in (1, 2, 3)]
        visits = 2 * 48 + 2 * sum(int(s["selected"]) for s in sums)
        assert found[0] == 6 * 32 * 48 * visits / 48


def test_mean_passes_are_those_that_were_made() -> None:
    """While everyone is sent through all passes, whatever routers wish."""
    router = TOKEN | {"full_depth_steps": 5}
    _, forced = ledger_of(4, step=4, depth=LOOP | {"router": router})
    _, free = ledger_of(4, step=5, depth=LOOP | {"router": router})
    assert depth_metrics(forced)["depth/mean_passes"] == 3
    assert 1 < depth_metrics(free)["depth/mean_passes"] < 3


def test_exits_have_heads_in_the_plan_too() -> None:
    exits = {"after": [3, 5]}
    for depth in (LOOP, LOOP | {"router": {}}):
        decoder, ledger = ledger_of(4, depth=depth, exits=exits)
        assert planned_work(decoder, 4, 12) == ledger.work
        assert ledger.work.head_tokens == 3 * 48
    drawn, _ = ledger_of(4, depth=LOOP, exits=exits | {"draw": "step"})
    assert planned_work(drawn, 4, 12).head_tokens == 48
    assert planned_work(drawn, 4, 12).visits[drawn.program.visits[-1]] == Extent.of(4, 12, 12)


def test_what_a_window_has_dropped_does_not_come_back() -> None:
    """The carry of a routed loop holds no more visits than the window reaches."""
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    deep = attention | {"depth_attention": {"scope": "window", "window": 3}}
    executor = build(ffn=DENSE, attention=deep, depth=LOOP | {"router": {}})
    seen: list[int] = []
    for layer in executor.decoder.layers.values():
        layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[1].depth_values)))
    with torch.no_grad():
        executor.hidden(random_batch(1, 12), StepContext("topk", Ledger()))
    assert seen == [0, 1, 2, 2, 2, 2, 2, 2]

"""Oracles of capacities, against counting by hand."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moebius.model.moe.capacity import Capacity
from moebius.model.moe.pool import ZERO_COMPUTATION, PoolShape
from tests.model.moe.rig import (
    MOEPP,
    make_router,
    normal,
    pool_of,
    route_context,
    scores_of,
    visit,
)

SMALL = pool_of(("ffn", 4), ("constant", 1), ("copy", 1), ("zero", 1))


def shares(pool: PoolShape, tau: float) -> list[float]:
    """Each expert's part of all assignments in equilibrium (MoE++ eq. 8)."""
    free = pool.is_kind(*ZERO_COMPUTATION).tolist()
    total = tau * free.count(False) + free.count(True)
    return [(1 if is_free else tau) / total for is_free in free]


def in_equilibrium(pool: PoolShape, tau: float, num_tokens: int, top_k: int) -> Tensor:
    """Decisions `[T, K]` with load in proportion to the shares, which must be whole."""
    numbers = [share * num_tokens * top_k for share in shares(pool, tau)]
    repeats = torch.tensor([round(number) for number in numbers])
    assert max(abs(n - round(n)) for n in numbers) < 1e-9
    return torch.arange(pool.num_experts).repeat_interleave(repeats).view(top_k, -1).T


def applied(capacity: Capacity, ids_TK: Tensor, pool: PoolShape, rows: int = 1) -> Tensor:
    """The decisions after the limits, with random scores."""
    probs_TN = normal(len(ids_TK), pool.num_experts, seed=7).softmax(dim=1)
    ctx = route_context(rows, len(ids_TK) // rows, training=True)
    return capacity.apply(ids_TK, scores_of(probs_TN), pool, ctx)


@pytest.mark.parametrize("tau", [1.0, 0.75, 0.5, 0.1])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 2.0])
def test_limits_add_up_to_factor_times_assignments(tau: float, factor: float) -> None:
    """Oracle 3: `sum C_i = gamma K T`, but for rounding each limit up; the limit of an ffn is tau
    times that of a zero-computation expert."""
    pool, num_assignments = PoolShape(MOEPP), 2 * 4096
    limits = Capacity(factor=factor, tau=tau).limits(torch.tensor([num_assignments]), pool)[0]
    exact = [factor * share * num_assignments for share in shares(pool, tau)]
    assert limits.tolist() == [math.ceil(value - 1e-3) for value in exact]
    assert sum(exact) == pytest.approx(factor * num_assignments)
    assert 0 <= float(limits.sum()) - factor * num_assignments < 20
    assert exact[0] / exact[-1] == pytest.approx(tau)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("factor", [1.0, 1.1, 2.0])
@pytest.mark.parametrize(("tau", "num_tokens"), [(1.0, 140), (0.75, 160), (0.25, 160)])
def test_nothing_is_dropped_in_equilibrium(
    tau: float, num_tokens: int, factor: float, scope: Literal["sequence", "micro_batch"]
) -> None:
    """Oracle 3: with load as the shares, drop rate 0 for gamma >= 1."""
    pool = SMALL if tau == 1 else PoolShape(MOEPP)
    ids_TK = in_equilibrium(pool, tau, num_tokens, 2)
    assert torch.equal(applied(Capacity(factor=factor, tau=tau, scope=scope), ids_TK, pool), ids_TK)


@pytest.mark.parametrize(("top_k", "gamma"), [(2, 1.1), (2, 1.0), (4, 1.2)])
def test_limits_read_literally_drop_most(top_k: int, gamma: float) -> None:
    """Oracle 3: eq. 8 with T as tokens allows gamma T of K T assignments: `1 - gamma / K` of them
    would be dropped in equilibrium, 45 % with the published 1.1 and K 2."""
    pool, tau, num_tokens = PoolShape(MOEPP), 0.75, 1600
    ids_TK = in_equilibrium(pool, tau, num_tokens, top_k)
    literal = applied(Capacity(factor=gamma / top_k, tau=tau), ids_TK, pool)
    dropped = float((literal < 0).double().mean())
    assert dropped == pytest.approx(1 - gamma / top_k, abs=0.01)


def naive_limits(
    ids: list[list[int]], scores: list[list[float]], length: int, capacity: Capacity
) -> list[list[int]]:
    """Capacity as a loop over rows and experts, for `SMALL`."""
    result = [list(row) for row in ids]
    group = length if capacity.scope == "sequence" else len(ids)
    for start in range(0, len(ids), group):
        tokens = range(start, start + group)
        places = [(t, k) for t in tokens for k in range(len(ids[0])) if ids[t][k] >= 0]
        overflow = set()
        for expert, share in enumerate(shares(SMALL, capacity.tau)):
            if capacity.overflow == "spill" and expert >= 4:
                continue
            own = [(t, k) for t, k in places if ids[t][k] == expert]
            if capacity.priority == "score":
                own.sort(key=lambda place: -scores[place[0]][expert])
            overflow |= set(own[math.ceil(capacity.factor * share * len(places) - 1e-3) :])
        for t, k in sorted(overflow):
            free = [e for e in (4, 5, 6) if e not in result[t]]
            best = max(free, key=lambda e: scores[t][e], default=-1)
            result[t][k] = best if capacity.overflow == "spill" else -1
    return result


@pytest.mark.parametrize("overflow", ["drop", "spill"])
@pytest.mark.parametrize("priority", ["score", "position"])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_capacity_equals_a_loop(overflow: str, priority: str, scope: str, top_k: int) -> None:
    """Oracle of its own: which assignments stay, by score or by position, per row or together; what
    spills goes to the best zero-computation expert that its token has not, and nowhere else."""
    options = {"overflow": overflow, "priority": priority, "scope": scope, "factor": 0.8}
    capacity = Capacity.model_validate(options | {"tau": 0.5})
    logits_TN = normal(60, 7, seed=top_k)
    logits_TN[:, 0] += 1.5
    probs_TN = logits_TN.softmax(dim=1)
    ids_TK = probs_TN.topk(top_k, dim=1).indices.contiguous()
    ids_TK[5] = -1
    got = capacity.apply(ids_TK, scores_of(probs_TN), SMALL, route_context(3, 20, training=True))
    expected = naive_limits(ids_TK.tolist(), probs_TN.tolist(), 20, capacity)
    assert got.tolist() == expected
    assert expected != ids_TK.tolist()


def limited_router(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A router over the small pool with a capacity."""
    return make_router(SMALL, dtype=dtype, **options)


def test_spilled_assignments_keep_their_weight() -> None:
    """Oracle of its own: no computing expert takes more than its limit, the weight of what spilled
    stays, its new expert is a zero-computation one that the token had not; losses and loads are
    those before."""
    options = {"selector": {"kind": "top_k", "top_k": 2}, "losses": [{"kind": "switch"}]}
    x_BSD = normal(2, 100, 7)
    x_BSD[..., 0] += 2.0
    free = visit(limited_router(**options), x_BSD, training=True)
    capacity = {"factor": 1.0, "tau": 0.5, "overflow": "spill"}
    router = limited_router(**options, capacity=capacity)
    spilled = visit(router, x_BSD, training=True)
    before, after = free.routed.routing, spilled.routed.routing
    moved = before.ids_TK != after.ids_TK
    assert int(moved.sum()) > 40
    assert int((after.ids_TK < 0).sum()) == 0, "there is always room: K 2 of 3 free experts"
    assert set(after.ids_TK[moved].tolist()) <= {4, 5, 6}
    assert bool((after.ids_TK[:, 0] != after.ids_TK[:, 1]).all())
    assert torch.equal(before.weights_TK, after.weights_TK)
    limit = math.ceil(1.0 * shares(SMALL, 0.5)[0] * 200)
    for row in after.ids_TK.view(2, 200):
        assert max(int((row == expert).sum()) for expert in range(4)) <= limit
    assert int(spilled.sums("spilled")) == int(moved.sum())
    assert int(spilled.sums("dropped")) == 0
    for name in ("expert_tokens", "prob_sums", "k_histogram"):
        assert torch.equal(spilled.sums(name), free.sums(name))
    executed_N = torch.bincount(after.ids_TK.flatten(), minlength=7)
    assert spilled.sums("executed_tokens").tolist() == executed_N.tolist()
    assert spilled.routed.losses[0][1] == free.routed.losses[0][1]
    assert torch.equal(visit(router, x_BSD).ids_TK, before.ids_TK), "evaluation has no limits"


def test_dropped_assignments_weigh_nothing() -> None:
    """Oracle of its own: what is dropped has weight 0, the weights of the others stay."""
    x_BSD = normal(2, 100, 7)
    x_BSD[..., 0] += 2.0
    free = visit(limited_router(losses=[]), x_BSD, training=True).routed.routing
    router = limited_router(losses=[], capacity={"factor": 1.0, "tau": 0.5})
    limited = visit(router, x_BSD, training=True)
    dropped = limited.ids_TK < 0
    assert int(dropped.sum()) == int(limited.sums("dropped")) > 40
    assert int(limited.sums("spilled")) == 0
    expected_TK = free.weights_TK.masked_fill(dropped, 0)
    assert torch.equal(limited.routed.routing.weights_TK, expected_TK)


def test_nothing_spills_to_an_excluded_expert() -> None:
    """Oracle of its own: an expert that is no candidate gets nothing that spills either."""
    router = limited_router(
        losses=[],
        candidates=[{"kind": "exclude", "ids": [5]}],
        capacity={"factor": 0.5, "tau": 0.5, "overflow": "spill"},
    )
    ids_TK = visit(router, normal(2, 100, 7), training=True).ids_TK
    assert 5 not in ids_TK.flatten().tolist()


@pytest.mark.parametrize("overflow", ["drop", "spill"])
def test_priority_by_position_is_causal(overflow: str) -> None:
    """Oracle of its own: changing later tokens never changes earlier decisions; by score it does.
    Where the number of experts varies by token it could not be: such configs are refused."""

    def decided(priority: str, x_BSD: Tensor) -> Tensor:
        capacity = {"factor": 0.9, "priority": priority, "overflow": overflow}
        router = limited_router(losses=[], capacity=capacity, selector={"kind": "top_k"})
        return visit(router, x_BSD, training=True).ids_TK.view(2, 40, -1)

    x_BSD = 1.5 * normal(2, 40, 7)
    x_BSD[..., 0] += 1.5
    for start in (10, 20, 30):
        changed = x_BSD.clone()
        changed[:, start:] = 3 * normal(2, 40 - start, 7, seed=start)
        before, after = (decided("position", x)[:, :start] for x in (x_BSD, changed))
        assert torch.equal(before, after), f"tokens from {start} on change earlier ones"
        by_score = [decided("score", x)[:, :start] for x in (x_BSD, changed)]
        assert not torch.equal(*by_score)

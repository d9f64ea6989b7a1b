"""Oracles of auxiliary losses: closed forms, loops over tokens, and what training on them does."""

import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from moebius.model.moe.losses import (
    ConcentrationLoss,
    DeviceLoss,
    Load,
    MutualInformationLoss,
    Scope,
    SwitchLoss,
    ZLoss,
)
from moebius.model.moe.pool import PoolShape
from tests.model.moe.rig import (
    MOEPP,
    make_router,
    normal,
    observation,
    pool_of,
    token_context,
    visit,
)

SCOPES: tuple[Scope, ...] = ("micro_batch", "sequence", "global")
Scale = Literal["switch", "moepp", "mixtral"]


def in_turns(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Decisions `[T, K]` with equal load: experts take turns."""
    return (torch.arange(num_tokens * top_k) % num_experts).view(num_tokens, top_k)


def random_choice(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Probabilities `[T, N]` of unequal means and the K best of each token."""
    tilt_N = torch.linspace(0, 1, num_experts, dtype=torch.float64)
    probs_TN = (normal(num_tokens, num_experts, seed=2) + tilt_N).softmax(dim=1)
    return probs_TN, probs_TN.topk(top_k, dim=1).indices


def naive_load(probs_TN: Tensor, ids_TK: Tensor) -> tuple[list[float], list[float]]:
    """`c_i / T` and `P_i`, one assignment at a time."""
    num_tokens, num_experts = probs_TN.shape
    counts, probs = [0.0] * num_experts, [0.0] * num_experts
    for token in range(num_tokens):
        for expert in ids_TK[token].tolist():
            counts[expert] += 1 / num_tokens
        for expert in range(num_experts):
            probs[expert] += float(probs_TN[token, expert]) / num_tokens
    return counts, probs


def remembered(probs_TN: Tensor, ids_TK: Tensor) -> Load:
    """A previous step that was this one."""
    counts, probs = naive_load(probs_TN, ids_TK)
    load_2N = torch.tensor([counts, probs], dtype=torch.float64).unsqueeze(1) * len(probs_TN)
    return Load(load_2N[0], load_2N[1], torch.tensor([float(len(probs_TN))]))


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (8, 2), (8, 8), (20, 3), (64, 6)])
@pytest.mark.parametrize("scope", SCOPES)
def test_switch_loss_is_one_in_balance(num_experts: int, top_k: int, scope: Scope) -> None:
    """Oracle 1: 1 at perfect balance for any K and N, whatever the mean probabilities."""
    ids_TK = in_turns(2 * num_experts, top_k, num_experts)
    probs_TN = normal(2 * num_experts, num_experts).softmax(dim=1)
    seen = observation(
        probs_TN, ids_TK, pool_of(("ffn", num_experts)), 2, remembered(probs_TN, ids_TK)
    )
    assert float(SwitchLoss(scope=scope).value(seen)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("scale", "tau"), [("switch", 1.0), ("mixtral", 1.0), ("moepp", 1.0), ("moepp", 0.3)]
)
def test_published_scales_equal_the_published_formulas(scale: Scale, tau: float) -> None:
    """Oracle 1: a published coefficient typed in unchanged gives the published loss, out of
    balance too: Switch `N sum c_i/(K T) P_i`, Mixtral `N sum c_i/T P_i`, MoE++ `sum eta c_i/T P_i`.
    """
    pool = PoolShape(MOEPP)
    probs_TN, ids_TK = random_choice(60, 20, 2)
    counts, probs = naive_load(probs_TN, ids_TK)
    eta = [1.0] * 16 + [tau] * 4
    product = sum(e * c * p for e, c, p in zip(eta, counts, probs, strict=True))
    published = {"switch": 20 * product / 2, "mixtral": 20 * product, "moepp": product}[scale]
    loss = SwitchLoss(coefficient=0.01, tau=tau, published_scale=scale, scope="micro_batch")
    value = float(loss.value(observation(probs_TN, ids_TK, pool)))
    assert abs(value - 1) > 0.05, "the comparison must be out of balance"
    assert loss.unit_coefficient(pool, 2) * value == pytest.approx(0.01 * published, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_moepp_loss_in_equilibrium(top_k: int) -> None:
    """Oracle 1: with load 1/eta the MoE++ loss is `K tau / (tau N_f + N_z)`: .0938 for 16+4, K 2,
    tau .75."""
    tau, pool = 0.75, PoolShape(MOEPP)
    # 16 experts with 3 assignments each, 4 with 4 each: 64, a multiple of every K.
    expert_A = torch.arange(20).repeat_interleave(torch.tensor([3] * 16 + [4] * 4))
    ids_TK = expert_A.view(top_k, -1).T
    probs_TN = normal(len(ids_TK), 20).softmax(dim=1)
    loss = SwitchLoss(coefficient=1.0, tau=tau, published_scale="moepp", scope="micro_batch")
    value = loss.value(observation(probs_TN, ids_TK, pool))
    published = loss.unit_coefficient(pool, top_k) * float(value)
    assert published == pytest.approx(top_k * tau / (tau * 16 + 4), rel=1e-6)
    if top_k == 2:
        assert published == pytest.approx(0.0938, abs=5e-5)


def test_sequence_scope_is_the_mean_over_rows() -> None:
    """Oracle 1: scope sequence averages each row's loss; rows out of balance in opposite ways are
    not balanced by each other, as they are in scope micro_batch."""
    probs_TN = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]], dtype=torch.float64)
    seen = observation(probs_TN, probs_TN.argmax(dim=1, keepdim=True), pool_of(("ffn", 2)), rows=2)
    rows = [2 * (1.0 * 0.85), 2 * (1.0 * 0.85)]
    assert float(SwitchLoss(scope="sequence").value(seen)) == pytest.approx(sum(rows) / 2)
    assert float(SwitchLoss(scope="micro_batch").value(seen)) == pytest.approx(1.0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("tau", "published"), [(1.0, 0.1), (0.75, 0.0938), (0.25, 0.0625), (0.1, 0.0357)]
)
def test_balance_loss_alone_reaches_the_share_of_tau(
    tau: float, published: float, scope: Scope
) -> None:
    """Oracle 2: a linear router trained on the MoE++ loss only sends `tau N_f / (tau N_f + N_z)`
    of its assignments to ffn experts, and the loss is then `K tau / (tau N_f + N_z)`."""
    loss = {"kind": "switch", "coefficient": 1.0, "tau": tau, "scope": scope}
    router = make_router(
        PoolShape(MOEPP), 32, dtype=torch.float32, losses=[loss | {"published_scale": "moepp"}]
    )
    optimizer = torch.optim.Adam(router.parameters(), lr=0.03)
    # A constant channel gives each expert an offset, so that the start is out of balance.
    x_BSD = normal(4, 512, 32, dtype=torch.float32)
    x_BSD[..., 0] = 1.0
    with torch.no_grad():
        router.scorer.weight[:, 0] = normal(20, seed=1)
    num_steps, settled = 200, 20
    counts_N, values = torch.zeros(20), []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / num_steps)
        seen = visit(router, x_BSD, step=step)
        zero = torch.zeros((), requires_grad=True)
        optimizer.zero_grad()
        seen.routed.attach_losses(zero, seen.ledger).backward()
        optimizer.step()
        router.update(seen.ledger, step)
        if step == 0:
            assert float(seen.sums("expert_tokens").max()) > 3 * 4096 / 20
        if step >= num_steps - settled:
            counts_N += seen.sums("expert_tokens")
            values.append(float(seen.ledger.losses["switch"]))
    share = float(counts_N[:16].sum() / counts_N.sum())
    assert share == pytest.approx(tau * 16 / (tau * 16 + 4), abs=0.02)
    assert sum(values) / settled == pytest.approx(published, rel=0.02)


def naive_entropy(probs: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


@pytest.mark.parametrize("scope", SCOPES)
def test_mutual_information_of_extreme_routers(scope: Scope) -> None:
    """Oracle 13: 0 for a router that treats all tokens alike, `-log N` for balanced one-hot."""
    num_experts, pool = 8, pool_of(("ffn", 8))
    loss = MutualInformationLoss(scope=scope)
    ids_TK = in_turns(32, 1, num_experts)
    uniform_TN = torch.full((32, num_experts), 1 / num_experts, dtype=torch.float64)
    same_TN = normal(1, num_experts).softmax(dim=1).expand(32, -1)
    one_hot_TN = torch.eye(num_experts, dtype=torch.float64).repeat(4, 1)
    for probs_TN, expected in ((uniform_TN, 0.0), (same_TN, 0.0), (one_hot_TN, -math.log(8))):
        seen = observation(probs_TN, ids_TK, pool, 2, remembered(probs_TN, ids_TK))
        assert float(loss.value(seen)) == pytest.approx(expected, abs=1e-9)


def test_mutual_information_equals_a_loop() -> None:
    """Oracle 13: `mean_t H(p_t) - H(mean_t p_t)` per row, weighted by tokens; concentration is
    `H(mean_t p_t)`."""
    probs_TN, ids_TK = random_choice(24, 6, 2)
    seen = observation(probs_TN, ids_TK, pool_of(("ffn", 6)), rows=3)
    conditional = sum(naive_entropy(probs) for probs in probs_TN.tolist()) / 24
    marginals = [naive_entropy(part.mean(dim=0).tolist()) for part in probs_TN.split(8)]
    value = float(MutualInformationLoss(scope="sequence").value(seen))
    assert value == pytest.approx(conditional - sum(marginals) / 3, abs=1e-12)
    whole = naive_entropy(probs_TN.mean(dim=0).tolist())
    value = float(ConcentrationLoss(scope="micro_batch").value(seen))
    assert value == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("kind", ["mutual_information", "concentration", "switch", "device"])
@pytest.mark.parametrize("rows", [1, 3])
def test_global_gradient_is_the_exact_one_where_nothing_changes(kind: str, rows: int) -> None:
    """Oracle 13: with the present step remembered, scope global has the value and the gradient of
    scope micro_batch, and of scope sequence where there is one row; before that it has not."""
    x_BSD = normal(rows, 12, 5, seed=3) + 0.5
    options = {"kind": kind} | ({"num_groups": 2} if kind == "device" else {})

    def after(scope: Scope, num_updates: int) -> tuple[Tensor, Tensor]:
        losses = [options | {"scope": scope}]
        router = make_router(pool_of(("ffn", 6)), 5, losses=losses)
        with torch.no_grad():
            router.scorer.weight.mul_(10)
        for _ in range(num_updates):
            router.update(visit(router, x_BSD).ledger, 0)
        ((_, value, _),) = visit(router, x_BSD).routed.losses
        (gradient,) = torch.autograd.grad(value, router.scorer.weight)
        return value.detach(), gradient

    value, gradient = after("global", 1)
    assert float(gradient.abs().max()) > 1e-3
    for scope in ("micro_batch", "sequence") if rows == 1 else ("micro_batch",):
        expected_value, expected = after(scope, 0)
        torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    _, fresh = after("global", 0)
    assert not torch.allclose(gradient, fresh, rtol=1e-2)


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
@pytest.mark.parametrize("scope", SCOPES)
def test_device_loss(num_groups: int, scope: Scope) -> None:
    """Oracle of its own: 1 at balance for any grouping, above 1 where one device is overloaded (but
    for a single one), and `sum_d mean_{i in d}(N c_i/(K T)) sum_{i in d} P_i` in between."""
    pool, loss = pool_of(("ffn", 8)), DeviceLoss(num_groups=num_groups, scope=scope)

    def value(probs_TN: Tensor, ids_TK: Tensor) -> float:
        last_step = remembered(probs_TN, ids_TK)
        return float(loss.value(observation(probs_TN, ids_TK, pool, 1, last_step)))

    even_TN = normal(16, 8).softmax(dim=1)
    assert value(even_TN, in_turns(16, 2, 8)) == pytest.approx(1, abs=1e-6)
    tilted_TN = (normal(16, 8) + torch.tensor([3.0] + [0.0] * 7)).softmax(dim=1)
    tilted = value(tilted_TN, tilted_TN.topk(2).indices)
    assert tilted == pytest.approx(1) if num_groups == 1 else tilted > 1.05
    probs_TN, ids_TK = random_choice(16, 8, 2)
    counts, probs = naive_load(probs_TN, ids_TK)
    size, naive = 8 // num_groups, 0.0
    for first in range(0, 8, size):
        mean_f = sum(8 * c / 2 for c in counts[first : first + size]) / size
        naive += mean_f * sum(probs[first : first + size])
    assert value(probs_TN, ids_TK) == pytest.approx(naive, rel=1e-6)


def test_z_loss_is_the_mean_squared_logsumexp_of_present_tokens() -> None:
    """Oracle of its own: raw logits, whatever the temperature; empty slots do not count."""
    router = make_router(
        pool_of(("ffn", 4)), losses=[{"kind": "z"}], norm={"temperature": 0.5, "noise": 1.0}
    )
    x_BSD = 3 * normal(2, 5, 4)
    valid_BS = torch.tensor([[True] * 5, [True, True, False, False, False]])
    tokens = token_context(2, 5, valid_BS=valid_BS)
    with torch.no_grad():
        routed, _ = visit(router, x_BSD, tokens, training=True)
    ((name, value, coefficient),) = routed.losses
    squares = [
        math.log(sum(math.exp(logit) for logit in logits)) ** 2
        for logits in x_BSD[valid_BS].tolist()
    ]
    assert (name, coefficient) == ("z", 1e-3)
    assert float(value) == pytest.approx(sum(squares) / 7, rel=1e-12)
    assert isinstance(router.config.losses[0], ZLoss)


def test_entropy_loss_is_the_mean_entropy_of_present_tokens() -> None:
    """Oracle of its own: shannon in nats, its sign that of the coefficient; empty slots do not
    count. Descending a negative one flattens the router, a positive one sharpens it."""
    x_BSD = 2 * normal(2, 5, 4)
    valid_BS = torch.tensor([[True] * 5, [True, True, False, False, False]])
    tokens = token_context(2, 5, valid_BS=valid_BS)
    naive = sum(
        -sum(p * math.log(p) for p in probs) for probs in x_BSD.softmax(dim=-1)[valid_BS].tolist()
    )
    for coefficient in (0.5, -0.5):
        loss = {"kind": "entropy", "coefficient": coefficient}
        router = make_router(pool_of(("ffn", 4)), losses=[loss])
        x_BSD = x_BSD.detach().requires_grad_()
        routed, _ = visit(router, x_BSD, tokens, training=True)
        ((name, value, unit),) = routed.losses
        assert (name, unit) == ("entropy", coefficient)
        assert float(value) == pytest.approx(naive / 7, rel=1e-12)
        (slope,) = torch.autograd.grad(unit * value, x_BSD)
        moved, _ = visit(router, x_BSD - 0.1 * slope, tokens, training=True)
        assert (float(moved.losses[0][1]) < float(value)) == (coefficient > 0)
        assert not slope[~valid_BS].any()

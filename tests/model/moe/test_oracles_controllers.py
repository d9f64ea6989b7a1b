"""Oracles of controllers: what they do to given counts, and where they take a router."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.config import ModelConfig
from moebius.model.ledger import Ledger
from moebius.model.moe.controllers import (
    BiasControl,
    BudgetControl,
    TargetKControl,
    histogram_percentile,
    score_histogram,
)
from moebius.model.moe.router import Router
from moebius.model.moe.selectors import TopK, TopP
from moebius.model.rules import router_rules
from tests.model.moe.rig import (
    make_router,
    normal,
    pool_of,
    visit,
)


def counts(*numbers: float) -> dict[str, Tensor]:
    """Statistics of a step."""
    counts_N = torch.tensor(numbers, dtype=torch.float32)
    return {"expert_tokens": counts_N, "tokens": counts_N.sum() / 2}


def only_controller(router: Router) -> Any:
    """The one controller of a router."""
    (controller,) = router.controllers
    return controller


@pytest.mark.parametrize("centered", [False, True])
def test_bias_drifts_by_rate_on_unbalanced_experts_only(centered: bool) -> None:
    """Oracle 14: with constant counts `rate` per step, up where the load is below the mean, down
    where above, nothing where equal; centred keeps the sum 0."""
    control = BiasControl(rate=1e-3, centered=centered).build(pool_of(("ffn", 5)), TopK(), 1)
    for step in range(10):
        control.update(0, counts(14, 8, 2, 6, 10), step)
    expected_N = 0.01 * torch.tensor([-1.0, 0, 1, 1, -1])
    torch.testing.assert_close(control.steer(0).bias_N, expected_N, rtol=1e-5, atol=1e-9)

    for step in range(10, 20):
        control.update(0, counts(20, 8, 2, 5, 5), step)
    change_N = 0.01 * torch.tensor([-1.0, 0, 1, 1, 1])
    expected_N = expected_N + (change_N - 0.004 if centered else change_N)
    torch.testing.assert_close(control.steer(0).bias_N, expected_N, rtol=1e-5, atol=1e-9)
    assert float(control.steer(0).bias_N.sum()) == pytest.approx(0 if centered else 0.02, abs=1e-6)


def test_bias_rate_has_a_schedule() -> None:
    """Oracle 14: the step of the bias follows the schedule, to 0 where that ends (DeepSeek-V3)."""
    config = BiasControl.model_validate({"rate": [[0, 1e-3], [10, 1e-3], [20, 0.0]]})
    control = config.build(pool_of(("ffn", 2)), TopK(), 1)
    expected = 0.0
    for step in range(40):
        control.update(0, counts(3, 1), step)
        expected += 1e-3 * (1 if step <= 10 else max(0, (20 - step) / 10))
        assert control.steer(0).bias_N.tolist() == pytest.approx([-expected, expected], rel=1e-4)


def test_bias_of_computing_experts_only() -> None:
    """Oracle 14: with `computing` zero-computation experts are neither counted nor moved."""
    pool = pool_of(("ffn", 2), ("copy", 1), ("zero", 1))
    control = BiasControl(rate=0.5, experts="computing").build(pool, TopK(), 1)
    control.update(0, counts(6, 4, 90, 0), 1)
    assert control.steer(0).bias_N.tolist() == [-0.5, 0.5, 0, 0]


def test_bias_selects_and_never_weighs() -> None:
    """Oracle 14: the choice is by score plus bias, the weight is the score."""
    router = make_router(pool_of(("ffn", 4)), controllers=[{"kind": "bias"}], losses=[])
    only_controller(router).bias_UN[0] = torch.tensor([-9.0, 0.0, 0.0, 2.0])
    x_BSD = normal(1, 30, 4)
    routing = visit(router, x_BSD).routed.routing
    probs_TN = x_BSD[0].softmax(dim=1)
    expected_TK = (probs_TN + torch.tensor([-9.0, 0.0, 0.0, 2.0])).topk(2).indices
    assert torch.equal(routing.ids_TK, expected_TK)
    assert set(routing.ids_TK[:, 0].tolist()) == {3}
    torch.testing.assert_close(routing.weights_TK, probs_TN.gather(1, expected_TK))


def test_state_is_kept_for_each_depth() -> None:
    """Oracle 14: a router visited at several depths has a bias and a remembered load for each,
    moved by the counts of that depth; they are saved, and loaded into another router they do the
    same."""
    options: dict[str, Any] = {
        "controllers": [{"kind": "bias", "rate": 0.25}],
        "losses": [{"kind": "switch"}],
        "selector": {"kind": "top_k", "top_k": 1},
    }
    pool = pool_of(("ffn", 3))
    router = make_router(pool, depths=2, **options)
    to_first = torch.tensor([3.0, 0, 0], dtype=torch.float64).expand(1, 6, 3)
    to_last = torch.tensor([0, 0, 3.0], dtype=torch.float64).expand(1, 9, 3)
    ledger = Ledger()
    visit(router, to_first, depth=1, ledger=ledger)
    visit(router, to_last, depth=2, ledger=ledger)
    router.update(ledger, 0)
    bias_UN = only_controller(router).bias_UN
    assert bias_UN.tolist() == [[-0.25, 0.25, 0.25], [0.25, 0.25, -0.25]]
    assert router.last_counts_UN.tolist() == [[6, 0, 0], [0, 0, 9]]
    assert router.last_probs_UN.sum(dim=1).tolist() == pytest.approx([6, 9])

    other = make_router(pool, depths=2, **options)
    other.load_state_dict(router.state_dict())
    bias_UN[1, 2] = only_controller(other).bias_UN[1, 2] = 9.0
    for restored in (router, other):
        assert set(visit(restored, to_first, depth=1).ids_TK.flatten().tolist()) == {0}
        assert set(visit(restored, to_first, depth=2).ids_TK.flatten().tolist()) == {2}


def steps(router: Router, num_steps: int, spread: Tensor, tokens: int = 512) -> list[list[float]]:
    """Train nothing, but let controllers move; the counts of each step's fresh random tokens."""
    history = []
    for step in range(num_steps):
        x_BSD = normal(2, tokens // 2, len(spread), seed=step) + spread
        seen = visit(router, x_BSD.to(torch.float32), step=step, training=True)
        router.update(seen.ledger, step)
        history.append(seen.sums("expert_tokens").tolist())
    return history


def test_bias_balances_a_skewed_router() -> None:
    """Oracle 14: the largest load falls from several times the mean to near it."""
    control = {"kind": "bias", "rate": 0.01}
    router = make_router(pool_of(("ffn", 8)), dtype=torch.float32, controllers=[control], losses=[])
    history = torch.tensor(steps(router, 120, torch.linspace(0, 3, 8)))
    assert float(history[0].max() / history[0].mean()) > 2.5
    late_N = history[-40:].mean(dim=0)
    assert float(late_N.max() / late_N.mean()) < 1.1


@pytest.mark.parametrize(("group", "share"), [(0, 0.3), (0, 0.8), (1, 0.5), (2, 0.1)])
def test_budget_reaches_its_share(group: int, share: float) -> None:
    """Oracle of its own: the share of a group of experts of all assignments becomes the budget; the
    experts of a group get one bias, others none."""
    pool = pool_of(("ffn", 3), ("constant", 2), ("zero", 1))
    control = BudgetControl(group=group, share=share)
    router = make_router(pool, dtype=torch.float32, controllers=[control.model_dump()], losses=[])
    history = torch.tensor(steps(router, 200, torch.zeros(6)))
    first = (0, 3, 5)[group]
    members = slice(first, first + (3, 2, 1)[group])
    late = history[-50:]
    assert float(late[:, members].sum() / late.sum()) == pytest.approx(share, abs=0.02)
    assert abs(float(history[0, members].sum() / history[0].sum()) - share) > 0.03
    bias_N = only_controller(router).steer(0).bias_N
    assert len(set(bias_N[members].tolist())) == 1
    assert set(bias_N.tolist()) - {bias_N[members][0].item()} == {0.0}


@pytest.mark.parametrize("target", [1.2, 3.0, 6.0])
def test_target_k_reaches_its_mean(target: float) -> None:
    """Oracle of its own: top-p under the PI controller (DTop-p) comes to the target mean K, while K
    varies between tokens."""
    router = make_router(
        pool_of(("ffn", 16)),
        dtype=torch.float32,
        selector={"kind": "top_p", "max_threshold": 0.95},
        controllers=[{"kind": "target_k", "target": target}],
        losses=[],
    )
    history = torch.tensor(steps(router, 200, 1.5 * normal(16, seed=77)))
    means = history.sum(dim=1) / 512
    assert float(means[-50:].mean()) == pytest.approx(target, rel=0.03)
    assert abs(float(means[0]) - target) > 0.3
    late = visit(router, normal(1, 512, 16).float()).counts_T
    assert len(late.unique()) >= 3


def test_target_k_follows_its_formula() -> None:
    """Oracle of its own: `theta -= k_p e + k_i sum(e)`, e the mean K less the target, in 0..1."""
    config = TargetKControl(target=2.0, start=0.5, proportional=0.02, integral=0.005)
    control = config.build(pool_of(("ffn", 4)), TopP(threshold=0.3, max_threshold=0.55), 1)
    theta, error_sum = 0.5, 0.0
    for step, mean_k in enumerate([3.0, 2.5, 1.0, 1.0, 2.0, 4.0]):
        control.update(
            0, {"expert_tokens": torch.full((4,), mean_k * 2.5), "tokens": torch.tensor(10)}, step
        )
        error_sum += mean_k - 2
        theta = min(theta - 0.02 * (mean_k - 2) - 0.005 * error_sum, 0.55)
        assert float(control.steer(0).threshold) == pytest.approx(theta, rel=1e-5)
    for step in range(100):
        control.update(0, counts(100, 100, 100, 100), step)
    assert float(control.steer(0).threshold) == 0
    for step in range(100):
        control.update(0, {"expert_tokens": torch.ones(4), "tokens": torch.tensor(10)}, step)
    assert float(control.steer(0).threshold) == pytest.approx(0.55), "not above what has an effect"


def test_controllers_do_not_wind_up() -> None:
    """Oracle of its own: after a thousand steps at a target out of reach, the bias of `budget` is
    still of the size of scores, and the way back is short."""
    control = BudgetControl(group=0, share=0.9).build(pool_of(("ffn", 1), ("zero", 1)), TopK(), 1)
    for step in range(1000):
        control.update(0, counts(0, 10), step)
    assert 1.0 <= float(control.steer(0).bias_N[0]) <= 1.2
    for step in range(60):
        control.update(0, counts(10, 0), step)
    assert float(control.steer(0).bias_N[0]) < 0.8


@pytest.mark.parametrize(
    ("num_experts", "percentile"), [(8, 0.5), (16, 0.75), (16, 0.9), (32, 0.7)]
)
def test_a_percentile_of_all_scores_lets_k_vary(num_experts: int, percentile: float) -> None:
    """Oracle 6: with a bar at a percentile of the whole batch K differs between tokens, is 1 or
    more and on average `(1 - tau) N`; a second step's bar is the moving average."""
    router = make_router(
        pool_of(("ffn", num_experts)),
        dtype=torch.float32,
        selector={"kind": "threshold"},
        controllers=[{"kind": "percentile_ema", "percentile": percentile}],
        losses=[],
    )
    x_BSD = (0.3 + 0.7 * torch.rand(1, 2000, 1, generator=torch.Generator())) * 2
    x_BSD = x_BSD * normal(1, 2000, num_experts).float()
    first = visit(router, x_BSD)
    assert set(first.counts_T.tolist()) == {1}, "before the first update: the best expert only"
    router.update(first.ledger, 0)
    probs_TN = x_BSD[0].softmax(dim=1)
    bar = float(torch.quantile(probs_TN.flatten(), percentile))
    got = only_controller(router).steer(0).threshold
    assert float(got) == pytest.approx(bar, rel=0.015)

    seen = visit(router, x_BSD)
    above = [sum(p > float(got) for p in probs) for probs in probs_TN.tolist()]
    naive = [max(1, k) for k in above]
    assert seen.counts_T.tolist() == naive
    assert len(set(naive)) >= 4
    expected = (1 - percentile) * num_experts
    assert sum(above) / len(above) == pytest.approx(expected, rel=0.02)
    assert sum(naive) / len(naive) == pytest.approx(expected, rel=0.05)
    statistic = seen.sums("k_histogram")
    assert statistic.tolist() == [naive.count(k) for k in range(num_experts + 1)]

    sharper = visit(router, 3 * x_BSD)
    router.update(sharper.ledger, 1)
    other = float(torch.quantile((3 * x_BSD[0]).softmax(dim=1).flatten(), percentile))
    got = only_controller(router).steer(0).threshold
    assert float(got) == pytest.approx(0.99 * bar + 0.01 * other, rel=0.015)


@pytest.mark.parametrize("percentile", [0.05, 0.5, 0.9, 0.99])
def test_percentiles_from_histograms(percentile: float) -> None:
    """Oracle 6: within the width of a bin, 1.1 %, of `torch.quantile`; empty slots do not count;
    histograms of parts add up to that of the whole."""
    scores_TN = normal(3000, 4).mul(2).softmax(dim=1).float()
    valid_T = torch.arange(3000) % 3 > 0
    whole = score_histogram(scores_TN, valid_T)
    halves = [score_histogram(scores_TN[i::2], valid_T[i::2]) for i in range(2)]
    assert torch.equal(whole, halves[0] + halves[1])
    assert whole.sum(dim=1).tolist() == [2000] * 4
    expected_N = torch.quantile(scores_TN[valid_T], percentile, dim=0)
    torch.testing.assert_close(
        histogram_percentile(whole, percentile), expected_N, rtol=0.015, atol=0
    )


def test_a_bar_per_expert_gives_experts_equal_numbers_of_tokens() -> None:
    """Oracle 6: with a bar at the percentile of each expert's own scores (Expert Threshold routing)
    a skewed router's experts get `(1 - tau) T` tokens each; a token below all bars falls back on
    its best expert."""
    router = make_router(
        pool_of(("ffn", 6)),
        dtype=torch.float32,
        selector={"kind": "threshold"},
        controllers=[{"kind": "percentile_ema", "percentile": 0.5, "per_expert": True}],
        losses=[],
    )
    x_BSD = normal(1, 1000, 6).float() + torch.linspace(0, 3, 6)
    router.update(visit(router, x_BSD).ledger, 0)
    bar_N = only_controller(router).steer(0).threshold
    probs_TN = x_BSD[0].softmax(dim=1)
    assert (probs_TN > bar_N).sum(dim=0).tolist() == pytest.approx([500] * 6, abs=10)
    ids_TK = visit(router, x_BSD).ids_TK
    for ids, probs in zip(ids_TK.tolist(), probs_TN, strict=True):
        above = (probs > bar_N).nonzero()[:, 0].tolist()
        assert {i for i in ids if i >= 0} == set(above or [int(probs.argmax())])


@pytest.mark.parametrize(
    ("selector", "control"),
    [("threshold", {"kind": "target_k", "target": 2.0}), ("top_p", {"kind": "percentile_ema"})],
)
def test_controllers_are_refused_where_they_steer_away(
    selector: str, control: dict[str, Any]
) -> None:
    """Oracle of its own: `target_k` lowers its threshold for fewer experts, which gives a bar more
    of them; `percentile_ema` knows bars, not shares. Both say for which selector they are."""
    tree = {
        "vocab_size": 8,
        "hidden_size": 8,
        "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8},
        "ffn": {
            "kind": "moe",
            "experts": [{"kind": "ffn", "count": 8, "intermediate_size": 8}],
            "router": {"selector": {"kind": selector}, "controllers": [control]},
        },
        "depth": {"num_layers": 1},
    }
    problems = list(router_rules(ModelConfig.model_validate(tree)))
    assert any(problem.path.startswith("ffn.router") for problem in problems)

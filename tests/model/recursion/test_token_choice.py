"""Token choice over depth: gates, balance by loss and by bias, statistics, against plain loops."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.program import Site
from moebius.trainer.metrics import depth_metrics
from tests.model.recursion.compare import assert_step_equals, balance
from tests.model.recursion.naive_model import NaiveModel
from tests.model.recursion.systems import COSINE, MLP, depth, documents, system, token

CHOICE = Site("depth.0.choice", 1)


@pytest.mark.parametrize("scope", ["sequence", "global", "micro_batch"])
@pytest.mark.parametrize("norm", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gating", ["last", "every"])
def test_gates_and_losses(gating: str, norm: str, scope: str) -> None:
    """Hidden states, losses and gradients of a first step."""
    router = token(gating=gating, norm={"kind": norm}, scope=scope, alpha=0.7)
    assert_step_equals(system(depth=depth(3, router=router)), documents(2, 9, share=0.3))


@pytest.mark.parametrize("scorer", [MLP, COSINE])
def test_scorers(scorer: dict[str, Any]) -> None:
    router = token(scorer=scorer, gating="every", alpha=0.5)
    assert_step_equals(system(depth=depth(2, 2, router=router)), documents(2, 9, share=0.3))


@pytest.mark.parametrize("gating", ["last", "every"])
@pytest.mark.parametrize("norm", ["softmax", "sigmoid"])
def test_full_depth_steps(gating: str, norm: str) -> None:
    """At first every token makes all passes, with the gate of the deepest choice; then it ends."""
    router = token(full_depth_steps=5, gating=gating, norm={"kind": norm})
    executor = system(depth=depth(3, router=router))
    batch = documents(2, 9, share=0.3)
    forced = assert_step_equals(executor, batch, step=4)
    assert [len(row) for row in forced.terms.selected["depth.0", 3]] == [9, 9]
    executor.decoder.zero_grad()
    free = assert_step_equals(executor, batch, step=5)
    assert 0 < sum(len(row) for row in free.terms.selected["depth.0", 3]) < 18


def ledger_of(executor: LocalExecutor, batch: TokenBatch, step: int = 0) -> Ledger:
    """What a step of training leaves behind."""
    return executor.accumulate_gradients(
        [batch], StepContext("topk", Ledger(), step, training=True)
    ).ledger


def chosen(executor: LocalExecutor, batch: TokenBatch) -> tuple[list[int], list[Tensor]]:
    """Of all tokens the number of passes and the probabilities, by the loop over tokens."""
    naive = NaiveModel(executor)
    with torch.no_grad():
        naive.hidden(batch)
    depths = [depth for row in naive.terms.chosen["depth.0"] for depth in row]
    return depths, [probs for row in naive.terms.probs["depth.0"] for probs in row]


def test_global_balance_uses_the_load_of_the_step_before() -> None:
    """N sum_j f_j P_j with f of one batch and P of the next."""
    executor = system(depth=depth(3, router=token(scope="global")))
    first, second = documents(2, 12), documents(2, 12, seed=9)
    before, _ = chosen(executor, first)
    executor.decoder.update_routers(ledger_of(executor, first), 0)
    _, probs = chosen(executor, second)
    loss = ledger_of(executor, second, step=1).losses["depth_switch"]
    means = [float(sum(p[j] for p in probs)) / 24 for j in range(3)]
    expected = 0.3 * 3 * sum(before.count(j + 1) / 24 * means[j] for j in range(3))
    assert float(loss) == pytest.approx(expected, rel=1e-7)
    balanced = 0.3 * float(balance("global", [probs], [before]))
    assert float(loss) != pytest.approx(balanced, rel=1e-3)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_the_balance_loss_of_each_scope(scope: str) -> None:
    """Of rows that choose differently the scopes give different numbers."""
    batch = documents(3, 12)
    executor = system(depth=depth(3, router=token(scope=scope)))
    depths, probs = chosen(executor, batch)
    cut = [slice(0, 12), slice(12, 24), slice(24, 36)]
    if scope == "micro_batch":
        cut = [slice(0, 36)]
    values = []
    for part in cut:
        number = part.stop - part.start
        shares = [depths[part].count(j + 1) / number for j in range(3)]
        means = [float(sum(p[j] for p in probs[part])) / number for j in range(3)]
        values.append(3 * sum(f * p for f, p in zip(shares, means, strict=True)))
    loss = float(ledger_of(executor, batch).losses["depth_switch"])
    assert loss == pytest.approx(0.3 * sum(values) / len(values), rel=1e-6)
    other = "sequence" if scope == "micro_batch" else "micro_batch"
    changed = system(depth=depth(3, router=token(scope=other)))
    assert abs(float(ledger_of(changed, batch).losses["depth_switch"]) - loss) > 1e-3


def test_the_z_loss_is_the_mean_squared_logsumexp() -> None:
    executor = system(depth=depth(3, router=token()))
    batch = documents(2, 12)
    inputs: list[Tensor] = []
    router = executor.decoder.depth_routers[0].router
    router.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    loss = ledger_of(executor, batch).losses["depth_z"]
    squares = []
    for x in inputs[0].flatten(0, 1):
        scores = (router.scorer.weight @ x).detach()
        squares.append(float(scores.exp().sum().log() ** 2))
    assert float(loss) == pytest.approx(0.05 * sum(squares) / 24, rel=1e-10)


@pytest.mark.parametrize("rate", [0.02, [[0, 0.05], [2, 0.01]]])
def test_bias_moves_by_the_sign_of_the_error(rate: Any) -> None:
    """b_j += rate * sign(mean - n_j) after each step, from counts of the whole step; no loss."""
    control = {"kind": "bias", "rate": rate}
    executor = system(depth=depth(3, router=token(control, losses=[])))
    batch = documents(3, 12)
    bias = [0.0, 0.0, 0.0]
    name = "depth_routers.0.router.controllers.0.bias_UN"
    for step in range(6):
        depths, _ = chosen(executor, batch)
        counts = [depths.count(j + 1) for j in range(3)]
        rates = [0.05, 0.03, 0.01, 0.01, 0.01, 0.01] if isinstance(rate, list) else [0.02] * 6
        for j, count in enumerate(counts):
            bias[j] += rates[step] * ((count < 12) - (count > 12))
        ledger = ledger_of(executor, batch, step)
        assert not ledger.losses
        assert ledger.statistics[CHOICE]["expert_tokens"].tolist() == counts
        executor.decoder.update_routers(ledger, step)
        moved = executor.decoder.state_dict()[name].flatten().tolist()
        assert moved == pytest.approx(bias, abs=1e-7)
    assert any(bias)


def test_the_bias_chooses_and_does_not_weight() -> None:
    """A bias that decides for all tokens: they leave with the gate of that depth, without it."""
    executor = system(depth=depth(3, router=token({"kind": "bias"}, losses=[], alpha=0.5)))
    name = "depth_routers.0.router.controllers.0.bias_UN"
    executor.decoder.state_dict()[name].copy_(torch.tensor([[0.0, 9.0, 0.0]]))
    batch = documents(2, 9)
    naive = assert_step_equals(executor, batch)
    assert naive.terms.chosen["depth.0"] == [[2] * 9] * 2
    forced = system(depth=depth(3, router=token({"kind": "bias"}, losses=[], alpha=0.5)))
    forced.decoder.state_dict()[name].copy_(torch.tensor([[0.0, 99.0, 0.0]]))
    with torch.no_grad():
        hidden = [e.hidden(batch, StepContext("topk", Ledger())) for e in (executor, forced)]
    assert torch.equal(hidden[0], hidden[1])


def test_biases_balance_the_load() -> None:
    """From a state in which all tokens take one depth the controller spreads them."""
    executor = system(depth=depth(3, router=token({"kind": "bias", "rate": 0.03}, losses=[])))
    name = "depth_routers.0.router.controllers.0.bias_UN"
    executor.decoder.state_dict()[name].copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    batch = documents(4, 16)
    violations = []
    for step in range(60):
        with torch.no_grad():
            ledger = Ledger()
            executor.hidden(batch, StepContext("topk", ledger, step))
        violations.append(depth_metrics(ledger)["depth/max_violation"])
        executor.decoder.update_routers(ledger, step)
    assert violations[0] == pytest.approx(2)
    assert sum(violations[-10:]) / 10 < 0.3


def test_metrics_of_choices() -> None:
    """Mean passes, busiest over mean less 1, and entropy of the shares in nats, over all loops."""
    executor = system(depth=depth(3, 1, groups=2, router=token()))
    batch = documents(2, 12)
    naive, ledger = NaiveModel(executor), Ledger()
    with torch.no_grad():
        naive.hidden(batch)
        executor.hidden(batch, StepContext("topk", ledger))
    depths = [d for loop in ("depth.0", "depth.1") for row in naive.terms.chosen[loop] for d in row]
    assert len(depths) == 48
    counts = [depths.count(j) for j in (1, 2, 3)]
    metrics = depth_metrics(ledger)
    assert metrics["depth/mean_passes"] == pytest.approx(sum(depths) / 48, rel=1e-6)
    assert metrics["depth/max_violation"] == pytest.approx(max(counts) / 16 - 1, rel=1e-5)
    entropy = -sum(n / 48 * log(n / 48) for n in counts if n)
    assert metrics["depth/choice_entropy"] == pytest.approx(entropy, rel=1e-5)
    for loop in (0, 1):
        rows = [naive.terms.selected[f"depth.{loop}", r] for r in (1, 2, 3)]
        sizes = [sum(len(row) for row in of_pass) for of_pass in rows]
        for r in (1, 2, 3):
            share = sizes[r - 1] / (sizes[r - 2] if r > 1 else 24)
            assert metrics[f"depth/selected_share_{loop}.{r}"] == pytest.approx(share, rel=1e-6)
            dead = sum(not any(t in row for row in rows[r - 1]) for t in range(12))
            assert metrics[f"depth/dead_share_{loop}.{r}"] == pytest.approx(dead / 12, rel=1e-6)


@pytest.mark.parametrize("counts", [(24, 0, 0), (8, 8, 8), (0, 6, 18)])
def test_metrics_of_extreme_choices(counts: tuple[int, int, int]) -> None:
    """All alike: no entropy and N_r - 1 of violation; even: ln 3, which is the most, and 0."""
    ledger = Ledger()
    ledger.record(CHOICE, expert_tokens=torch.tensor([float(n) for n in counts]))
    for r in (1, 2, 3):
        entered = torch.tensor(sum(counts[r - 1 :]))
        ledger.record(
            Site("depth.0", r), selected=entered, candidates=torch.tensor(24), places=torch.ones(4)
        )
    metrics = depth_metrics(ledger)
    passes = sum((j + 1) * n for j, n in enumerate(counts)) / 24
    assert metrics["depth/mean_passes"] == pytest.approx(passes, rel=1e-6)
    assert metrics["depth/max_violation"] == pytest.approx(max(counts) / 8 - 1, abs=1e-6)
    entropy = -sum(n / 24 * log(n / 24) for n in counts if n)
    assert metrics["depth/choice_entropy"] == pytest.approx(entropy, abs=1e-6)

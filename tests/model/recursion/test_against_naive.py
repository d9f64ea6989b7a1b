"""Hidden states, losses and all gradients of every system against loops over tokens, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.context import Mode, StepContext
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.moe.losses import SwitchLoss, ZLoss
from moebius.model.objective import drawn_exits
from moebius.model.recursion.config import CausalRouter, ExpertChoiceConfig, TokenChoiceConfig
from tests.model.recursion.naive_model import NaiveModel
from tests.model.recursion.systems import (
    ATTENTION,
    BIAS,
    MIXTURE,
    SYSTEMS,
    deep,
    depth,
    documents,
    expert,
    system,
    token,
)

STEP, SEED = 20, 7


def pool(**router: Any) -> dict[str, Any]:
    """SwiGLU experts without losses."""
    experts = [{"kind": "ffn", "count": 3, "intermediate_size": 6}]
    return {"kind": "moe", "experts": experts, "router": {"losses": []} | router}


def residual(kind: str) -> dict[str, Any]:
    """A scorer that adds those of an earlier router."""
    return {"kind": "linear", "gating_residual": kind}


QUIET_MIXTURE = MIXTURE | {"router": {"losses": []}}
BY_HAND = [name for name in SYSTEMS if not name.startswith(("moe", "mixture")) and name != "dora"]
CASES: dict[str, dict[str, Any]] = {name: SYSTEMS[name] for name in BY_HAND} | {
    "token every sigmoid": {
        "depth": depth(
            kv="hybrid", router=token(BIAS, gating="every", norm={"kind": "sigmoid"}, alpha=0.3)
        )
    },
    "document hybrid": {"depth": depth(kv="hybrid", router=expert(scope="document"))},
    "document shared_first": {"depth": depth(kv="shared_first", router=expert(scope="document"))},
    "hybrid one head": {
        "attention": ATTENTION | {"num_kv_heads": 1},
        "depth": depth(kv="hybrid", router=expert(capacities=[0.6, 0.6, 0.2])),
    },
    "dora dense": {
        "depth": depth(2, 2, kv="hybrid", adapter={"kind": "dora", "rank": 2, "scale": 2.0})
    },
    "window document": {
        "attention": deep("window"),
        "depth": depth(3, router=expert(scope="document")),
    },
    "recursions token": {"attention": deep("recursions"), "depth": depth(3, router=token())},
    "mixture expert": {
        "attention": QUIET_MIXTURE,
        "depth": depth(kv="shared_first", router=expert()),
    },
    "mixture token": {
        "attention": QUIET_MIXTURE,
        "depth": depth(2, 2, kv="hybrid", router=token()),
    },
    "mixture document": {
        "attention": QUIET_MIXTURE,
        "depth": depth(router=expert(scope="document")),
    },
    "prev_layer": {
        "ffn": pool(scorer=residual("prev_layer")),
        "depth": depth(2, 2, router=expert()),
    },
    "prev_depth": {
        "ffn": pool(scorer=residual("prev_depth"), per_depth=True),
        "depth": depth(3, 2, router=expert()),
    },
    "prev_depth token": {
        "ffn": pool(scorer=residual("prev_depth")),
        "depth": depth(3, router=token()),
    },
    "prev_layer per depth": {
        "ffn": pool(scorer=residual("prev_layer"), per_depth=True),
        "depth": depth(3, 2, router=token()),
    },
    "prev_layer groups": {
        "ffn": pool(scorer=residual("prev_layer"), per_depth=True),
        "depth": depth(2, 1, groups=2, router=expert(scope="document")),
    },
}


def steered(executor: LocalExecutor) -> LocalExecutor:
    """The same with biases of token choice that change some choices."""
    generator = torch.Generator().manual_seed(3)
    for name, buffer in executor.decoder.named_buffers():
        if name.endswith("bias_UN"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return executor


def depth_losses(naive: NaiveModel, batch: TokenBatch) -> dict[str, Tensor]:
    """The losses of the depth routers, times their coefficients, by name."""
    router, terms = naive.config.depth.router, naive.terms
    every_token = batch.tokens_BS.numel()
    losses: dict[str, Tensor] = {}

    def book(name: str, value: Tensor) -> None:
        losses[name] = losses[name] + value if name in losses else value

    for (kind, loop, number), value in terms.sums.items():
        count = terms.counts[kind, loop, number]
        if isinstance(router, TokenChoiceConfig):
            (z_loss,) = (loss for loss in router.losses if isinstance(loss, ZLoss))
            book("depth_z", z_loss.coefficient * value / count)
            continue
        assert isinstance(router, ExpertChoiceConfig)
        count = count if router.scope == "row" else every_token
        if kind == "z":
            book("depth_z", router.z_coefficient * value / count)
        elif isinstance(router.causal, CausalRouter):
            book("depth_predictor", value / count)
        else:
            book("depth", router.causal.coefficient * value / count)
    if isinstance(router, TokenChoiceConfig):
        (switch,) = (loss for loss in router.losses if isinstance(loss, SwitchLoss))
        for loop, rows in terms.probs.items():
            value = balance(switch.scope, rows, terms.chosen[loop])
            book("depth_switch", switch.coefficient * value)
    return losses


def balance(scope: str, rows: list[list[Tensor]], chosen: list[list[int]]) -> Tensor:
    """N sum_j f_j P_j of each row, averaged; before the first step the load counts as balanced."""
    values = []
    for probs, depths in zip(rows, chosen, strict=True):
        value = torch.zeros((), dtype=torch.float64)
        for j in range(len(probs[0])):
            mean = sum(p[j] for p in probs) / len(probs)
            share = depths.count(j + 1) / len(depths)
            value = value + len(probs[0]) * mean * (share if scope == "sequence" else 1 / 3)
        values.append(value)
    if scope == "global":
        return torch.stack(values).mean() * 3 / len(rows[0][0])
    return torch.stack(values).mean()


def cross_entropy(hidden: list[list[Tensor]], batch: TokenBatch, head: Tensor) -> Tensor:
    """Mean over labels, in nats."""
    terms = []
    for row, labels in zip(hidden, batch.labels_BS.tolist(), strict=True):
        for h, label in zip(row, labels, strict=True):
            logits = head @ h
            terms.append(logits.exp().sum().log() - logits[label])
    return torch.stack(terms).mean()


def divergence(last: list[list[Tensor]], early: list[list[Tensor]], head: Tensor) -> Tensor:
    """Mean over tokens of KL(last || early), of which the last learns nothing."""
    terms = []
    for last_row, early_row in zip(last, early, strict=True):
        for a, b in zip(last_row, early_row, strict=True):
            p = ((head @ a).exp() / (head @ a).exp().sum()).detach()
            q = (head @ b).exp() / (head @ b).exp().sum()
            terms.append((p * (p.log() - q.log())).sum())
    return torch.stack(terms).mean()


def objective(
    naive: NaiveModel, hidden: dict[int, list[list[Tensor]]], batch: TokenBatch
) -> dict[str, Tensor]:
    """All that is differentiated, by name, weighted."""
    head = naive.w.get("head.weight", naive.w["embedding.weight"])
    config, last = naive.config.exits, len(naive.program.visits)
    if config is None:
        return {"loss": cross_entropy(hidden[last], batch, head)}
    if config.draw != "all":
        step = StepContext("topk", Ledger(), STEP, SEED, training=True)
        (drawn,) = drawn_exits(config, naive.program, step)
        return {"loss": cross_entropy(hidden[drawn], batch, head)}
    scale = 1.0
    if config.normalize:
        scale = 1 / (1 + config.coefficient * len(config.after))
    total = scale * cross_entropy(hidden[last], batch, head)
    for number in config.after:
        weight = scale * config.coefficient
        total = total + weight * cross_entropy(hidden[number], batch, head)
        taught = divergence(hidden[last], hidden[number], head)
        total = total + weight * config.self_distillation * taught
    return {"loss": total}


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_losses_and_gradients(name: str) -> None:
    """Of a step of training, in the middle of schedules."""
    executor = steered(system(**CASES[name]))
    batch = documents(rows=2, length=10, share=0.2)
    naive = NaiveModel(executor, step=STEP)
    hidden = naive.hidden(batch)
    step = StepContext("topk", Ledger(), STEP, SEED, training=True)
    with torch.no_grad():
        exits = executor.program.exits
        got = executor.exit_hiddens(batch, StepContext("topk", Ledger(), STEP, SEED), exits)
    for number in exits:
        expected = torch.stack([torch.stack(row) for row in hidden[number]])
        torch.testing.assert_close(got[number], expected.detach(), rtol=0, atol=1e-9)

    result = executor.accumulate_gradients([batch], step)
    losses = depth_losses(naive, batch)
    assert set(result.ledger.losses) == set(losses)
    for key, value in losses.items():
        torch.testing.assert_close(result.ledger.losses[key], value.detach(), rtol=1e-7, atol=0)
    total = sum((losses | objective(naive, hidden, batch)).values())
    # The load in the balance loss is counted in fp32.
    atol = 1e-7 if "depth_switch" in losses else 1e-10
    names = list(naive.w)
    gradients = torch.autograd.grad(total, [naive.w[n] for n in names], allow_unused=True)
    for parameter, gradient in zip(names, gradients, strict=True):
        found = naive.w[parameter].grad
        found = torch.zeros_like(naive.w[parameter]) if found is None else found
        gradient = torch.zeros_like(found) if gradient is None else gradient
        torch.testing.assert_close(
            found, gradient, rtol=1e-7, atol=atol, msg=lambda text, p=parameter: f"{p}: {text}"
        )


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["depth"].get("router")])
def test_selections_and_statistics(name: str) -> None:
    """Who made each pass, who could have, and the gates, as the ledger counts them."""
    mode: Mode
    for mode in ("topk", "threshold"):
        executor = steered(system(**CASES[name]))
        batch, ledger = documents(rows=2, length=10, share=0.2), Ledger()
        naive = NaiveModel(executor, mode, STEP)
        with torch.no_grad():
            hidden = naive.hidden(batch)[len(naive.program.visits)]
            got = executor.hidden(batch, StepContext(mode, ledger, STEP))
        expected = torch.stack([torch.stack(row) for row in hidden])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        depths = [s for s in ledger.statistics if s.module.startswith("depth.")]
        sites = {
            (s.module, s.depth): ledger.statistics[s] for s in depths if "choice" not in str(s)
        }
        assert set(sites) == set(naive.terms.selected)
        for (loop, number), rows in naive.terms.selected.items():
            sums = sites[loop, number]
            assert int(sums["selected"]) == sum(len(row) for row in rows)
            before = naive.terms.selected.get((loop, number - 1), [list(range(10))] * 2)
            assert int(sums["candidates"]) == sum(len(row) for row in before)
            places = [sum(t in row for row in rows) for t in range(10)]
            assert sums["places"].tolist() == places
            if "gates" in sums:
                assert float(sums["gates"]) == pytest.approx(naive.terms.gates[loop, number])

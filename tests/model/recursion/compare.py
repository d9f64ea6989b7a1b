"""An executor's step of training against the naive model's."""

import torch
from torch import Tensor

from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.moe.losses import SwitchLoss, ZLoss
from moebius.model.objective import drawn_exits
from moebius.model.recursion.config import CausalRouter, ExpertChoiceConfig, TokenChoiceConfig
from tests.model.recursion.naive_model import NaiveModel


def assert_step_equals(
    executor: LocalExecutor, batch: TokenBatch, step: int = 0, seed: int = 0
) -> NaiveModel:
    """Hidden states at all exits, losses by name, and the gradients of all parameters."""
    naive = NaiveModel(executor, step=step)
    hidden = naive.hidden(batch)
    exits = executor.program.exits
    with torch.no_grad():
        got = executor.exit_hiddens(
            batch, executor.tokens(batch), StepContext("topk", Ledger(), step, seed), exits
        )
    for number in exits:
        expected = torch.stack([torch.stack(row) for row in hidden[number]])
        torch.testing.assert_close(got[number], expected.detach(), rtol=0, atol=1e-9)

    context = StepContext("topk", Ledger(), step, seed, training=True)
    result = executor.accumulate_gradients([batch], context)
    losses = depth_losses(naive, batch) | width_losses(naive, batch)
    assert set(result.ledger.losses) == set(losses)
    for key, value in losses.items():
        torch.testing.assert_close(result.ledger.losses[key], value.detach(), rtol=1e-7, atol=0)
    total = objective(naive, hidden, batch, seed) + sum(losses.values())
    # The load in the balance loss and the part of the tokens that are present are fp32.
    atol = 1e-7 if {"depth_switch", "z"} & set(losses) else 1e-10
    names = list(naive.w)
    gradients = torch.autograd.grad(total, [naive.w[n] for n in names], allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        found = naive.w[name].grad
        found = torch.zeros_like(naive.w[name]) if found is None else found
        gradient = torch.zeros_like(found) if gradient is None else gradient
        torch.testing.assert_close(
            found, gradient, rtol=1e-7, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    return naive


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
            for loss in router.losses:
                if isinstance(loss, ZLoss):
                    book("depth_z", loss.coefficient * value / count)
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
        for switch in (loss for loss in router.losses if isinstance(loss, SwitchLoss)):
            for loop, rows in terms.probs.items():
                value = balance(switch.scope, rows, terms.chosen[loop])
                book("depth_switch", switch.coefficient * value)
    return losses


def balance(scope: str, rows: list[list[Tensor]], chosen: list[list[int]]) -> Tensor:
    """N sum_j f_j P_j over the groups of a scope, averaged; before the first step the load of the
    step before counts as balanced."""
    if scope == "micro_batch":
        rows = [[probs for row in rows for probs in row]]
        chosen = [[depth for row in chosen for depth in row]]
    values = []
    for probs, depths in zip(rows, chosen, strict=True):
        number = len(probs[0])
        value = torch.zeros((), dtype=torch.float64)
        for j in range(number):
            share = 1 / number if scope == "global" else depths.count(j + 1) / len(depths)
            value = value + number * share * sum(p[j] for p in probs) / len(probs)
        values.append(value)
    return torch.stack(values).mean()


def width_losses(naive: NaiveModel, batch: TokenBatch) -> dict[str, Tensor]:
    """The z losses of the routers over width: means over the tokens of a visit, or sums divided by
    how many the schedule foresees where the data decides how many there are."""
    router = naive.config.depth.router
    by_data = isinstance(router, TokenChoiceConfig) or (
        isinstance(router, ExpertChoiceConfig) and router.scope == "document"
    )
    losses: dict[str, Tensor] = {}
    if not naive.layers.squares:
        return losses
    (z_loss,) = naive.config.ffn.router.losses or (None,)
    for (layer, number), squares in naive.layers.squares.items():
        passes = [v for v in naive.program.visits if v.layer == layer]
        count: float = len(squares)
        if by_data and len(passes) > 1:
            share = (len(passes) - number + 1) / len(passes)
            if isinstance(router, ExpertChoiceConfig):
                share = naive.share(router, number - 1, len(passes))
            count = share * batch.tokens_BS.numel()
        if z_loss is not None:
            value = z_loss.coefficient * torch.stack(squares).sum() / count
            losses["z"] = losses["z"] + value if "z" in losses else value
    return losses


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
    naive: NaiveModel, hidden: dict[int, list[list[Tensor]]], batch: TokenBatch, seed: int
) -> Tensor:
    """What is differentiated of the heads."""
    head = naive.w.get("head.weight", naive.w["embedding.weight"])
    config, last = naive.config.exits, len(naive.program.visits)
    if config is None:
        return cross_entropy(hidden[last], batch, head)
    if config.draw != "all":
        step = StepContext("topk", Ledger(), naive.step, seed, training=True)
        (drawn,) = drawn_exits(config, naive.program, step)
        return cross_entropy(hidden[drawn], batch, head)
    scale = 1.0
    if config.normalize:
        scale = 1 / (1 + config.coefficient * len(config.after))
    total = scale * cross_entropy(hidden[last], batch, head)
    for number in config.after:
        weight = scale * config.coefficient
        total = total + weight * cross_entropy(hidden[number], batch, head)
        taught = divergence(hidden[last], hidden[number], head)
        total = total + weight * config.self_distillation * taught
    return total

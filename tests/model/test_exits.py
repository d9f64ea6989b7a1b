"""Early exits: what is trained, what runs, and what is drawn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.objective import TeacherModel, drawn_exits
from tests.model.helpers import build, hidden, random_batch
from tests.model.recursion.conftest import one_thread

__all__ = ["one_thread"]

DENSE = {"kind": "dense", "intermediate_size": 48}
LOOP = {"num_layers": 8, "sharing": "middle_cycle", "num_recursions": 3}
DEPTHS: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 8},
    "recursive": LOOP,
    "routed": LOOP | {"router": {"causal": {"coefficient": 0.0}}},
}
TRAINING = StepContext("topk", Ledger(), training=True)


def model(exits: dict[str, Any] | None, depth: str = "dense", seed: int = 0) -> LocalExecutor:
    executor = build(torch.float64, seed, ffn=DENSE, depth=DEPTHS[depth], exits=exits)
    with torch.no_grad():
        for parameter in executor.decoder.parameters():
            parameter *= 3
    return executor


def at_exit(executor: LocalExecutor, batch: TokenBatch, number: int) -> Tensor:
    """Logits of the model cut off there: the program itself ends, no tap is involved."""
    cut = LocalExecutor(executor.decoder, program=executor.decoder.program.until(number))
    return cut.decoder.logits(hidden(cut, batch)).flatten(0, 1)


def gradients(executor: LocalExecutor) -> dict[str, Tensor]:
    found = {
        name: p.grad.clone()
        for name, p in executor.decoder.named_parameters()
        if p.grad is not None
    }
    executor.decoder.zero_grad()
    return found


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    "options",
    [
        {"coefficient": 0.3},
        {"coefficient": 1.0, "normalize": True},
        {"coefficient": 0.3, "self_distillation": 0.7},
        {"coefficient": 0.5, "normalize": True, "self_distillation": 2.0},
    ],
)
def test_the_loss_is_the_naive_sum_over_exits(options: dict[str, Any], depth: str) -> None:
    """Exits after 3, 5 and 8 layers; losses by name, and all gradients."""
    executor = model({"after": [3, 5]} | options, depth)
    batch = random_batch(2, 10)
    result = executor.accumulate_gradients([batch], TRAINING)
    got = gradients(executor)

    labels_T, count = batch.labels_BS.flatten(), batch.labels_BS.numel()
    logits = {number: at_exit(executor, batch, number) for number in (3, 5, 8)}
    weights = {3: options["coefficient"], 5: options["coefficient"], 8: 1.0}
    scale = sum(weights.values()) if options.get("normalize") else 1.0
    total = torch.zeros((), dtype=torch.float64)
    for number, logits_TV in logits.items():
        loss = F.cross_entropy(logits_TV, labels_T)
        name = "loss" if number == 8 else f"exit_{number}_loss"
        torch.testing.assert_close(result.losses[name], loss.detach(), rtol=0, atol=1e-10)
        if number != 8:
            last_TV = logits[8].detach().softmax(dim=-1)
            divergence = F.kl_div(logits_TV.log_softmax(-1), last_TV, reduction="sum") / count
            loss = loss + options.get("self_distillation", 0.0) * divergence
        total = total + weights[number] / scale * loss
    assert set(result.losses) == {"loss", "exit_3_loss", "exit_5_loss"}
    total.backward()
    wanted = gradients(executor)
    assert wanted.keys() <= got.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-10)


def test_an_exit_is_the_same_whether_the_rest_runs() -> None:
    """Also where shares follow from the number of passes of the whole loop."""
    for depth in DEPTHS:
        executor = model(None, depth)
        batch = random_batch(2, 12)
        for mode in ("topk", "threshold"):
            context, tokens = StepContext(mode, Ledger()), executor.tokens(batch)
            for number in (3, 5):
                alone = executor.exit_hiddens(batch, tokens, context, (number,))
                fresh = replace(context, ledger=Ledger())
                among = executor.exit_hiddens(batch, tokens, fresh, (number, 8))
                assert torch.equal(alone[number], among[number])


@pytest.mark.parametrize("draw", ["step", "micro_batch"])
def test_one_exit_is_drawn_and_nothing_runs_behind_it(draw: str) -> None:
    executor = model({"after": [3, 5], "draw": draw})
    batches = [random_batch(1, 6, seed=number) for number in range(3)]
    for step in range(4):
        context = replace(TRAINING, step=step, seed=5)
        exits = [
            drawn_exits(
                executor.decoder.config.exits, executor.program, replace(context, micro_batch=n)
            )
            for n in range(3)
        ]
        assert draw == "micro_batch" or len(set(exits)) == 1
        result = executor.accumulate_gradients(batches, context)
        assert len(result.ledger.work.visits) == max(number for (number,) in exits)
        assert result.ledger.work.head_tokens == 18
        got = gradients(executor)
        naive = sum(
            F.cross_entropy(at_exit(executor, batch, number), batch.labels_BS.flatten()) / 3
            for batch, (number,) in zip(batches, exits, strict=True)
        )
        assert isinstance(naive, Tensor)
        torch.testing.assert_close(result.loss, naive.detach(), rtol=0, atol=1e-10)
        naive.backward()
        wanted = gradients(executor)
        assert got.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-10)


def test_draws_are_uniform_and_functions_of_seed_step_and_micro_batch() -> None:
    executor = model({"after": [3, 5], "draw": "micro_batch"})
    config, program = executor.decoder.config.exits, executor.program
    drawn = [
        drawn_exits(config, program, replace(TRAINING, step=step, micro_batch=n))[0]
        for step in range(400)
        for n in range(3)
    ]
    again = drawn_exits(config, program, replace(TRAINING, step=399, micro_batch=2))[0]
    assert drawn[-1] == again
    for number in (3, 5, 8):
        assert 0.28 < drawn.count(number) / len(drawn) < 0.39
    other = [drawn_exits(config, program, replace(TRAINING, step=s, seed=1))[0] for s in range(400)]
    assert other != drawn[::3]


def test_a_teacher_adds_its_divergence_at_the_last_exit() -> None:
    """Temperature 2, coefficient 0.7; the teacher learns nothing."""
    executor = model({"after": [3], "coefficient": 0.3})
    teacher = TeacherModel(model(None, "recursive", seed=4), 0.7, 2.0)
    batch = random_batch(2, 10)
    result = executor.accumulate_gradients([batch], TRAINING, teacher)
    got = gradients(executor)
    assert not gradients(teacher.executor)
    labels_T, count = batch.labels_BS.flatten(), batch.labels_BS.numel()
    last = at_exit(executor, batch, 8)
    taught = at_exit(teacher.executor, batch, 8).detach()
    divergence = 4 * F.kl_div((last / 2).log_softmax(-1), (taught / 2).softmax(-1), reduction="sum")
    torch.testing.assert_close(
        result.losses["distillation_loss"], divergence.detach() / count, rtol=0, atol=1e-10
    )
    early = F.cross_entropy(at_exit(executor, batch, 3), labels_T)
    (F.cross_entropy(last, labels_T) + 0.7 * divergence / count + 0.3 * early).backward()
    for name, grad in gradients(executor).items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-10)

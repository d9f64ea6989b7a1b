"""From logits to scores: scale, temperature, noise."""

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from moebius.model.context import StepContext, TokenContext
from moebius.model.ledger import Ledger
from moebius.model.moe.norms import ScoreNorm, Sigmoid, Softmax
from moebius.model.moe.registry import AnyNorm
from moebius.model.moe.routing import RouteContext
from moebius.model.program import Site

ROWS, LENGTH, EXPERTS = 2, 4, 6
SITE = Site("layers.1.ffn", 1)
TOKENS = ROWS * LENGTH


def token_context(samples: list[int], length: int) -> TokenContext:
    """Full rows of one document each."""
    segments = torch.zeros(len(samples), length, dtype=torch.int64)
    rope = torch.zeros(len(samples), length, 2)
    return TokenContext.of_rows(segments, rope, rope, torch.tensor(samples))


def context(
    training: bool = True,
    step: int = 3,
    seed: int = 5,
    site: Site = SITE,
    tokens: TokenContext | None = None,
    use: int = 0,
) -> RouteContext:
    if tokens is None:
        tokens = token_context([10, 11], LENGTH)
    state = StepContext("topk", Ledger(), step=step, seed=seed, training=training)
    return RouteContext(site, use, tokens, state)


def logits(num_tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> Tensor:
    """With another mean and another spread in every row."""
    values = torch.randn(num_tokens, EXPERTS, generator=torch.Generator().manual_seed(0))
    spread = torch.linspace(0.2, 5, num_tokens).unsqueeze(1)
    return (values * spread + spread - 2).to(dtype)


def seen_logits(norm: ScoreNorm, logits_TN: Tensor, ctx: RouteContext) -> Tensor:
    """What a sigmoid norm has made of the logits before the sigmoid."""
    assert norm.kind == "sigmoid"
    return torch.logit(norm.affinity(logits_TN, ctx))


def test_softmax_and_sigmoid_of_plain_logits() -> None:
    """The defaults change nothing before the function."""
    x = logits()
    exponentials = [[math.exp(value) for value in row] for row in x.tolist()]
    softmax = torch.tensor([[e / sum(row) for e in row] for row in exponentials]).double()
    sigmoid = torch.tensor([[e / (1 + e) for e in row] for row in exponentials]).double()
    for norm, expected in ((Softmax(), softmax), (Sigmoid(), sigmoid)):
        got = norm.affinity(x, context())
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", [1.0, 0.5, 3.0])
def test_row_std_sets_the_unbiased_deviation_and_keeps_the_mean(target: float) -> None:
    """Every row divided by its own deviation with N - 1, nothing subtracted (MoE++ release)."""
    x = logits()
    got = seen_logits(Sigmoid(row_std=target), x, context())
    for before, after in zip(x.tolist(), got.tolist(), strict=True):
        mean = sum(before) / EXPERTS
        std = math.sqrt(sum((value - mean) ** 2 for value in before) / (EXPERTS - 1))
        assert after == pytest.approx([target * value / std for value in before], rel=1e-6)
    torch.testing.assert_close(got.std(dim=-1), torch.full((TOKENS,), target).double())
    assert (got.mean(dim=-1).abs() > 1e-3).all()


def test_row_std_forgets_the_scale_of_a_row_and_keeps_its_gradient() -> None:
    """Scores do not change with the logits' scale, so the gradient along the row is 0."""
    norm = Softmax(row_std=1.0)
    x = logits().requires_grad_()
    got = norm.affinity(x, context())
    torch.testing.assert_close(norm.affinity(7 * x, context()), got)
    (grad,) = torch.autograd.grad(got[:, 0].sum(), x)
    assert (grad.abs().sum(dim=-1) > 1e-6).all()
    torch.testing.assert_close(
        (grad * x).sum(dim=-1), torch.zeros(TOKENS).double(), rtol=0, atol=1e-9
    )
    assert torch.autograd.gradcheck(lambda y: norm.affinity(y, context()), [x])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1000.0])
def test_equal_logits_are_finite_forward_and_backward(kind: str, value: float) -> None:
    """A deviation of 0 divides nothing by 0, and its root has no infinite gradient."""
    norm = TypeAdapter(AnyNorm).validate_python({"kind": kind, "row_std": 1.0})
    x = torch.full((TOKENS, EXPERTS), value, requires_grad=True)
    got = norm.affinity(x, context())
    assert got.isfinite().all()
    assert (got == got[:, :1]).all()
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad((got * direction).sum(), x)
    assert grad.isfinite().all()


def test_row_std_leaves_a_single_expert_alone() -> None:
    """One number has no deviation."""
    x = torch.tensor([[0.3], [-2.0]], requires_grad=True)
    got = Sigmoid(row_std=1.0).affinity(x, context())
    torch.testing.assert_close(got, x.sigmoid())
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    """After their deviation was set, so that it is not undone by it."""
    x = logits()
    plain = Softmax(temperature=temperature).affinity(x, context())
    torch.testing.assert_close(plain, (x / temperature).softmax(dim=-1))
    norm = Sigmoid(temperature=temperature, row_std=1.0)
    std = seen_logits(norm, x, context()).std(dim=-1)
    torch.testing.assert_close(std, torch.full((TOKENS,), 1 / temperature).double())


@pytest.mark.parametrize("size", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_probabilities_add_up_to_1(kind: str, size: float) -> None:
    """Sigmoid values divided by their sum; those of a softmax are left as they are."""
    norm = TypeAdapter(AnyNorm).validate_python({"kind": kind})
    x = logits(dtype=torch.float32) * size
    x[:, 0] = 0.0
    x.requires_grad_()
    affinity = norm.affinity(x, context())
    probs = norm.probabilities(affinity)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(TOKENS))
    if kind == "softmax":
        assert torch.equal(probs, affinity)
    else:
        for row, shares in zip(affinity.tolist(), probs.tolist(), strict=True):
            assert shares == pytest.approx([value / sum(row) for value in row], rel=1e-5)
    (grad,) = torch.autograd.grad(probs[:, 0].sum(), x)
    assert grad.isfinite().all()


def test_probabilities_of_vanishing_sigmoids_are_finite() -> None:
    """All values underflow to 0: no 0 / 0, forward or backward."""
    x = torch.full((3, EXPERTS), -500.0, requires_grad=True)
    norm = Sigmoid()
    probs = norm.probabilities(norm.affinity(x, context()))
    (grad,) = torch.autograd.grad(probs.sum(), x)
    assert probs.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_noise_is_for_training_only(kind: str) -> None:
    noisy = TypeAdapter(AnyNorm).validate_python({"kind": kind, "noise": 0.5})
    clean = TypeAdapter(AnyNorm).validate_python({"kind": kind})
    x = logits()
    evaluated = noisy.affinity(x, context(training=False))
    assert torch.equal(evaluated, clean.affinity(x, context(training=False)))
    assert torch.equal(evaluated, clean.affinity(x, context(training=True)))
    assert not torch.isclose(evaluated, noisy.affinity(x, context(training=True))).any(dim=1).all()


def test_noise_is_gaussian_of_the_given_deviation_and_comes_last() -> None:
    """Independent over tokens and experts, and not scaled by row_std or temperature."""
    tokens = token_context(list(range(64)), 512)
    x = logits(64 * 512)
    clean = Sigmoid(row_std=1.0, temperature=2.0)
    noisy = clean.model_copy(update={"noise": 0.25})
    noise = seen_logits(noisy, x, context(tokens=tokens)) - seen_logits(
        clean, x, context(tokens=tokens)
    )
    number = noise.numel()
    assert float(noise.mean()) == pytest.approx(0, abs=5 * 0.25 / math.sqrt(number))
    assert float(noise.std()) == pytest.approx(0.25, abs=5 * 0.25 / math.sqrt(2 * number))
    kurtosis = ((noise / noise.std()) ** 4).mean()
    assert float(kurtosis) == pytest.approx(3, abs=5 * math.sqrt(24 / number))
    correlation = torch.corrcoef(noise.T) - torch.eye(EXPERTS)
    assert float(correlation.abs().max()) < 5 / math.sqrt(len(noise))


def test_noise_is_a_function_of_seed_step_site_and_token() -> None:
    """The same four give the same noise; another of any one gives other noise to every token."""
    norm = Sigmoid(noise=1.0)
    x = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    base = norm.affinity(x, context())
    assert torch.equal(norm.affinity(x, context()), base)
    assert torch.equal(norm.affinity(x, context(use=1)), base)
    others = {
        "seed": context(seed=6),
        "step": context(step=4),
        "module": context(site=Site("layers.2.ffn", 1)),
        "sublayer": context(site=Site("layers.1.attention", 1)),
        "depth": context(site=Site("layers.1.ffn", 2)),
        "iteration": context(site=Site("layers.1.ffn", 1, 2)),
        "sample": context(tokens=token_context([12, 13], LENGTH)),
    }
    results = [base, *(norm.affinity(x, other) for other in others.values())]
    for i, one in enumerate(results):
        for another in results[:i]:
            assert not torch.isclose(one, another, rtol=1e-4).all(dim=1).any()
    assert len(base.unique(dim=0)) == TOKENS


def test_noise_does_not_depend_on_which_tokens_come_together() -> None:
    """Rows alone, in another order, cut shorter or without some tokens: each keeps its noise."""
    norm = Softmax(noise=1.0)
    x = logits()
    whole = norm.affinity(x, context()).view(ROWS, LENGTH, EXPERTS)
    x = x.view(ROWS, LENGTH, EXPERTS)

    alone = norm.affinity(x[1], context(tokens=token_context([11], LENGTH)))
    assert torch.equal(alone, whole[1])

    swapped = norm.affinity(
        x.flip(0).flatten(0, 1), context(tokens=token_context([11, 10], LENGTH))
    )
    assert torch.equal(swapped.view_as(whole), whole.flip(0))

    short = norm.affinity(x[:, :2].flatten(0, 1), context(tokens=token_context([10, 11], 2)))
    assert torch.equal(short.view(ROWS, 2, EXPERTS), whole[:, :2])

    index = torch.tensor([[0, 2, 3], [1, 3, -1]])
    taken = token_context([10, 11], LENGTH).take(index)
    rows = torch.stack([x[b, index[b].clamp(min=0)] for b in range(ROWS)])
    got = norm.affinity(rows.flatten(0, 1), context(tokens=taken)).view_as(rows)
    for b, slot in taken.valid_BS.nonzero().tolist() if taken.valid_BS is not None else []:
        assert torch.equal(got[b, slot], whole[b, index[b, slot]])


def test_noise_follows_its_schedule() -> None:
    """At step 4 half of what it is at step 0, from step 8 on none at all."""
    scheduled = Sigmoid.model_validate({"noise": [[0, 1.0], [8, 0.0]]})
    x = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    for step, amount in ((0, 1.0), (4, 0.5), (6, 0.25), (8, 0.0), (100, 0.0)):
        constant = Sigmoid(noise=amount)
        ctx = context(step=step)
        assert torch.equal(scheduled.affinity(x, ctx), constant.affinity(x, ctx))
        assert bool((scheduled.affinity(x, ctx) != 0.5).any()) == (amount > 0)


def test_noise_passes_gradients_on() -> None:
    """It is a constant of the step: the gradient is that of the function at the noisy place."""
    norm = Sigmoid(noise=1.0)
    x = logits().requires_grad_()
    got = norm.affinity(x, context())
    (grad,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(grad, (got * (1 - got)).detach())

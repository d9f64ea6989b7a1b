"""Scores, choice and statistics of a router against loops in Python."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebius.kernels.route import RouteRule, route

BARS = (0.05, 0.125, 0.37, 0.5, 0.81, 1.0, 1.5, -0.1)
"""shares and bars; 0.5 is a score of sigmoid, -0.1 is below everything"""
OPEN = (0.0, -0.25, 0.5, 0.125)
"""biases; some scores become negative"""


@dataclass(frozen=True)
class Case:
    """Arguments of `route` in fp64, with many equal scores."""

    rule: RouteRule
    logits: Tensor
    bias: Tensor | None
    threshold: float | Tensor | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any rule for 0 to 5 tokens and 1 to 9 experts, some of them closed."""
    tokens, experts = draw(st.integers(0, 5)), draw(st.integers(1, 9))

    def numbers(values: tuple[float, ...], count: int) -> Tensor:
        drawn = draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.float64)

    select = draw(st.sampled_from(["top_k", "top_p", "threshold"]))
    rule = RouteRule(
        activation=draw(st.sampled_from(["softmax", "sigmoid"])),
        select=select,
        max_k=draw(st.integers(0, 10)),
        crossing=draw(st.sampled_from(["include", "exclude"])),
        min_k=draw(st.integers(0, 3)),
    )
    bias = numbers((*OPEN, -math.inf), experts) if draw(st.booleans()) else None
    threshold: float | Tensor | None = None
    if select != "top_k":
        counts = {"one": 1} | ({"each": experts} if select == "threshold" else {})
        kind = draw(st.sampled_from(["number", *counts]))
        threshold = draw(st.sampled_from(BARS))
        if kind in counts:
            threshold = numbers(BARS, counts[kind])
    logits = numbers((-2.0, -0.5, 0.0, 0.5, 1.0, 30.0), tokens * experts).view(tokens, experts)
    return Case(rule, logits, bias, threshold)


def scores_of(logits: list[float], activation: str) -> list[float]:
    """By definition."""
    if activation == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def pick(select: list[float], rule: RouteRule, bars: list[float]) -> list[int]:
    """The chosen experts of one token, best first, with -1 up to the cap."""
    order = sorted(range(len(select)), key=lambda i: (-select[i], i))
    kept = order
    if rule.select == "threshold":
        kept = [i for i in order if select[i] > bars[i % len(bars)]] or order[:1]
    if rule.select == "top_p":
        mass = [max(select[i], 0) for i in order]
        seen = [sum(mass[: r + (rule.crossing == "exclude")]) for r in range(len(order))]
        # A sum of nothing is within every share; without any mass nothing else is.
        shares = [s / sum(mass) if sum(mass) else math.nan for s in seen]
        shares = [0.0, *shares[1:]] if rule.crossing == "include" else shares
        within = [s <= bars[0] or (bars[0] >= 1 and not math.isnan(s)) for s in shares]
        kept = [
            i
            for r, i in enumerate(order)
            if (within[r] or r < rule.min_k) and select[i] != -math.inf
        ]
    columns = min(rule.max_k, len(select))
    return (kept + [-1] * columns)[:columns]


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_route_by_definition(case: Case) -> None:
    """Every selector and activation, with ties, closed experts and tokens that choose nobody."""
    got = route(case.logits, case.rule, case.bias, case.threshold)
    tokens, experts = case.logits.shape
    bias = [0.0] * experts if case.bias is None else case.bias.tolist()
    bars = case.threshold.tolist() if isinstance(case.threshold, Tensor) else [case.threshold]
    assert got.ids_TK.shape == (tokens, min(case.rule.max_k, experts))
    assert got.ids_TK.dtype == torch.int64
    for t, logits in enumerate(case.logits.tolist()):
        scores = scores_of(logits, case.rule.activation)
        assert got.affinity_TN[t].tolist() == pytest.approx(scores, rel=1e-12)
        select = [a + b for a, b in zip(got.affinity_TN[t].tolist(), bias, strict=True)]
        assert got.ids_TK[t].tolist() == pick(select, case.rule, bars)
        logsumexp = math.log(sum(math.exp(x) for x in logits))
        assert got.logsumexp_T[t].item() == pytest.approx(logsumexp, rel=1e-12, abs=1e-12)
        probs = [s / sum(scores) for s in scores]
        entropy = -sum(p * math.log(p) for p in probs) / math.log(max(experts, 2))
        assert got.entropy_T[t].item() == pytest.approx(entropy, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_entropy_of_equal_scores_is_1_and_of_one_expert_0(activation: str) -> None:
    rule = RouteRule(activation, "top_k", 1)  # type: ignore[arg-type]
    assert route(torch.full((3, 7), 2.5), rule).entropy_T.tolist() == pytest.approx([1.0] * 3)
    assert route(torch.full((3, 1), 2.5), rule).entropy_T.tolist() == [0.0] * 3


def test_statistics_of_far_logits_are_finite() -> None:
    """Where exponentials overflow, and where all scores but one, or all, are 0."""
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [-1000.0, -1000.0, -1001.0]])
    for activation in ("softmax", "sigmoid"):
        got = route(logits, RouteRule(activation, "top_k", 2))  # type: ignore[arg-type]
        assert got.logsumexp_T.tolist() == pytest.approx([1000.0, -1000 + math.log(2 + 1 / math.e)])
        assert got.entropy_T.isfinite().all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_only_scores_are_differentiated(activation: str) -> None:
    """They by their derivative, with or without a bias; the statistics not at all."""
    rule = RouteRule(activation, "top_k", 2)  # type: ignore[arg-type]
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: route(x, rule, bias).affinity_TN, (logits,))
    got = route(logits, rule, bias)
    assert not got.logsumexp_T.requires_grad
    assert not got.entropy_T.requires_grad


def test_half_precision_is_scored_in_single() -> None:
    """In bf16 both scores were 1, and the lower id would win."""
    logits = torch.tensor([[8.0, 8.0625]]).bfloat16().requires_grad_()
    got = route(logits, RouteRule("sigmoid", "top_k", 1))
    assert got.affinity_TN.dtype == got.logsumexp_T.dtype == got.entropy_T.dtype == torch.float32
    assert got.ids_TK.tolist() == [[1]]
    got.affinity_TN.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_a_threshold_that_is_missing_or_of_no_use_is_refused() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="selector top_p needs a threshold"):
        route(logits, RouteRule("softmax", "top_p", 2))
    with pytest.raises(ValueError, match=r"selector top_k takes no threshold, got 0\.5"):
        route(logits, RouteRule("softmax", "top_k", 2), threshold=0.5)

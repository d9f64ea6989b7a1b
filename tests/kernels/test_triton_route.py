"""Routing in Triton against its definition in torch."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from moebius.kernels import route as definition
from moebius.kernels.route import Picked, RouteRule
from moebius.kernels.triton import route as kernels
from tests.kernels.test_route import Case, cases

device = "cuda" if torch.cuda.is_available() else "cpu"


def moved(case: Case, dtype: torch.dtype) -> Case:
    """Logits in a dtype, the rest in fp32 or fp64, where the kernels run."""
    exact = torch.promote_types(dtype, torch.float32)
    bias, threshold = case.bias, case.threshold
    if isinstance(threshold, Tensor):
        threshold = threshold.to(device, exact)
    return Case(
        case.rule,
        case.logits.to(device, dtype),
        None if bias is None else bias.to(device, exact),
        threshold,
    )


def assert_equal_routes(case: Case) -> None:
    """All outputs and the gradient of the logits; ids exactly."""
    (ours, theirs) = (case.logits.clone().requires_grad_() for _ in range(2))
    got = kernels.route(ours, case.rule, case.bias, case.threshold)
    expected = definition.route(theirs, case.rule, case.bias, case.threshold)
    for field in fields(Picked):
        mine, reference = getattr(got, field.name), getattr(expected, field.name)
        assert mine.dtype == reference.dtype, field.name
        assert mine.requires_grad == reference.requires_grad, field.name
        # An entropy near 0 is a difference of terms near 1.
        torch.testing.assert_close(mine, reference, rtol=2e-6, atol=1e-6, msg=field.name)
    assert torch.equal(got.ids_TK, expected.ids_TK)
    direction = torch.randn_like(expected.affinity_TN)
    got.affinity_TN.backward(direction)
    expected.affinity_TN.backward(direction)
    assert ours.grad is not None
    assert theirs.grad is not None
    rounding = 2**-7 if case.logits.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rounding, atol=1e-6)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_route_by_definition(case: Case, dtype: torch.dtype) -> None:
    """Every selector and activation, with ties, closed experts and tokens that choose nobody."""
    assert_equal_routes(moved(case, dtype))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("select", ["top_k", "top_p", "threshold"])
def test_many_tokens_and_experts(activation: str, select: str) -> None:
    """Several programs and random logits, of a tensor that is not contiguous."""
    torch.manual_seed(0)
    rule = RouteRule(activation, select, 13)  # type: ignore[arg-type]
    logits = torch.randn(67, 200, device=device).t()
    threshold = {"top_p": 0.37, "threshold": torch.rand(67, device=device)}.get(select)
    assert_equal_routes(Case(rule, logits, torch.randn(67, device=device) / 50, threshold))


def test_all_closed_choose_nobody_of_a_share() -> None:
    bias = torch.full((3,), -torch.inf, device=device)
    rule = RouteRule("softmax", "top_p", 2)
    got = kernels.route(torch.randn(4, 3, device=device), rule, bias, 0.5)
    assert got.ids_TK.tolist() == [[-1, -1]] * 4


def test_far_logits() -> None:
    """Where exponentials overflow, and where all scores are 0."""
    logits = [[1000.0, 0.0, -1000.0], [-1000.0, -1000.0, -1001.0], [0.0, -torch.inf, 1.0]]
    for activation in ("softmax", "sigmoid"):
        rule = RouteRule(activation, "top_k", 2)  # type: ignore[arg-type]
        assert_equal_routes(Case(rule, torch.tensor(logits, device=device), None, None))


def test_logits_that_are_no_numbers_choose_valid_experts() -> None:
    """A run that has diverged stops by its loss, not by an id that does not exist."""
    logits = torch.full((2, 5), torch.nan, device=device)
    for select, threshold in (("top_k", None), ("top_p", 0.5), ("threshold", 0.5)):
        rule = RouteRule("softmax", select, 3)  # type: ignore[arg-type]
        got = kernels.route(logits, rule, None, threshold).ids_TK
        assert got.tolist() == definition.route(logits, rule, None, threshold).ids_TK.tolist()


def test_a_bar_for_each_token() -> None:
    """Not mistaken for one of each expert where there are as many."""
    logits, bars = torch.randn(4, 4, device=device), torch.rand(4, 1, device=device)
    assert_equal_routes(Case(RouteRule("softmax", "threshold", 3), logits, None, bars))


def test_a_threshold_that_is_missing_or_of_no_use_is_refused() -> None:
    with pytest.raises(ValueError, match="selector top_p needs a threshold"):
        kernels.route(torch.zeros(2, 3, device=device), RouteRule("softmax", "top_p", 2))
    with pytest.raises(ValueError, match="selector top_k takes no threshold"):
        kernels.route(torch.zeros(2, 3, device=device), RouteRule("softmax", "top_k", 2), None, 0.5)

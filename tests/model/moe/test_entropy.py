"""Oracle 8: entropies of routing distributions against sums in Python."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from moebius.model.moe.entropy import Measure, entropy

MEASURES = get_args(Measure)
INDICES = [0.5, 0.9, 1.0, 1.1, 2.0, 5.0]


def in_python(row: list[float], measure: str, index: float) -> float:
    """The definition, without any constant for `0 log 0`."""
    present = [p for p in row if p > 0]
    if measure == "shannon" or index == 1:
        return -sum(p * math.log(p) for p in present)
    power = sum(p**index for p in present)
    return (1 - power) / (index - 1) if measure == "tsallis" else math.log(power) / (1 - index)


def rows(num_experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Some flat, some sharp distributions, one with a zero."""
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randn(12, num_experts, generator=generator, dtype=torch.float64)
    probs = (logits * torch.linspace(0.1, 6, 12, dtype=torch.float64).unsqueeze(1)).softmax(dim=-1)
    probs[0, 0] = 0.0
    return (probs / probs.sum(dim=-1, keepdim=True)).to(dtype)


def one_hot(num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.eye(num_experts, dtype=dtype)


def uniform(num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((2, num_experts), 1 / num_experts, dtype=dtype)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("num_experts", [2, 5, 64])
def test_equals_the_definition(measure: Measure, index: float, num_experts: int) -> None:
    """In nats; normalised, divided by the definition's value for equal probabilities."""
    probs = rows(num_experts)
    expected = [in_python(row, measure, index) for row in probs.tolist()]
    got = entropy(probs, measure, index, normalized=False)
    assert got.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    largest = in_python([1 / num_experts] * num_experts, measure, index)
    normalized = entropy(probs, measure, index, normalized=True)
    assert normalized.tolist() == pytest.approx([e / largest for e in expected], rel=1e-9, abs=1e-9)
    assert (normalized < 1).all()
    single = entropy(probs.float(), measure, index, normalized=True)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), normalized, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_is_0_for_one_expert_and_1_for_equal_probabilities(
    measure: Measure, index: float, num_experts: int
) -> None:
    """Oracle 8."""
    certain = entropy(one_hot(num_experts), measure, index, normalized=True)
    assert certain.tolist() == pytest.approx([0.0] * num_experts, abs=1e-6)
    undecided = entropy(uniform(num_experts), measure, index, normalized=True)
    assert undecided.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("measure", ["tsallis", "renyi"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("distance", [1e-2, -1e-2, 1e-5, -1e-5])
def test_tends_to_shannon_as_the_index_goes_to_1(
    measure: Measure, normalized: bool, distance: float
) -> None:
    """Oracle 8: from both sides, and at 1 itself; normalised, to `-sum p log p / log N`."""
    probs = rows(7)
    shannon = -torch.special.xlogy(probs, probs).sum(dim=-1)
    expected = shannon / math.log(7) if normalized else shannon
    near = entropy(probs, measure, 1 + distance, normalized)
    torch.testing.assert_close(near, expected, rtol=0, atol=3 * abs(distance))
    torch.testing.assert_close(entropy(probs, measure, 1.0, normalized), expected)


def test_shannon_is_minus_the_sum_of_p_log_p_whatever_the_index() -> None:
    """Oracle 8: not normalised, in nats."""
    probs = rows(9)
    expected = -torch.special.xlogy(probs, probs).sum(dim=-1)
    for index in (0.5, 1.0, 2.0):
        torch.testing.assert_close(entropy(probs, "shannon", index, normalized=False), expected)
    assert float(entropy(uniform(8), "shannon", 1.0, normalized=False)[0]) == pytest.approx(
        math.log(8)
    )


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_one_hot(
    measure: Measure, index: float, normalized: bool, dtype: torch.dtype
) -> None:
    """Oracle 8: of the probabilities, and of logits so far apart that the others underflow."""
    probs = one_hot(6, dtype).requires_grad_()
    (grad,) = torch.autograd.grad(entropy(probs, measure, index, normalized).sum(), probs)
    assert grad.isfinite().all()
    logits = (one_hot(6, dtype) * 2000).requires_grad_()
    values = entropy(logits.softmax(dim=-1), measure, index, normalized)
    (grad,) = torch.autograd.grad(values.sum(), logits)
    assert values.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("measure", MEASURES)
def test_gradient_is_that_of_the_definition(measure: Measure, index: float) -> None:
    """Against central differences of the sum in Python, moving probability between two experts."""
    probs = rows(4)[3:8].requires_grad_()
    (grad,) = torch.autograd.grad(entropy(probs, measure, index, False).sum(), probs)
    step = 1e-6
    for t, row in enumerate(probs.tolist()):
        for i in range(1, 4):
            up, down = list(row), list(row)
            up[i], up[0] = row[i] + step, row[0] - step
            down[i], down[0] = row[i] - step, row[0] + step
            slope = (in_python(up, measure, index) - in_python(down, measure, index)) / (2 * step)
            got = float(grad[t, i] - grad[t, 0])
            assert got == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("normalized", [True, False])
def test_a_single_expert_has_entropy_0(measure: Measure, normalized: bool) -> None:
    """Nothing to be undecided about, and no division by `log 1`."""
    assert entropy(torch.ones(3, 1), measure, 1.1, normalized).tolist() == [0.0] * 3


@pytest.mark.parametrize("index", [0.05, 25.0, 100.0])
@pytest.mark.parametrize("measure", ["tsallis", "renyi"])
def test_extreme_indices_stay_exact_and_finite_in_single_precision(
    measure: Measure, index: float
) -> None:
    """`p^q` underflows for large q, and for small q is large even for tiny p."""
    probs = torch.cat([uniform(64), one_hot(64)[:2]]).requires_grad_()
    values = entropy(probs, measure, index, normalized=True)
    assert values.tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-5)
    (grad,) = torch.autograd.grad(values.sum(), probs)
    assert grad.isfinite().all()


def test_indices_next_to_1_do_not_cancel_in_single_precision() -> None:
    """`(1 - sum p^q) / (q - 1)` loses all its digits there unless q counts as 1."""
    probs = rows(16, torch.float32)
    for measure in ("tsallis", "renyi"):
        for index in (1 + 1e-4, 1 - 1e-4, 1 + 1e-6, 1 + 1e-8):
            got = entropy(probs, measure, index, normalized=True)
            shannon = entropy(probs, "shannon", 1.0, normalized=True)
            torch.testing.assert_close(got, shannon, rtol=2e-3, atol=2e-3)

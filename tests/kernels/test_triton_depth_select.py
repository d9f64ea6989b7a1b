"""Choosing tokens and moving their rows: Triton and torch against loops in Python."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from moebius.kernels import depth_select as definition
from moebius.kernels.triton import depth_select as kernels

device = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("backend", [definition, kernels], ids=["torch", "triton"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
VALUES = (0.0, -0.0, 1.0, -1.0, 1.5, -1e-40, 3e38, -3e38, math.inf, -math.inf)
"""scores that make ties, of every sign and size"""
sizes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def best_positions(scores: list[float], k: int) -> list[int]:
    """By definition: the best first, then ascending, then empty slots."""
    order = sorted(range(len(scores)), key=lambda s: (-scores[s], s))
    best = sorted(s for s in order[:k] if scores[s] != -math.inf)
    return best + [-1] * (min(k, len(scores)) - len(best))


def some_index(batch: int, length: int, k: int) -> Tensor:
    """Ascending positions that differ; each row fills another number of its slots."""
    rows = []
    for _ in range(batch):
        used = int(torch.randint(0, min(k, length) + 1, ()))
        places = torch.randperm(length)[:used].sort().values
        rows.append(torch.cat([places, places.new_full((k - used,), -1)]))
    return torch.stack(rows).to(device)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


@BOTH
@given(
    st.lists(st.lists(st.sampled_from(VALUES), min_size=7, max_size=7), min_size=1, max_size=3),
    st.integers(0, 9),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_positions_of_the_best_scores(
    backend: ModuleType, scores: list[list[float]], k: int
) -> None:
    """With ties, infinities, fewer scores than slots and no slot at all."""
    got = backend.top_k_positions(torch.tensor(scores, device=device), k)
    assert got.dtype == torch.int64
    assert got.tolist() == [best_positions(row, k) for row in scores]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_positions_of_many_random_scores(backend: ModuleType, dtype: torch.dtype) -> None:
    """In bf16 many are equal; the columns of a transposed tensor are not contiguous."""
    scores = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    got = backend.top_k_positions(scores.to(device), 317)
    assert got.tolist() == [best_positions(row, 317) for row in scores.tolist()]


@BOTH
def test_a_score_that_is_no_number_is_chosen(backend: ModuleType) -> None:
    scores = torch.tensor([[1.0, math.nan, math.inf, -math.nan]], device=device)
    assert backend.top_k_positions(scores, 2).tolist() == [[1, 3]]


def test_rows_of_scores_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a row is longer than a block: ties and counts go on in the next one."""
    monkeypatch.setattr(kernels, "_score_blocks", lambda length: {"COUNT": 2, "BLOCK": 16})
    scores = torch.randint(-3, 3, (2, 30), generator=torch.Generator().manual_seed(1)).float()
    for k in (12, 29):
        got = kernels.top_k_positions(scores.to(device), k)
        assert got.tolist() == [best_positions(row, k) for row in scores.tolist()]


@given(sizes, st.integers(1, 40), dtypes, seeds)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_rows_are_taken(
    size: tuple[int, int, int], width: int, dtype: torch.dtype, seed: int
) -> None:
    """Bit for bit; what comes back to empty slots is dropped."""
    torch.manual_seed(seed)
    batch, length, k = size
    index = some_index(batch, length, k)
    (x,) = leaves(torch.randn(batch, width, length, device=device, dtype=dtype).transpose(1, 2))
    (same,) = leaves(x)
    got, expected = kernels.take_rows(x, index), definition.take_rows(same, index)
    assert torch.equal(got, expected)
    direction = torch.randn_like(got)
    got.backward(direction)
    expected.backward(direction.masked_fill((index < 0).unsqueeze(-1), 0))
    assert x.grad is not None
    assert same.grad is not None
    assert torch.equal(x.grad, same.grad)


@given(sizes, st.integers(1, 40), dtypes, dtypes, seeds)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_gated_rows_are_added(
    size: tuple[int, int, int],
    width: int,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    seed: int,
) -> None:
    """Result and gradients of all three as by definition; empty slots hold NaN, which goes nowhere
    in the kernel."""
    torch.manual_seed(seed)
    batch, length, k = size
    index = some_index(batch, length, k)
    x = torch.randn(batch, length, width, device=device, dtype=dtype)
    gate = torch.randn(batch, k, device=device, dtype=gate_dtype)
    rows = torch.randn(batch, k, width, device=device, dtype=dtype)
    ours, theirs = leaves(x, gate, rows), leaves(x, gate, rows)
    with torch.no_grad():
        ours[2].masked_fill_((index < 0).unsqueeze(-1), math.nan)
    got = kernels.add_gated_rows(ours[0], index, ours[1], ours[2])
    expected = definition.add_gated_rows(theirs[0], index, theirs[1], theirs[2])
    direction = torch.randn_like(got)
    got.backward(direction)
    expected.backward(direction)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[gate_dtype])
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(
            mine.grad, reference.grad, rtol=tolerance, atol=tolerance * width**0.5
        )


def test_rows_move_in_the_tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs over tokens, channels and entries, which the interpreter takes at once."""
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setattr(kernels, "ROW_CHANNELS", 16)
    monkeypatch.setattr(kernels, "ENTRIES", 4)
    torch.manual_seed(0)
    index = some_index(3, 7, 5)
    ours = leaves(*(torch.randn(*s, device=device) for s in ((3, 7, 40), (3, 5), (3, 5, 40))))
    theirs = leaves(*ours)
    for backend, (x, gate, rows) in ((kernels, ours), (definition, theirs)):
        taken = backend.take_rows(x, index).masked_fill((index < 0).unsqueeze(-1), 0)
        backend.add_gated_rows(x, index, gate, rows + taken).square().sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-5)


@BOTH
def test_gated_rows_by_hand(backend: ModuleType) -> None:
    """Two positions get something, one twice its row; the empty slot gives nothing."""
    x = torch.arange(8.0, device=device).view(1, 4, 2)
    index = torch.tensor([[1, 3, -1]], device=device)
    gate = torch.tensor([[2.0, -1.0, 5.0]], device=device)
    rows = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], device=device)
    got = backend.add_gated_rows(x, index, gate, rows)
    assert got.tolist() == [[[0.0, 1.0], [4.0, 7.0], [4.0, 5.0], [3.0, 3.0]]]


@BOTH
@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
def test_nothing_to_move(backend: ModuleType, shape: tuple[int, int, int, int]) -> None:
    """No rows of tokens, no slots, no channels: forward and backward."""
    batch, length, k, width = shape
    index = torch.full((batch, k), -1, device=device)
    x = torch.randn(batch, length, width, device=device, requires_grad=True)
    gate = torch.ones(batch, k, device=device, requires_grad=True)
    rows = torch.ones(batch, k, width, device=device, requires_grad=True)
    added, taken = backend.add_gated_rows(x, index, gate, rows), backend.take_rows(x, index)
    assert torch.equal(added, x)
    assert taken.shape == (batch, k, width)
    (added.sum() + 0 * taken.sum()).backward()
    for leaf in (x, gate, rows):
        assert leaf.grad is not None
    assert backend.top_k_positions(x.detach().sum(dim=2), k).shape == (batch, k)


@BOTH
@pytest.mark.parametrize("move", ["take", "add"])
def test_double_precision_is_differentiated_exactly(backend: ModuleType, move: str) -> None:
    index = torch.tensor([[0, 2], [1, -1]], device=device)
    x = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    gate, rows = leaves(torch.randn(2, 2).to(x), torch.randn(2, 2, 2).to(x))
    calls: dict[str, Callable[..., Tensor]] = {
        "take": lambda x, gate, rows: backend.take_rows(x, index),
        "add": lambda x, gate, rows: backend.add_gated_rows(x, index, gate, rows),
    }
    assert torch.autograd.gradcheck(calls[move], (x, gate, rows))

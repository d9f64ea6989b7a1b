"""Losses and gradients of rows of logits in Triton, alone and inside of the chunked head."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from moebius.kernels.cross_entropy import linear_cross_entropy, token_cross_entropy
from moebius.kernels.triton import cross_entropy as triton_source
from moebius.kernels.triton.cross_entropy import row_losses

device = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""of gradients; the interpreter cuts bf16 off where a GPU rounds"""


def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def labels_of(rows: int, vocabulary: int) -> Tensor:
    """Random ones, of which the first two are the ends of the vocabulary."""
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    ends = torch.tensor([0, vocabulary - 1])[:rows]
    return torch.cat([ends, labels[len(ends) :]]).to(device)


def agree(logits: Tensor, labels: Tensor) -> None:
    """Losses up to fp32's rounding whatever the logits' dtype, gradients up to that of theirs."""
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    original = logits.clone()
    only = row_losses(logits, labels.unsqueeze(1), with_gradients=False)
    assert torch.equal(logits, original)
    losses = row_losses(logits, labels.unsqueeze(1), with_gradients=True)
    assert torch.equal(only, losses)
    assert losses.dtype == torch.promote_types(logits.dtype, torch.float32)
    close = 1e-12 if logits.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=close, atol=close)
    bound = TOLERANCE[logits.dtype]
    torch.testing.assert_close(logits.double(), gradient, rtol=bound, atol=bound**2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 6),
    vocabulary=st.integers(1, 300),
    size=st.sampled_from([0.1, 3.0, 80.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@example(0, 17, 1.0, torch.float32)
@example(13, 1000, 3.0, torch.bfloat16)
def test_equals_the_definition(rows: int, vocabulary: int, size: float, dtype: torch.dtype) -> None:
    agree((size * tensor(0, rows, vocabulary)).to(dtype), labels_of(rows, vocabulary))


@pytest.mark.parametrize("vocabulary", [63, 64, 65, 200])
def test_rows_longer_than_a_block(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest logit comes early, in the middle, late, or in the lanes that are cut off."""
    monkeypatch.setattr(triton_source, "_block", lambda vocabulary: 64)
    logits = tensor(0, 5, vocabulary)
    for row, place in enumerate((0, vocabulary // 2, vocabulary - 1)):
        logits[row, place] = 50.0
    agree(logits, labels_of(5, vocabulary))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [80.0, -80.0, 8192.0])
def test_large_logits(size: float, dtype: torch.dtype) -> None:
    """One logit of its size against zeros, at the label and elsewhere; and all of them alike."""
    logits = torch.zeros(4, 33, device=device, dtype=dtype)
    logits[:, 7] = size
    logits[3] = size
    agree(logits, torch.tensor([7, 0, 32, 5], device=device))


@pytest.mark.parametrize("label", [-1, -100, 33])
def test_a_label_outside_of_the_vocabulary_is_no_loss_but_nan(label: int) -> None:
    labels = torch.tensor([[3], [label], [5]], device=device)
    losses = row_losses(tensor(0, 3, 33), labels, with_gradients=False)
    assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_show(value: float) -> None:
    logits = tensor(0, 2, 33)
    logits[1, 20] = value
    losses = row_losses(logits, labels_of(2, 33).unsqueeze(1), with_gradients=True)
    assert losses.isfinite().tolist() == [True, False]
    assert logits.isfinite().all(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("autocast", [False, True])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 20),
    exits=st.integers(1, 3),
    vocabulary=st.integers(2, 120),
    chunk_tokens=st.sampled_from([None, 7]),
)
@example(11, 2, 1000, 5)
def test_the_head_is_the_same(
    autocast: bool, tokens: int, exits: int, vocabulary: int, chunk_tokens: int | None
) -> None:
    """Losses and all gradients of it with and without, 96 channels wide."""
    weight = (0.1 * tensor(50, vocabulary, 96)).requires_grad_()
    hidden = [tensor(x, tokens, 96).requires_grad_() for x in range(exits)]
    labels, ce = labels_of(tokens, vocabulary), [1.0, -0.25, 0.0][:exits]
    results = []
    for function in (row_losses, None):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            losses = linear_cross_entropy(
                hidden, weight, labels, ce, chunk_tokens=chunk_tokens, row_losses=function
            )
            each = token_cross_entropy(hidden[0], weight, labels, chunk_tokens, row_losses=function)
        grads = torch.autograd.grad(losses.total, [weight, *hidden])
        results.append([losses.total, losses.ce_X, each, *grads])
    bound = 2**-6 if autocast else 2e-6
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        largest = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=0, atol=bound * largest)

"""The `RowLosses` of `moebius.kernels.cross_entropy` in Triton: no copy of the logits.

Shapes: C tokens of a chunk, V vocabulary.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

BLOCK = 4096
"""logits that a program holds at a time"""
WARPS = 8


def row_losses(logits_CV: Tensor, labels_C1: Tensor, with_gradients: bool) -> Tensor:
    """Cross-entropy of each token, `[C]` in nats, in fp32 or for logits in fp64 in that.

    Leaves in `logits`, which must be contiguous, its gradient by them (softmax, less 1 at the
    label) `with_gradients`, and else what was there. Bytes at b per logit: one pass reads them, and
    one for gradients reads and writes them, `3 * b * C * V`. A label outside of the vocabulary
    makes the loss NaN: a kernel cannot raise.
    """
    rows, vocabulary = logits_CV.shape
    losses_C = logits_CV.new_empty(rows, dtype=torch.promote_types(logits_CV.dtype, torch.float32))
    if not rows:
        return losses_C
    block = _block(vocabulary)
    constants = {"STEPS": triton.cdiv(vocabulary, block), "BLOCK": block}
    row_losses_kernel[(rows,)](
        logits_CV,
        labels_C1.contiguous(),
        losses_C,
        vocabulary,
        GRADIENTS=with_gradients,
        **constants,
        num_warps=WARPS,
    )
    return losses_C


@triton.jit  # type: ignore[untyped-decorator]
def row_losses_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor,
    vocabulary: tl.tensor,
    GRADIENTS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: each of BLOCK lanes keeps the largest logit and the sum of exponentials it met."""
    exact = losses.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    is_here = (label >= 0) & (label < vocabulary)
    # Before the reductions, whose barriers come before the first gradient is written.
    label_logit = tl.load(logits + label, mask=is_here, other=float("nan")).to(exact)
    lane = tl.arange(0, BLOCK)
    # Finite: the difference of two infinities is NaN.
    largest = tl.full((BLOCK,), -3e38, dtype=exact)
    total = tl.zeros((BLOCK,), dtype=exact)
    for step in range(STEPS):
        column = step * BLOCK + lane
        z = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(exact)
        larger = tl.maximum(largest, z)
        total = total * tl.exp(largest - larger) + tl.exp(z - larger)
        largest = larger
    peak = tl.max(largest, 0)
    total_of_row = tl.sum(total * tl.exp(largest - peak), 0)
    tl.store(losses + row, tl.log(total_of_row) + (peak - label_logit))
    if GRADIENTS:
        share = 1.0 / total_of_row
        for step in range(STEPS):
            column = step * BLOCK + lane
            inside = column < vocabulary
            z = tl.load(logits + column, mask=inside, other=float("-inf")).to(exact)
            gradient = tl.exp(z - peak) * share - tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)


def _block(vocabulary: int) -> int:
    """The interpreter takes a row at once."""
    block: int = triton.next_power_of_2(vocabulary)
    return block if interpreted() else min(block, BLOCK)


def variants() -> Iterator[Variant]:
    """Vocabularies of both ends of what is usual, the larger one not aligned."""
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary, divisible in ((32000, ("vocabulary",)), (151643, ())):
            for gradients in (False, True):
                block = min(triton.next_power_of_2(vocabulary), BLOCK)
                yield Variant(
                    row_losses_kernel,
                    {
                        "logits": f"*{DTYPES[dtype]}",
                        "labels": "*i64",
                        "losses": "*fp32",
                        "vocabulary": "i32",
                    },
                    {
                        "GRADIENTS": gradients,
                        "STEPS": triton.cdiv(vocabulary, block),
                        "BLOCK": block,
                    },
                    num_warps=WARPS,
                    divisible=divisible,
                )

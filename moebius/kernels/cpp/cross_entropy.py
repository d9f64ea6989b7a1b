"""The `RowLosses` of `moebius.kernels.cross_entropy` in C++: no copy of the logits.

Shapes: C tokens of a chunk, V vocabulary.
"""

import torch
from torch import Tensor


def row_losses(logits_CV: Tensor, labels_C1: Tensor, with_gradients: bool) -> Tensor:
    """Cross-entropy of each token, `[C]` in nats, in fp32.

    Leaves in `logits`, which must be contiguous, its gradient by them (softmax, less 1 at the
    label) `with_gradients`, and else what was there. Bytes at b per logit: `3 * b * C * V` with
    gradients. Raises RuntimeError for a label outside of the vocabulary, and for logits that are
    neither in fp32 nor in bf16: nothing calls it with products in fp64.
    """
    losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
    torch.ops.moebius_cpp.row_losses(logits_CV, labels_C1.contiguous(), losses_C, with_gradients)
    return losses_C

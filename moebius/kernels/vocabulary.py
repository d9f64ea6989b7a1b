"""Sums over a vocabulary whose rows may be in several processes.

Shapes: C tokens, V rows of the vocabulary that are here.
"""

from typing import Protocol

import torch
from torch import Tensor


class Vocabulary(Protocol):
    """A part of the vocabulary: the others' are in other processes, which run the same calls."""

    @property
    def first(self) -> int:
        """The id of the first row that is here."""

    def maximum(self, values_C: Tensor) -> Tensor:
        """The largest of all parts' values."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of all parts' values."""


def locate(ids: Tensor, vocabulary: Vocabulary | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """The row of each id, 0 for one that is not here, and which ones are."""
    if vocabulary is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    row = ids - vocabulary.first
    is_here = (row >= 0) & (row < num_rows)
    return row.masked_fill(~is_here, 0), is_here


def label_losses_(logits_CV: Tensor, labels_C1: Tensor, vocabulary: Vocabulary | None) -> Tensor:
    """Cross-entropy of each token; leaves log-probabilities where the logits were."""
    row_C1, is_here_C1 = locate(labels_C1, vocabulary, logits_CV.shape[1])
    log_probs_CV, _ = log_softmax_(logits_CV, vocabulary)
    label_C1 = log_probs_CV.gather(1, row_C1)
    if vocabulary is not None:
        label_C1 = vocabulary.total(label_C1.masked_fill(~is_here_C1, 0.0))
    return -label_C1.squeeze(1)


def log_softmax_(logits_CV: Tensor, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """In place; also what was subtracted, `logsumexp(logits)`."""
    if vocabulary is None:
        first_C = logits_CV[:, 0].clone()
        # The kernels reduce a row before they write its first element.
        torch.log_softmax(logits_CV, dim=1, out=logits_CV)
        return logits_CV, first_C - logits_CV[:, 0]
    largest_C = vocabulary.maximum(logits_CV.amax(dim=1))
    logits_CV.sub_(largest_C.unsqueeze(1))
    log_sum_C = vocabulary.total(logits_CV.exp().sum(dim=1)).log()
    logits_CV.sub_(log_sum_C.unsqueeze(1))
    return logits_CV, largest_C + log_sum_C


def total(values: Tensor, vocabulary: Vocabulary | None) -> Tensor:
    """The sum of all parts' values."""
    return values if vocabulary is None else vocabulary.total(values)

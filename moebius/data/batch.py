"""A batch of samples: windows of consecutive tokens with their documents and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tensors, int64; `[B, S]` but for the last."""

    tokens_BS: Tensor
    labels_BS: Tensor
    """the token that follows each token"""
    segment_ids_BS: Tensor
    """which document of the row; goes up by one where a document or a part of one begins"""
    positions_BS: Tensor
    """position in the document, from 0 at its start, at that of its part, or at the row's"""
    sample_ids_B: Tensor
    """number of each row's sample in its stream"""

    @property
    def num_tokens(self) -> int:
        """Tokens, which is also the number of labels."""
        return self.tokens_BS.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def rows(self, start: int, end: int) -> Batch:
        """Some of the rows."""
        return Batch(*(tensor[start:end] for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def make_batch(
    samples: Sequence[Sequence[NDArray[np.int64]]],
    length: int,
    eod_id: int,
    first_sample: int = 0,
    mask_documents: bool = True,
) -> Batch:
    """Inputs and labels `[B, length]` of consecutive samples of a stream.

    A sample is windows of consecutive tokens, of which all but the first are labels; without a
    window in common with another one, a part of a document has no past. An end-of-document token is
    the last label of its document and the first input of the next one, whose beginning it thus
    predicts from itself alone: every label counts and attention need not cross a border. Without
    `mask_documents` a row is one text.
    """
    tokens = np.empty((len(samples), length), dtype=np.int64)
    labels = np.empty_like(tokens)
    is_part = np.zeros_like(tokens, dtype=np.bool_)
    for row, windows in enumerate(samples):
        column = 0
        for window in windows:
            end = column + len(window) - 1
            tokens[row, column:end], labels[row, column:end] = window[:-1], window[1:]
            is_part[row, column] = column > 0  # a row's first part is numbered as its text is
            column = end
    is_start = ((tokens == eod_id) | is_part) & mask_documents
    column_S = np.arange(length)
    last_start = np.maximum.accumulate(np.where(is_start, column_S, 0), axis=1)
    sample_ids = first_sample + np.arange(len(samples))
    documents, positions = np.cumsum(is_start, axis=1), column_S - last_start
    arrays = (tokens, labels, documents, positions, sample_ids)
    return Batch(*(torch.from_numpy(array) for array in arrays))

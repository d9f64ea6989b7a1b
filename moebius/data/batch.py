"""A batch of samples: windows of consecutive tokens with their documents and positions."""

from __future__ import annotations

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
    """which document of the row; goes up by one where a document begins"""
    positions_BS: Tensor
    """position in the document, from 0 at its start or at the row's"""
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


def make_batch(windows: NDArray[np.int64], eod_id: int, first_sample: int = 0) -> Batch:
    """Inputs and labels of windows `[B, S + 1]`, which are consecutive samples of a stream.

    An end-of-document token is the last label of its document and the first input of the next one,
    whose beginning it thus predicts from itself alone: every label counts and attention need not
    cross a border.
    """
    tokens = windows[:, :-1]
    is_start = tokens == eod_id
    column = np.arange(tokens.shape[1])
    last_start = np.maximum.accumulate(np.where(is_start, column, 0), axis=1)
    sample_ids = first_sample + np.arange(len(windows))
    documents, positions = np.cumsum(is_start, axis=1), column - last_start
    arrays = (tokens, windows[:, 1:], documents, positions, sample_ids)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

"""Moving tokens to experts and back: the seam for expert parallelism."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Tokens copied once per dispatched assignment, sorted by expert."""

    rows_RD: Tensor
    weights_R: Tensor
    ends_E: Tensor
    """int32; rows `ends[e-1]:ends[e]` go to expert e"""
    assignment_R: Tensor
    """which of the T * K assignments each row is"""
    source_R: Tensor
    """token each row came from"""


class Dispatcher(Protocol):
    """Brings tokens to the experts that live here, and what these make of them back.

    An assignment that is empty or needs no product makes no row and never travels. Every process
    of a group takes part in each call, with or without tokens.
    """

    def send(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, sizes: Sequence[int]
    ) -> Callable[[], Dispatch]:
        """Send tokens off; the result waits for those that come here. `sizes` are the numbers of
        experts of each group of the pool, whose ids follow each other."""

    def combine(self, rows_RD: Tensor, dispatch: Dispatch, y_TD: Tensor) -> Tensor:
        """`y` plus each row at the token it came from."""


class LocalDispatcher:
    """All experts live here."""

    def send(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, sizes: Sequence[int]
    ) -> Callable[[], Dispatch]:
        """See `Dispatcher`; nothing is on its way."""
        return lambda: self.dispatch(x_TD, ids_TK, weights_TK, sum(sizes))

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_dispatched: int
    ) -> Dispatch:
        """Sort the assignments to dispatched experts by expert (stable: by token) and gather."""
        ids = ids_TK.flatten()
        assignment_R = ((ids >= 0) & (ids < num_dispatched)).nonzero().squeeze(1)
        expert_R, order_R = ids[assignment_R].sort(stable=True)
        assignment_R = assignment_R[order_R]
        source_R = assignment_R // ids_TK.shape[1]
        experts = torch.arange(num_dispatched, device=ids.device)
        ends_E = torch.searchsorted(expert_R, experts, right=True).to(torch.int32)
        weights_R = weights_TK.flatten()[assignment_R]
        # Not `x_TD[source_R]`: the gradient of indexing adds rows in the order threads get to them.
        rows_RD = x_TD.index_select(0, source_R)
        return Dispatch(rows_RD, weights_R, ends_E, assignment_R, source_R)

    def combine(self, rows_RD: Tensor, dispatch: Dispatch, y_TD: Tensor) -> Tensor:
        """`y` plus each row at the token it came from."""
        return y_TD.index_add(0, dispatch.source_R, rows_RD.to(y_TD.dtype))

"""Moving tokens to experts and back: the seam for expert parallelism."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moebius.kernels.permute import Order
from moebius.kernels.registry import Kernels


@dataclass(frozen=True)
class Dispatch:
    """Tokens copied once per dispatched assignment, sorted by expert."""

    rows_RD: Tensor
    weights_R: Tensor
    order: Order
    kernels: Kernels


class Dispatcher(Protocol):
    """Brings tokens to the experts that live here, and what these make of them back.

    An assignment that is empty or needs no product makes no row and never travels. Every process
    of a group takes part in each call, with or without tokens.
    """

    def send(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        sizes: Sequence[int],
        kernels: Kernels,
    ) -> Callable[[], Dispatch]:
        """Send tokens off; the result waits for those that come here. `sizes` are the numbers of
        experts of each group of the pool, whose ids follow each other."""

    def combine(self, rows_RD: Tensor, dispatch: Dispatch, y_TD: Tensor) -> Tensor:
        """`y` plus each row at the token it came from."""


class LocalDispatcher:
    """All experts live here."""

    def send(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        sizes: Sequence[int],
        kernels: Kernels,
    ) -> Callable[[], Dispatch]:
        """See `Dispatcher`; nothing is on its way."""
        return lambda: self.dispatch(x_TD, ids_TK, weights_TK, sum(sizes), kernels)

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, kernels: Kernels
    ) -> Dispatch:
        """Sort the assignments to dispatched experts by expert and gather."""
        order = kernels.sort_by_expert(ids_TK, num_experts, kernels.alignment)
        return Dispatch(*kernels.permute(x_TD, weights_TK, order), order, kernels)

    def combine(self, rows_RD: Tensor, dispatch: Dispatch, y_TD: Tensor) -> Tensor:
        """`y` plus each row at the token it came from."""
        return dispatch.kernels.unpermute(rows_RD, dispatch.order, y_TD)

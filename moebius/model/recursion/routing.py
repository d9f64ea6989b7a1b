"""Routing over depth as data: what waits outside a loop, what enters a pass, what comes back.

A loop is `begin`, then for each pass `admit`, the block on the selected tokens, `absorb`; the
executor alone takes tokens out of rows and runs the block, which never knows that some are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moebius.model.context import DepthContext
from moebius.model.parameters import ParameterModule
from moebius.model.program import Site


@dataclass(frozen=True)
class Selection:
    """The tokens that enter a pass and the weight of its result."""

    index_BK: Tensor
    """positions in the full row, ascending, int64, -1 for an empty slot"""
    gate_BK: Tensor
    """factor on the pass's result, fp32"""
    expected: float | None = None
    """where how many tokens there are depends on the data: how many the schedule foresees"""


@dataclass(frozen=True)
class LoopState:
    """All tokens of rows that are in a routed loop."""

    stream_BSD: Tensor
    """the residual stream, which a token leaves the loop with"""
    inner_BSD: Tensor
    """what the next pass reads"""
    active_BK: Tensor
    """the tokens of the last pass, the candidates of the next; -1 for an empty slot"""
    depth_BS: Tensor | None = None
    """how many passes each token makes, where tokens choose"""
    gate_BS: Tensor | None = None
    """factor on the result of the last one, where tokens choose"""

    def select(self, rows: Tensor) -> LoopState:
        """The state of some rows, by number."""
        return self._map(lambda tensor, _: tensor[rows])

    @classmethod
    def join(cls, parts: Sequence[LoopState]) -> LoopState:
        """The state of several groups of rows."""
        return parts[0]._map(lambda _, name: torch.cat([getattr(part, name) for part in parts]))

    def _map(self, function: Callable[[Tensor, str], Tensor]) -> LoopState:
        """Every tensor that there is replaced by a function of it and of its name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: function(t, name) for name, t in found.items() if t is not None}
        )


class DepthRouting(ParameterModule):
    """The interface of a loop's routing."""

    sites: tuple[Site, ...]
    """of its passes"""

    def begin(self, x_BSD: Tensor, ctx: DepthContext, num_passes: int) -> LoopState:
        """The state of full rows in front of the first of so many passes."""
        raise NotImplementedError

    def admit(
        self, state: LoopState, share: float, ctx: DepthContext
    ) -> tuple[LoopState, Selection]:
        """Who enters the pass of `ctx`; `share` is its part of the tokens where the pass chooses.

        Auxiliary losses are attached to the state.
        """
        raise NotImplementedError

    def absorb(
        self, state: LoopState, chosen: Selection, inner: Tensor, outer: Tensor, depth: int
    ) -> LoopState:
        """The state after a pass has made `outer` of the selected tokens' `inner`, `[B, K, D]`."""
        raise NotImplementedError

    def flops(self, num_candidates: int, depth: int) -> int:
        """Forward FLOPs of the decision in front of a pass."""
        raise NotImplementedError


def everyone(x_BSD: Tensor) -> Tensor:
    """The index of all tokens of full rows."""
    return torch.arange(x_BSD.shape[1], device=x_BSD.device).expand(x_BSD.shape[0], -1)

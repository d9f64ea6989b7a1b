"""Routing over depth as data: what waits outside a loop, what enters a pass, what comes back.

A loop is `begin`, then for each pass `admit`, the block on the selected tokens, `absorb`; the
executor alone takes tokens out of rows and runs the block, which never knows that some are missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from moebius.kernels.registry import PLAIN, Kernels
from moebius.model.context import DepthContext, TokenContext
from moebius.model.parameters import ParameterModule
from moebius.model.program import Site

State = TypeVar("State", "Selection", "LoopState")


@dataclass(frozen=True)
class Selection:
    """The tokens that enter a pass and the weight of its result."""

    index_BK: Tensor
    """of whole rows: slots, ascending within a shard, int64, -1 for an empty slot"""
    own_BK: Tensor
    """of the own slots: positions among the own tokens"""
    gate_BK: Tensor
    """of the own slots: factor on the pass's result, fp32"""
    last_BK: Tensor | None = None
    """of the own slots, where tokens choose: for whom this is the last pass"""
    expected: float | None = None
    """where how many tokens there are depends on the data: how many the schedule foresees"""

    def select(self, rows: Tensor) -> Selection:
        """Those of some rows, by number."""
        return select_rows(self, rows)


@dataclass(frozen=True)
class LoopState:
    """All tokens of rows that are in a routed loop."""

    stream_BSD: Tensor
    """the residual stream, which a token leaves the loop with; own tokens"""
    inner_BSD: Tensor
    """what the next pass reads; own tokens"""
    active_BK: Tensor
    """the tokens of the last pass, the candidates of the next; -1 for an empty slot; whole rows"""
    depth_BS: Tensor | None = None
    """how many passes each token makes, where tokens choose; whole rows"""
    gate_BS: Tensor | None = None
    """factor on the result of the last one, where tokens choose; own tokens"""

    def select(self, rows: Tensor) -> LoopState:
        """The state of some rows, by number."""
        return select_rows(self, rows)

    @classmethod
    def join(cls, parts: Sequence[LoopState]) -> LoopState:
        """The state of several groups of rows."""
        return _mapped(parts[0], lambda _, name: torch.cat([getattr(part, name) for part in parts]))


class DepthRouting(ParameterModule, ABC):
    """The interface of a loop's routing."""

    sites: tuple[Site, ...]
    """of its passes"""

    @abstractmethod
    def begin(self, x_BSD: Tensor, ctx: DepthContext, num_passes: int) -> LoopState:
        """The state of full rows in front of the first of so many passes."""

    @abstractmethod
    def admit(
        self, state: LoopState, share: float, ctx: DepthContext
    ) -> tuple[LoopState, Selection]:
        """Who enters the pass of `ctx`; `share` is its part of the tokens where the pass chooses.

        Auxiliary losses are attached to the state.
        """

    @abstractmethod
    def absorb(
        self,
        state: LoopState,
        chosen: Selection,
        inner: Tensor,
        outer: Tensor,
        kernels: Kernels = PLAIN,
    ) -> LoopState:
        """The state after a pass has made `outer` of the selected tokens' `inner`, `[B, K, D]`."""

    @abstractmethod
    def flops(self, num_candidates: int, depth: int) -> int:
        """Forward FLOPs of the decision in front of a pass."""


def everyone(tokens: TokenContext) -> Tensor:
    """The index of all tokens of full rows."""
    place_BS = tokens.place_BS
    index_BS = torch.arange(tokens.num_slots, device=place_BS.device).expand_as(place_BS)
    return index_BS if tokens.valid_BS is None else index_BS.masked_fill(~tokens.valid_BS, -1)


def longest(keep_BS: Tensor) -> int:
    """The most tokens that a row keeps, at least 1; also of no rows."""
    most = keep_BS.sum(dim=1)
    return max(1, int(most.max())) if len(most) else 1


def select_rows(value: State, rows: Tensor) -> State:
    """Some rows of every tensor of a dataclass."""
    return _mapped(value, lambda tensor, _: tensor[rows])


def _mapped(value: State, function: Callable[[Tensor, str], Tensor]) -> State:
    """Every tensor of a dataclass replaced by a function of it and of its name."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    changes: dict[str, Any] = {
        name: function(tensor, name) for name, tensor in found.items() if isinstance(tensor, Tensor)
    }
    return replace(value, **changes)

"""Per-token state that travels with the residual stream from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from moebius.kernels.depth_select import replace_rows, take_rows
from moebius.model.program import Visit

Name = TypeVar("Name", str, Visit)


@dataclass(frozen=True)
class RowKeys:
    """Keys and values that tokens of a row have left in a layer, for its later passes."""

    k_BLGC: Tensor
    v_BLGC: Tensor
    present_BL: Tensor
    """which of the row's tokens have left any"""


@dataclass(frozen=True)
class Carry:
    """What a token brings along besides its residual stream.

    It is an input and an output of every block, so recomputation, token selection, pipeline stages
    and slices of a ring handle it like the hidden state. Gradients flow through it.
    """

    router_states: Mapping[str, Tensor] = field(default_factory=dict)
    """what a router passes on to a later one, fp32 `[B, S, N]`, by the name under which that one
    looks: raw scores (the gating residual of MoE++) or the state of a recurrent router (RMoE)"""
    depth_values: Mapping[Visit, Tensor] = field(default_factory=dict)
    """what depth attention mixes: of each visit the token's key, its value and a 1, `[B, S, X]`"""
    row_keys: Mapping[str, RowKeys] = field(default_factory=dict)
    """by layer, what later passes attend to; it belongs to rows and stays when tokens are taken"""

    def with_state(self, name: str, state_BSN: Tensor) -> Carry:
        """This carry with another state under a name."""
        return replace(self, router_states={**self.router_states, name: state_BSN})

    def split(self) -> tuple[Carry, Carry]:
        """What goes on to other layers, and what layers have left for their own next pass.

        A router that looks at its own last pass names its state by the module, see `Router`.
        """
        own = {n: s for n, s in self.router_states.items() if n.startswith("layers.")}
        others = {n: s for n, s in self.router_states.items() if n not in own}
        return Carry(others, self.depth_values), Carry(own, {}, self.row_keys)

    def joined(self, left: Carry) -> Carry:
        """The inverse of `split`."""
        states = {**self.router_states, **left.router_states}
        return Carry(states, self.depth_values, left.row_keys)

    def take(self, index_BK: Tensor) -> Carry:
        """The state of the tokens at `index`."""
        return replace(
            self,
            router_states={n: take_rows(s, index_BK) for n, s in self.router_states.items()},
            depth_values={v: take_rows(s, index_BK) for v, s in self.depth_values.items()},
        )

    def put(self, index_BK: Tensor, new: Carry, length: int) -> Carry:
        """This state with `new`, taken from it and gone on, at `index`; other tokens keep theirs.

        A token that lacks a state has zeros. `length` is the full row's.
        """
        return Carry(
            _put(self.router_states, index_BK, new.router_states, length),
            _put(self.depth_values, index_BK, new.depth_values, length),
            new.row_keys,
        )

    def rows(self, start: int, end: int) -> Carry:
        """The state of some rows; of tokens without row keys, as generation has them."""
        return Carry(
            {name: state[start:end] for name, state in self.router_states.items()},
            {visit: state[start:end] for visit, state in self.depth_values.items()},
        )

    @classmethod
    def join(cls, parts: Sequence[Carry], sizes: Sequence[int]) -> Carry:
        """The state of several groups of rows; zeros where a group lacks one."""
        return cls(
            _join([part.router_states for part in parts], sizes),
            _join([part.depth_values for part in parts], sizes),
        )


def _put(
    old: Mapping[Name, Tensor], index_BK: Tensor, new: Mapping[Name, Tensor], length: int
) -> dict[Name, Tensor]:
    states = {}  # what `new` has dropped is of no use to anyone
    for name, rows in new.items():
        before = old.get(name)
        if before is None:
            before = rows.new_zeros(rows.shape[0], length, rows.shape[2])
        states[name] = replace_rows(before, index_BK, rows)
    return states


def _join(parts: Sequence[Mapping[Name, Tensor]], sizes: Sequence[int]) -> dict[Name, Tensor]:
    states: dict[Name, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        example = next(part[name] for part in parts if name in part)
        states[name] = torch.cat(
            [
                part[name] if name in part else example.new_zeros(size, *example.shape[1:])
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
    return states

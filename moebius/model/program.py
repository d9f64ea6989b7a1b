"""The unrolled list of visits: which unique layer runs at which depth (DepthConfig -> Program)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # routers are configured with stages, which know programs
    from moebius.model.recursion.config import DepthConfig, ExpertChoiceConfig, TokenChoiceConfig


@dataclass(frozen=True, order=True)
class Site:
    """A router call site: statistics and losses belong to it, not to the parameter.

    `module` names the layer and its sublayer (`layers.1.ffn`), `depth` the pass of a recursion,
    `iteration` the turn of a chain of experts; both count from 1.
    """

    module: str
    depth: int
    iteration: int = 1

    def __str__(self) -> str:
        return f"{self.module}@{self.depth}" + f".{self.iteration}" * (self.iteration > 1)


@dataclass(frozen=True)
class Visit:
    """One use of a layer.

    `layer` names the unique layer, `depth` counts the passes of the loop it is in (from 1), `index`
    is its place in the unrolled program (from 0).
    """

    layer: str
    depth: int
    index: int

    def site(self, sublayer: str, iteration: int = 1) -> Site:
        """The call site of a sublayer's router at this visit."""
        return router_site(self.layer, sublayer, self.depth, iteration)


def router_site(layer: str, sublayer: str, depth: int, iteration: int) -> Site:
    """The call site of a sublayer's router."""
    return Site(f"layers.{layer}.{sublayer}", depth, iteration)


@dataclass(frozen=True)
class LayerPlace:
    """Where a unique layer stands in a program."""

    name: str
    index: int
    """number among the unique layers, from 0"""
    num_layers: int
    """unique layers"""
    num_depths: int
    """how often it is visited"""
    predecessors: Mapping[str, int]
    """by sublayer, how many experts the router before it scores; missing where there is none"""

    def sites(self, sublayer: str, iterations: Iterable[int] = (1,)) -> tuple[Site, ...]:
        """The call sites of a sublayer's router, by depth and then by turn of a chain."""
        turns = tuple(iterations)
        return tuple(
            router_site(self.name, sublayer, depth, turn)
            for depth in range(1, self.num_depths + 1)
            for turn in turns
        )


@dataclass(frozen=True)
class Segment:
    """Consecutive visits that repeat a group of layers; with a router, tokens may leave in between.

    Segments with a router are numbered; their sites are `depth.<number>@<depth>`.
    """

    passes: tuple[tuple[Visit, ...], ...]
    num_passes: int
    """of the whole loop; `passes` are fewer in a program that ends early"""
    router: ExpertChoiceConfig | TokenChoiceConfig | None = None
    number: int = 0
    """among the routed segments of the program"""

    def site(self, depth: int) -> Site:
        """The call site of the depth router at a pass, from 1."""
        return Site(f"depth.{self.number}", depth)

    def shares(self, step: int) -> tuple[float, ...]:
        """The share of the tokens that enters each pass at an optimizer step; where tokens choose,
        that of a balanced choice."""
        if self.router is None:
            return (1.0,) * len(self.passes)
        return self.router.shares(self.num_passes, step)[: len(self.passes)]


@dataclass(frozen=True)
class Unit:
    """What is never cut in two: a visit, or a pass of a routed loop."""

    visits: tuple[Visit, ...]
    segment: Segment | None = None
    """the routed loop"""
    is_last: bool = True
    """whether the loop ends with it"""

    @property
    def end(self) -> int:
        """How many visits are done after it."""
        return self.visits[-1].index + 1


FINAL_STEP = sys.maxsize
"""a step at which every schedule has ended"""


@dataclass(frozen=True)
class Program:
    """What the executor runs. A dense transformer is a program of one segment with one pass."""

    segments: tuple[Segment, ...]

    @property
    def visits(self) -> tuple[Visit, ...]:
        """All visits in order of execution."""
        return tuple(v for segment in self.segments for visits in segment.passes for v in visits)

    @property
    def units(self) -> tuple[Unit, ...]:
        """All visits and routed passes in order of execution."""
        units: list[Unit] = []
        for segment in self.segments:
            if segment.router is None:
                units += [Unit((visit,)) for visits in segment.passes for visit in visits]
                continue
            last = segment.passes[-1]
            units += [Unit(visits, segment, visits == last) for visits in segment.passes]
        return tuple(units)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the unique layers, in order of first use."""
        return tuple(dict.fromkeys(visit.layer for visit in self.visits))

    def num_depths(self, layer: str) -> int:
        """How often a layer is visited."""
        return max(visit.depth for visit in self.visits if visit.layer == layer)

    @property
    def exits(self) -> tuple[int, ...]:
        """After how many visits the stream of all tokens is whole, so that a head can read it.

        In a routed loop that is between passes; where tokens choose their number of passes, which
        only then reach the stream, behind the loop.
        """
        counts: list[int] = []
        for segment in self.segments:
            if segment.router is None:
                counts += [visit.index + 1 for visits in segment.passes for visit in visits]
                continue
            ends = [visits[-1].index + 1 for visits in segment.passes]
            counts += ends[-1:] if segment.router.kind == "token_choice" else ends
        return tuple(counts)

    def until(self, num_visits: int) -> Program:
        """The program that ends after so many visits, one of `exits`."""
        segments = []
        for segment in self.segments:
            whole = tuple(p for p in segment.passes if p[-1].index < num_visits)
            if whole:
                segments.append(replace(segment, passes=whole))
            if len(whole) < len(segment.passes):
                # The passes of a segment are equally long, so a part of one stands by itself.
                part = tuple(v for v in segment.passes[len(whole)] if v.index < num_visits)
                segments += [Segment((part,), num_passes=1)] if part else []
                break
        return Program(tuple(segments))


def build_program(depth: DepthConfig) -> Program:
    """Unroll a valid depth configuration (see `sharing_rules`).

    Unique layer of unrolled index l, with L layers and N_r recursions (Mixture-of-Recursions,
    arXiv 2507.10524, section 2.2): cycle `l mod (L / N_r)`; sequence `l // N_r`; the middle
    variants do the same between a first and a last layer of their own. With groups, each group of
    unique layers is a cycle of its own.
    """
    middle = depth.sharing.startswith("middle")
    looped = (depth.num_layers - 2 * middle) // depth.num_recursions
    names = [str(number) for number in range(looped + 2 * middle)]
    body = names[1:-1] if middle else names
    size = 1 if depth.sharing.endswith("sequence") else len(body) // depth.groups
    groups = [(body[i : i + size], depth.num_recursions) for i in range(0, len(body), size)]
    if middle:
        groups = [(names[:1], 1), *groups, (names[-1:], 1)]

    segments: list[Segment] = []
    index = number = 0
    for layers, times in groups:
        passes = []
        for pass_number in range(times):
            visits = [Visit(name, pass_number + 1, index + i) for i, name in enumerate(layers)]
            passes.append(tuple(visits))
            index += len(layers)
        is_routed = depth.router is not None and layers[0] in body
        router = depth.router if is_routed else None
        segments.append(Segment(tuple(passes), times, router, number))
        number += is_routed
    return Program(tuple(segments))


def kept_tokens(share: float, sequence_length: int, multiple_of: int = 1) -> int:
    """k_r: how many tokens of a full row enter a depth, at least one, rounded up to a multiple."""
    tokens = max(1, int(share * sequence_length + 1e-9))
    return min(-(-tokens // multiple_of) * multiple_of, sequence_length)

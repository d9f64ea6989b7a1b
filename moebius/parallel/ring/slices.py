"""A program around a ring: which layers are whose, what a visit costs, and every micro-batch's way.

The looped block is cut into as many slices as there are processes. All else is at home: a
micro-batch has its home on one of the processes, in turn, which embeds it, decides before each pass
who enters, keeps those who do not, and has the head. So all processes hold what homes need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from moebius.model.cost import BACKWARD_PER_FORWARD, depth_router_flops, planned_work, visit_costs
from moebius.model.decoder import Decoder
from moebius.model.extent import Work
from moebius.model.program import FINAL_STEP, Program, Segment, Unit, Visit
from moebius.parallel.config import RingConfig
from moebius.parallel.cut import cut
from moebius.parallel.ring.timeline import Stop, Way
from moebius.parallel.stage import last_parts, layer_parts

STREAMS_PER_LAYER = 17
"""residual streams that the activations of a layer take for the same tokens, about (Korthikanti et
al. 2022, arXiv 2205.05198, equation 1 without attention scores: 34 bytes per channel in bf16)"""


@dataclass(frozen=True)
class Place:
    """What a stop is for."""

    depth: int
    """the pass, from 1; at home the one that is entered, or one more than there are at the end"""
    slice: int | None = None
    """None at home"""


@dataclass(frozen=True)
class Costs:
    """Forward times of full micro-batches, in any unit."""

    front: float
    """embedding and what is in front of the loop"""
    decisions: tuple[float, ...]
    """of the router, by pass"""
    slices: tuple[tuple[float, ...], ...]
    """by pass, by slice"""
    back: float
    """what is behind the loop, and the head"""


@dataclass(frozen=True)
class Ring:
    """A program, cut."""

    front: tuple[Unit, ...]
    """at home, in front of the loop"""
    loop: Segment
    back: tuple[Unit, ...]
    """at home, behind the loop"""
    slices: tuple[tuple[str, ...], ...]
    """layers by process"""
    costs: Costs

    @property
    def num_ranks(self) -> int:
        """Processes."""
        return len(self.slices)

    @property
    def num_passes(self) -> int:
        """How often the ring is gone around."""
        return len(self.loop.passes)

    @property
    def is_routed(self) -> bool:
        """Whether tokens go home between passes; otherwise all of them go straight on."""
        return self.loop.router is not None

    @property
    def places(self) -> tuple[Place, ...]:
        """Every micro-batch's stops."""
        places: list[Place] = []
        for depth in range(1, self.num_passes + 1):
            if depth == 1 or self.is_routed:
                places.append(Place(depth))
            places += [Place(depth, number) for number in range(self.num_ranks)]
        return (*places, Place(self.num_passes + 1))

    def visits(self, place: Place) -> tuple[Visit, ...]:
        """What a slice does in a pass."""
        assert place.slice is not None
        layers = self.slices[place.slice]
        return tuple(v for v in self.loop.passes[place.depth - 1] if v.layer in layers)

    def unit(self, depth: int) -> Unit:
        """A pass of a routed loop."""
        return Unit(self.loop.passes[depth - 1], self.loop, depth == self.num_passes)

    def chunks(self, depth: int, merge: bool) -> int:
        """Into how many chunks a pass is cut, so that each has about as many tokens as one of as
        many micro-batches as there are passes."""
        if not merge:
            return 1
        share = Fraction(self.loop.shares(FINAL_STEP)[depth - 1]).limit_denominator(1000)
        return ceil(self.num_passes * share)

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """(sender, receiver) of all messages, forward and backward."""
        last, ranks = self.num_ranks - 1, range(self.num_ranks)
        forward = {(number, number + 1) for number in range(last)} | {(last, 0)}
        forward |= {(last, home) for home in ranks} | {(home, 0) for home in ranks}
        both = forward | {(receiver, sender) for sender, receiver in forward}
        return {pair for pair in both if pair[0] != pair[1]}


def ring_parts(decoder: Decoder, ring: Ring) -> list[set[str]]:
    """Names of the parts that each process of a ring uses: its slice's, and what homes need."""
    home = {"embedding", *last_parts(decoder)}
    if ring.is_routed:
        home.add(f"depth_routers.{ring.loop.number}")
    units = (*ring.front, *ring.back)
    home |= layer_parts(decoder, (visit.layer for unit in units for visit in unit.visits))
    return [home | layer_parts(decoder, layers) for layers in ring.slices]


def find_loop(program: Program) -> Segment | None:
    """The one loop of a program, None where there are several.

    Where nothing is repeated it is the longest segment.
    """
    loops = [segment for segment in program.segments if segment.num_passes > 1]
    if len(loops) > 1:
        return None
    routed = [segment for segment in program.segments if segment.router is not None]
    longest = max(program.segments, key=lambda segment: len(segment.passes[0]))
    return (loops or routed or [longest])[0]


def cut_ring(
    decoder: Decoder, num_ranks: int, row_length: int, measured: Sequence[float] | None = None
) -> Ring:
    """Slices as alike in cost as whole layers allow.

    `measured` has the cost of each layer on a full row, in the order of the program, and of the
    head. Raises ValueError for a program that is not one loop or has too few layers in it.
    """
    program = decoder.program
    loop = find_loop(program)
    if loop is None:
        raise ValueError("a ring needs one loop")
    by_visit, head = _visit_costs(decoder, row_length, measured)
    layers = [visit.layer for visit in loop.passes[0]]
    if len(layers) < num_ranks:
        raise ValueError(f"the block that is repeated has {len(layers)} layers to cut")
    totals = [
        sum(cost for visit, cost in by_visit.items() if visit.layer == layer) for layer in layers
    ]
    slices = tuple(tuple(layers[run.start : run.stop]) for run in cut(totals, num_ranks))
    first, last = loop.passes[0][0].index, loop.passes[-1][-1].index
    front = tuple(unit for unit in program.units if unit.end <= first)
    back = tuple(unit for unit in program.units if unit.visits[0].index > last)

    def total(visits: Iterable[Visit], among: Sequence[str] | None = None) -> float:
        return sum(by_visit[v] for v in visits if among is None or v.layer in among)

    costs = Costs(
        total(visit for unit in front for visit in unit.visits),
        _decisions(decoder, loop, row_length, measured is not None),
        tuple(tuple(total(visits, own) for own in slices) for visits in loop.passes),
        total(visit for unit in back for visit in unit.visits) + head,
    )
    return Ring(front, loop, back, slices, costs)


def _visit_costs(
    decoder: Decoder, row_length: int, measured: Sequence[float] | None
) -> tuple[dict[Visit, float], float]:
    """Of each visit on the tokens that the schedule foresees, and of the head."""
    program = decoder.program
    if measured is None:
        work = planned_work(decoder, 1, row_length)
        modelled = {cost.visit: float(cost.flops) for cost in visit_costs(decoder, work)}
        return modelled, float(decoder.head_flops(row_length))
    *layers, head = measured
    of_layer = dict(zip(program.layers, layers, strict=True))
    found = {
        visit: of_layer[visit.layer] * share
        for segment in program.segments
        for share, visits in zip(segment.shares(FINAL_STEP), segment.passes, strict=True)
        for visit in visits
    }
    return found, head


def _decisions(
    decoder: Decoder, loop: Segment, row_length: int, are_measured: bool
) -> tuple[float, ...]:
    """Next to nothing; what is measured has no unit in which a router's FLOPs could be told."""
    if loop.router is None or are_measured:
        return (0.0,) * len(loop.passes)
    work = planned_work(decoder, 1, row_length)
    sites = [loop.site(number + 1) for number in range(len(loop.passes))]
    return tuple(
        float(depth_router_flops(decoder, Work(candidates={site: work.candidates[site]})))
        for site in sites
    )


def way(ring: Ring, home: int, config: RingConfig) -> Way:
    """The stops of a micro-batch; what is kept counts residual streams of full micro-batches.

    With `merge` a micro-batch is as many joined ones as there are passes, and chunks share the
    cost of a pass.
    """
    scale = ring.num_passes if config.merge else 1
    shares = ring.loop.shares(FINAL_STEP)
    extra = 1 if config.recompute else 0
    stops: list[Stop] = []
    for place in ring.places:
        if place.slice is None:
            time = scale * _home_cost(ring, place)
            layers = _home_layers(ring, place)
            kept = scale * (1 + STREAMS_PER_LAYER * layers)
            stops.append(Stop(home, time, BACKWARD_PER_FORWARD * time, kept=kept, is_home=True))
            continue
        share, number = shares[place.depth - 1], ring.chunks(place.depth, config.merge)
        time = scale * ring.costs.slices[place.depth - 1][place.slice] / number
        streams = 1.0 if config.recompute else STREAMS_PER_LAYER * len(ring.slices[place.slice])
        backward = (BACKWARD_PER_FORWARD + extra) * time
        stops.append(
            Stop(place.slice, time, backward, number, kept=scale * share * streams / number)
        )
    return tuple(stops)


def _home_cost(ring: Ring, place: Place) -> float:
    costs = ring.costs
    if place.depth > ring.num_passes:
        return costs.back
    decision = costs.decisions[place.depth - 1]
    return decision + (costs.front if place.depth == 1 else 0.0)


def _home_layers(ring: Ring, place: Place) -> int:
    """Layers whose activations a home keeps."""
    if place.depth > ring.num_passes:
        return sum(len(unit.visits) for unit in ring.back)
    return sum(len(unit.visits) for unit in ring.front) if place.depth == 1 else 0

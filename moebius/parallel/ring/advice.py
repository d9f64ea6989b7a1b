"""Which layout of the same processes for a looped block, and why: each is priced alike.

Times are in FLOPs of a process and come from counted products, planned orders and bytes; nothing
is measured. Messages and gathers count as if they were hidden behind products completely, or the
products behind them: the longer of the two is the time. So prices rank layouts; they do not promise
speeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from moebius.model.context import Recompute
from moebius.model.cost import BACKWARD_PER_FORWARD
from moebius.model.decoder import Decoder
from moebius.model.moe.experts import DispatchedExperts
from moebius.model.moe.layer import MoE
from moebius.model.program import FINAL_STEP
from moebius.parallel.config import RingConfig
from moebius.parallel.ring.executor import joined, plan_ring
from moebius.parallel.ring.slices import STREAMS_PER_LAYER, Ring, cut_ring, ring_parts
from moebius.parallel.schedule import most_in_flight, simulate
from moebius.parallel.schedule import plan as plan_pipeline
from moebius.parallel.stage import cut_stages, part_of, parts_of, unit_costs

ELEMENT = 4
"""bytes of parameters, gradients, moments and of the residual stream"""
STATE = 4 * ELEMENT
"""bytes that a parameter takes with its gradient and two moments"""
STREAMS_KEPT = 4
"""residual streams that a layer keeps with `recompute: full`: what goes into both sublayers, before
and after their norms"""
CLOSE = 1.02
"""times that differ by less are alike; the simpler layout, which comes first, is then better"""


@dataclass(frozen=True)
class Machine:
    """What processes have."""

    flops_per_byte: float
    """FLOPs that a process computes in the time in which it sends a byte"""
    memory: float
    """bytes"""


@dataclass(frozen=True)
class Job:
    """What so many processes do in a step."""

    num_ranks: int
    num_micro_batches: int
    """of all of them together"""
    rows: int
    """of a micro-batch"""
    row_length: int
    recompute: Recompute = "none"
    """what layouts without a ring compute a second time"""


@dataclass(frozen=True)
class Price:
    """What a layout costs a process."""

    name: str
    options: str
    """of the section `parallel`"""
    state_bytes: float
    """parameters, gradients, moments, and what is gathered of them at a time"""
    activation_bytes: float
    """the most that waits for its backward pass"""
    sent_bytes: float
    """in a step"""
    bubble: float
    """waiting for others over working, what is computed a second time not counted as work"""
    time: float
    """of a step, in FLOPs"""

    @property
    def memory(self) -> float:
        """All that it needs."""
        return self.state_bytes + self.activation_bytes


def prices(decoder: Decoder, job: Job, machine: Machine, config: RingConfig) -> list[Price]:
    """Of all layouts that there are, simpler ones first. `decoder` is whole and may lie on `meta`.

    Raises ValueError for a program that is not one loop, or has too few layers.
    """
    pricing = _Pricing(decoder, job, machine, cut_ring(decoder, job.num_ranks, job.row_length))
    found = [pricing.fsdp2(), pricing.experts(), pricing.pipeline(), pricing.ring_price(config)]
    return [price for price in found if price is not None]


def recommend(found: Sequence[Price], job: Job, machine: Machine) -> tuple[Price, list[str]]:
    """The layout to take, and what speaks against the others."""
    fitting = [price for price in found if price.memory <= machine.memory]
    if not fitting:
        best = min(found, key=lambda price: price.memory)
        reason = f"none fits into {gigabytes(machine.memory)}, {best.options} needs least"
        return best, [reason, *_waiting(found, job)]
    fastest = min(price.time for price in fitting)
    best = next(price for price in fitting if price.time <= CLOSE * fastest)
    reasons = []
    for price in found:
        if price is best:
            continue
        reason = f"{price.options} takes {price.time / best.time:.2f} times as long"
        if price.memory > machine.memory:
            room = gigabytes(machine.memory)
            reason = f"{price.options} needs {gigabytes(price.memory)} of {room}"
        elif price.time <= CLOSE * best.time:
            reason += ", and is less simple"
        reasons.append(reason)
    return best, [*reasons, *_waiting(found, job)]


def _waiting(found: Sequence[Price], job: Job) -> Iterator[str]:
    """What a ring gives for what: a pipeline of stages that cost the same may wait less."""
    balanced = (job.num_ranks - 1) / job.num_micro_batches
    for price in found:
        if price.name == "ring":
            verdict = "less" if price.bubble < balanced else "more"
            yield (
                f"the ring waits {price.bubble:.1%} of its work, {verdict} than the {balanced:.1%} "
                "of 1F1B over unrolled stages that cost exactly the same, with more micro-batches "
                "on their way"
            )


def gigabytes(number: float) -> str:
    """For people."""
    return f"{number / 1e9:,.1f} GB"


class _Pricing:
    """One job on one machine."""

    def __init__(self, decoder: Decoder, job: Job, machine: Machine, ring: Ring) -> None:
        self.decoder = decoder
        self.job = job
        self.machine = machine
        self.ring = ring
        costs = ring.costs
        self.sizes: dict[str, int] = {}
        for name, parameter in decoder.named_parameters():
            part = part_of(name)
            self.sizes[part] = self.sizes.get(part, 0) + parameter.numel()
        self.total = sum(self.sizes.values())
        self.stream = ELEMENT * job.rows * job.row_length * decoder.config.hidden_size
        """bytes of the residual stream of a micro-batch"""
        self.shares = {
            visit: share
            for segment in decoder.program.segments
            for share, visits in zip(segment.shares(FINAL_STEP), segment.passes, strict=True)
            for visit in visits
        }
        """of the tokens that are in a visit"""
        self.forward = job.rows * (
            costs.front + sum(costs.decisions) + sum(map(sum, costs.slices)) + costs.back
        )
        """FLOPs of a micro-batch"""
        self.own = -(-job.num_micro_batches // job.num_ranks)
        """micro-batches of a process, where each runs whole ones"""
        streams = STREAMS_KEPT if job.recompute == "full" else STREAMS_PER_LAYER
        self.activations = self.stream * streams * sum(self.shares.values())
        """bytes of a micro-batch in all layers"""

    def _busy(self, num_micro_batches: float) -> float:
        """FLOPs of so many micro-batches without a ring."""
        again = 1 if self.job.recompute == "full" else 0
        return (1 + BACKWARD_PER_FORWARD + again) * self.forward * num_micro_batches

    def _price(
        self,
        name: str,
        options: str,
        state: float,
        activations: float,
        sent: float,
        time: float,
        bubble: float = 0.0,
    ) -> Price:
        """`time` is that of work and waiting; messages may take longer."""
        time = max(time, sent * self.machine.flops_per_byte)
        return Price(name, options, state, activations, sent, bubble, time)

    def fsdp2(self) -> Price:
        """Every parameter is gathered for each micro-batch, twice, and its gradient scattered; one
        unit, the loop, is whole at a time."""
        size = self.job.num_ranks
        loop = sum(self.sizes[part] for part in self._block())
        sent = 3 * ELEMENT * self.total * (size - 1) / size * self.own
        state = STATE * self.total / size + 2 * ELEMENT * loop
        return self._price(
            "fsdp2", "data: fsdp2", state, self.activations, sent, self._busy(self.own)
        )

    def experts(self) -> Price | None:
        """Experts are shared out; all else is held by everyone, but for its moments (ZeRO-1)."""
        size, pools = self.job.num_ranks, self._dispatched()
        of_experts = sum(p.numel() for pool in pools for p in pool.parameters())
        if not of_experts or any(_count(pool) % size for pool in pools):
            return None
        state = STATE * of_experts / size
        state += (self.total - of_experts) * ELEMENT * (2 + 2 / size)
        # There and back, forward and backward; at most, a token's experts being on as many others.
        rows = sum(
            share * min(moe.config.num_assignments, size - 1)
            for visit, share in self.shares.items()
            if isinstance(moe := getattr(self.decoder.layers[visit.layer], "ffn", None), MoE)
        )
        sent = 4 * rows * self.stream * self.own
        return self._price(
            "experts", f"ep: {size}", state, self.activations, sent, self._busy(self.own)
        )

    def pipeline(self) -> Price | None:
        """The unrolled depth in stages of equal cost; what several stages hold is added up."""
        size, decoder, number = self.job.num_ranks, self.decoder, self.job.num_micro_batches
        if len(decoder.program.units) < size:
            return None
        stages = cut_stages(decoder, size, self.job.row_length)
        costs = iter(unit_costs(decoder, self.job.row_length))
        times = [self.job.rows * float(sum(islice(costs, len(s.units)))) for s in stages]
        times[-1] += self.job.rows * decoder.head_flops(self.job.row_length)
        actions = plan_pipeline("1f1b", size, 1, number)
        timing = simulate(actions, times, [BACKWARD_PER_FORWARD * time for time in times])
        parts = [parts_of(decoder, [stage]) for stage in stages]
        held = max(sum(self.sizes[part] for part in own) for own in parts)
        copies = {part: sum(part in own for own in parts) for part in self.sizes}
        tied = max(
            sum(2 * (copies[p] - 1) / copies[p] * ELEMENT * self.sizes[p] for p in own)
            for own in parts
        )
        sent = tied + 2 * self.stream * number
        kept = max(
            count * time / self.forward * self.activations
            for count, time in zip(most_in_flight(actions), times, strict=True)
        )
        bubble = 1 / (1 - timing.idle_share) - 1
        time = self._busy(number / size) * (1 + bubble)
        return self._price("pipeline", f"pp: {size}", STATE * held, kept, sent, time, bubble)

    def ring_price(self, config: RingConfig) -> Price:
        """A slice of the block, and the ends."""
        size, number = self.job.num_ranks, self.job.num_micro_batches
        timeline = plan_ring(self.ring, config, joined(self.ring, config, number))
        parts = ring_parts(self.decoder, self.ring)
        held = max(sum(self.sizes[part] for part in own) for own in parts)
        ends = sum(self.sizes[part] for part in parts[0].intersection(*parts))
        ways_home = 1 - 2 / size  # one more than slices, but for the slices that are at home
        hops = sum(self.ring.loop.shares(FINAL_STEP)) * (size + ways_home)
        if not self.ring.is_routed:
            hops = self.ring.num_passes * size + ways_home
        sent = 2 * self.stream * hops * number / size
        sent += 2 * (size - 1) / size * ELEMENT * ends
        total = sum(e.end - e.start for e in timeline.events)
        waits = (timeline.makespan * size - total) * self.job.rows / size
        needed = (1 + BACKWARD_PER_FORWARD) * self.forward * number / size
        again = 0.0
        if config.recompute:  # one visit at a time is whole
            layers = max(len(layers) for layers in self.ring.slices)
            again = self.stream * STREAMS_PER_LAYER * layers
        return self._price(
            "ring",
            f"rp: {size}" + ", ring: {merge: true}" * config.merge,
            STATE * held,
            max(timeline.peaks) * self.stream + again,
            sent,
            total * self.job.rows / size + waits,
            waits / needed,
        )

    def _block(self) -> set[str]:
        parts = ring_parts(self.decoder, self.ring)
        return parts[0].union(*parts) - parts[0].intersection(*parts)

    def _dispatched(self) -> list[DispatchedExperts]:
        return [m for m in self.decoder.modules() if isinstance(m, DispatchedExperts)]


def _count(pool: DispatchedExperts) -> int:
    return next(iter(pool.parameters())).shape[0]

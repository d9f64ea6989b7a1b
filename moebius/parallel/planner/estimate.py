"""A plan: what each process of a layout holds and sends, and how long a step will take.

Memory and bytes come from simulated processes; FLOPs, idle time and links from counts. What a plan
assumes it says: `assumptions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from moebius.model.cost import balanced_rows, planned_work
from moebius.model.decoder import Decoder
from moebius.model.moe.experts import DispatchedExperts
from moebius.model.moe.layer import MoE
from moebius.model.parameters import named_specs
from moebius.parallel.config import ParallelConfig
from moebius.parallel.engine import begin_state
from moebius.parallel.fsdp import loops_of
from moebius.parallel.planner.device import GIGA, DeviceProfile
from moebius.parallel.planner.flops import Flops, flops_of
from moebius.parallel.planner.idle import idle_share
from moebius.parallel.planner.links import Exchange, exchanges
from moebius.parallel.planner.live import Memory, bytes_of, optimizer_state
from moebius.parallel.planner.shapes import Shapes
from moebius.parallel.planner.simulate import Job, Usage
from moebius.parallel.planner.whole_step import Shape, use_of_whole_step
from moebius.parallel.planner.world import SimulatedMesh

ROOM = 0.9
"""of a device's memory; the rest is for libraries and what allocators cannot use"""
IMBALANCE = 1.25
"""rows of the process whose experts have most, over the mean"""
STREAMS_PER_ROW, WIDTHS_PER_ROW = 2, 3
"""what an expert keeps of a row: input and output; gate, up and their product"""
UPDATE_PASSES = 3.5
"""times that an update moves as much as the two moments of its parameters: it reads gradients,
moments and weights, and writes moments and weights"""
STORAGE = 2e9
"""bytes per second that a node writes of a checkpoint"""


@dataclass(frozen=True)
class Plan:
    """Of the process that needs most memory, unless it says otherwise."""

    job: Job
    device: DeviceProfile
    num_parameters: int
    """of the whole model"""
    usage: Usage
    headroom: int
    """bytes, should the experts of a process get `IMBALANCE` times the mean"""
    exchanges: tuple[Exchange, ...]
    flops: Flops
    fullest: float
    """rows of the process that has most, over the mean"""
    idle_share: float
    checkpoint_bytes: int

    @property
    def memory(self) -> Memory:
        """When the step holds most, the headroom of the passes considered."""
        return self.usage.update if self.is_in_update else self.usage.passes

    @property
    def is_in_update(self) -> bool:
        """Whether the step holds most while weights are updated."""
        return self.usage.update.total > self.usage.passes.total + self.headroom

    @property
    def total_bytes(self) -> int:
        """All that is planned for."""
        return self.memory.total + (0 if self.is_in_update else self.headroom)

    @property
    def fits(self) -> bool:
        """Whether a device has room for it."""
        return self.total_bytes <= ROOM * self.device.memory

    @property
    def peak(self) -> float:
        """FLOPs per second that a device could do at most."""
        return self.device.flops_fp32 if self.job.autocast is None else self.device.flops_bf16

    @property
    def rate(self) -> float:
        """FLOPs per second that a device is planned to reach while it computes."""
        return self.peak * self.device.efficiency

    @property
    def compute_seconds(self) -> float:
        """Of a process with most rows, without waiting."""
        mean = (self.flops.model + self.flops.again) / self.job.world_size
        return self.fullest * mean / self.rate

    @property
    def idle_seconds(self) -> float:
        """Waiting for processes with other layers."""
        return self.compute_seconds * self.idle_share / (1 - self.idle_share)

    @property
    def exchange_seconds(self) -> float:
        """Communication that nothing hides: gathers of FSDP2 hide behind what is computed."""
        hidden = sum(e.seconds for e in self.exchanges if e.is_hidden)
        shown = sum(e.seconds for e in self.exchanges if not e.is_hidden)
        return shown + max(0.0, hidden - self.compute_seconds)

    @property
    def update_seconds(self) -> float:
        """What the optimizer moves, and its products."""
        moved = UPDATE_PASSES * self.usage.update.optimizer
        return moved / self.device.memory_bandwidth + self.usage.update_flops / self.rate

    @property
    def step_seconds(self) -> float:
        """All of it."""
        return (
            self.compute_seconds + self.idle_seconds + self.exchange_seconds + self.update_seconds
        )

    @property
    def mfu(self) -> float:
        """FLOPs of the model over what the devices could do at their peak."""
        return self.flops.model / self.step_seconds / self.job.world_size / self.peak

    @property
    def tokens_per_day(self) -> float:
        """Of all processes."""
        return 86400 * self.job.rows * self.job.row_length / self.step_seconds

    @property
    def save_seconds(self) -> float:
        """Writing a checkpoint, all nodes at once."""
        nodes = math.ceil(self.job.world_size / self.device.devices_per_node)
        return self.checkpoint_bytes / (nodes * STORAGE)

    @property
    def save_interval(self) -> float:
        """Seconds between checkpoints at which least is lost (Young 1974, Daly 2006, first order):
        the root of 2 * save time * mean time between failures."""
        hours = self.device.mean_hours_between_failures / self.job.world_size
        return math.sqrt(2 * self.save_seconds * 3600 * hours)

    def assumptions(self) -> Iterator[str]:
        """What is not counted but supposed."""
        device, job = self.device, self.job
        precision = "fp32" if job.autocast is None else str(job.autocast).removeprefix("torch.")
        yield (
            f"products reach {self.rate / 1e12:.3g} TFLOP/s in {precision}: "
            f"{device.efficiency:.0%} of {device.name}'s peak ({device.source})"
        )
        yield (
            f"links: {device.node.bandwidth / GIGA:.3g} GB/s in a node of "
            f"{device.devices_per_node}, {device.network.bandwidth / GIGA:.3g} GB/s between nodes, "
            "each device its own share of the network, ring algorithms; messages between stages "
            "and gathers of FSDP2 hide behind what is computed, all else waits"
        )
        yield (
            "loads of experts are even, a dynamic number of experts is at its cap"
            + (f"; headroom is for {IMBALANCE} times the mean" if self.headroom else "")
        )
        yield (
            f"kernels keep what the plain ones keep; {1 - ROOM:.0%} of the memory are left to "
            "libraries and allocators"
        )
        yield (
            f"a node writes {STORAGE / GIGA:.3g} GB/s of a checkpoint; a device fails every "
            f"{device.mean_hours_between_failures:,.0f} hours"
        )


def make_plan(job: Job, device: DeviceProfile) -> Plan:
    """Simulate a layout that is legal for the model, and work out the rest.

    Raises LayoutError where the processes do not fill the axes.
    """
    with torch.device("meta"):
        decoder = Decoder(job.model)
    usage = max(_usages(job, decoder), key=lambda usage: usage.memory.total)
    dp = Shape.of(job).dp
    mesh = SimulatedMesh(job.parallel, usage.rank, job.world_size)
    return Plan(
        job=job,
        device=device,
        num_parameters=sum(p.numel() for p in decoder.parameters()),
        usage=usage,
        headroom=_headroom(job, decoder),
        exchanges=tuple(exchanges(usage.traffic, mesh, device)),
        flops=flops_of(job, decoder),
        fullest=math.ceil(job.rows / dp) * dp / job.rows,
        idle_share=idle_share(job, decoder),
        checkpoint_bytes=_checkpoint_bytes(job),
    )


def _usages(job: Job, decoder: Decoder) -> list[Usage]:
    """Of processes with different layers.

    FSDP2 frees what it has gathered by means that a simulation does not see. What waits for the
    backward pass is that of the same processes without it; to this comes what is gathered at once:
    two units, the gradients of one, what belongs to no unit, and experts that are spread: these
    stay until their backward pass.
    """
    found = use_of_whole_step(job)
    if job.parallel.data != "fsdp2":
        return found
    (usage,) = found
    changes = {"data": "zero1", "dp_replicate": 1}
    (like,) = use_of_whole_step(replace(job, parallel=job.parallel.model_copy(update=changes)))
    layers, config = decoder.program.layers, job.parallel
    sizes = {name: _gathered_size(decoder.layers[name], config) for name in layers}
    units = [
        sum(sizes[name] for name in {visit.layer for unit in units for visit in unit.visits})
        for units in loops_of(decoder.program)
    ]
    outside = _gathered_size(decoder, config) - sum(sizes.values())
    staying = _expert_size(decoder, config) if config.ep * config.etp > 1 else 0
    gathered = 3 * max(units) + 2 * outside + staying
    passes = replace(
        usage.passes,
        gradients=usage.gradients,
        activations=like.passes.activations + gathered,
        exchanged=like.passes.exchanged + gathered,
    )
    update = replace(usage.update, activations=0, exchanged=0)
    return [replace(usage, passes=passes, update=update)]


def _gathered_size(module: nn.Module, config: ParallelConfig) -> int:
    """Bytes that a process holds of a module whose parameters are gathered."""
    experts = _expert_size(module, ParallelConfig())
    return (_size(module) - experts) // config.tp + _expert_size(module, config)


def _expert_size(module: nn.Module, config: ParallelConfig) -> int:
    """The same of its experts."""
    experts = sum(_size(m) for m in module.modules() if isinstance(m, DispatchedExperts))
    return experts // (config.ep * config.etp)


def _size(module: nn.Module) -> int:
    """Bytes of parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _headroom(job: Job, decoder: Decoder) -> int:
    """Bytes of rows that experts get beyond the mean, of all visits, or of one where the rest is
    computed again."""
    config = job.parallel
    if config.ep == 1:
        return 0
    work = planned_work(decoder, job.micro_batch_size, job.row_length)
    rows = balanced_rows(decoder, work)
    element = 4 if job.autocast is None else 2
    shares = config.cp * (config.tp if config.sequence_parallel else 1)
    kept = []
    for visit in work.visits:
        moe = getattr(decoder.layers[visit.layer], "ffn", None)
        if not isinstance(moe, MoE):
            continue
        pool = moe.config.pool
        dispatched = sum(rows[visit.site("ffn", 1)][: pool.num_dispatched]) * moe.config.iterations
        width = max(spec.intermediate_size or 0 for spec in moe.config.sorted_experts)
        numbers = STREAMS_PER_ROW * job.model.hidden_size + WIDTHS_PER_ROW * width // config.etp
        kept.append(dispatched / shares * numbers * element)
    alive = max(kept, default=0.0) if job.recompute == "full" else sum(kept)
    if config.rp > 1 and config.ring.recompute:  # one visit to a slice at a time
        alive = min(alive, sum(kept) / (config.rp * job.model.depth.num_recursions))
    return round((IMBALANCE - 1) * alive)


def _checkpoint_bytes(job: Job) -> int:
    """Weights and what the optimizer remembers of them, of the whole model."""
    with Shapes():
        decoder = Decoder(job.model)
        optimizer = job.make_optimizer((p, spec) for _, p, spec in named_specs(decoder))
        begin_state(optimizer)
        return _size(decoder) + bytes_of(optimizer_state(optimizer))

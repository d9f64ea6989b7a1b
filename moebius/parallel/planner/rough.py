"""Rough prices of layouts, by which a search decides which ones to simulate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moebius.model.context import Recompute
from moebius.model.cost import balanced_rows, forward_flops, planned_work
from moebius.model.decoder import Decoder
from moebius.model.moe.experts import DispatchedExperts
from moebius.model.moe.layer import MoE
from moebius.model.program import FINAL_STEP
from moebius.parallel.config import ParallelConfig
from moebius.parallel.planner.device import DeviceProfile
from moebius.parallel.planner.idle import idle_share
from moebius.parallel.planner.simulate import Job, simulate
from moebius.parallel.planner.whole_step import Shape

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
ELEMENT = 4
"""bytes of weights, gradients and moments"""
COLLECTIVES_OF_TP = 8
"""gathers and reduce-scatters of a layer, forwards and backwards"""
LIVE_ON_RING = 2.0
"""micro-batches of a process that are alive on a ring, over those of a pipeline"""


@dataclass(frozen=True)
class Price:
    """What a layout costs a process, roughly."""

    memory: float
    """bytes"""
    seconds: float
    """of a step"""


class Pricing:
    """Prices of layouts of one job."""

    def __init__(self, job: Job, device: DeviceProfile) -> None:
        self.job = job
        self.device = device
        with torch.device("meta"):
            self.decoder = Decoder(job.model)
        self.sizes = sum(p.numel() for p in self.decoder.parameters())
        pools = [m for m in self.decoder.modules() if isinstance(m, DispatchedExperts)]
        self.of_experts = sum(p.numel() for pool in pools for p in pool.parameters())
        work = planned_work(self.decoder, job.rows, job.row_length)
        rows = balanced_rows(self.decoder, work)
        self.forward = forward_flops(self.decoder, work, rows)
        self.row_bytes = self._activations()
        self.element = 4 if job.autocast is None else 2
        shares = [
            (visit, share)
            for segment in self.decoder.program.segments
            for share, visits in zip(segment.shares(FINAL_STEP), segment.passes, strict=True)
            for visit in visits
        ]
        self.visits = sum(share for _, share in shares)
        """visits of a token"""
        self.assignments = sum(
            share * moe.config.num_assignments * moe.config.iterations
            for visit, share in shares
            if isinstance(moe := getattr(self.decoder.layers[visit.layer], "ffn", None), MoE)
        )
        """of a token in all visits"""
        self.waits: dict[tuple[str, int], float] = {}

    def _activations(self) -> Mapping[Recompute, float]:
        """Bytes of a row by what is computed again, on one process."""
        found: dict[Recompute, float] = {}
        for recompute in RECOMPUTES:
            alone = replace(
                self.job,
                parallel=ParallelConfig(),
                world_size=1,
                rows=1,
                micro_batch_size=1,
                recompute=recompute,
            )
            (usage,) = simulate(alone)
            found[recompute] = usage.passes.activations
        return found

    def price(self, job: Job) -> Price:
        """Of a layout that is legal."""
        return Price(self._memory(job), self._seconds(job))

    def _held(self, job: Job) -> tuple[float, float]:
        """Parameters of a process, and how many it updates."""
        config, size = job.parallel, job.world_size
        depth = config.pp * config.rp
        dense = (self.sizes - self.of_experts) / (depth * config.tp)
        experts = self.of_experts / (depth * config.ep * config.etp)
        stage = size // depth
        updated = dense / (stage / config.tp) + experts / (stage / (config.ep * config.etp))
        return dense + experts, updated

    def _memory(self, job: Job) -> float:
        config = job.parallel
        held, updated = self._held(job)
        sequence = config.tp if config.sequence_parallel else 1
        alive = LIVE_ON_RING if config.rp > 1 else 1.0
        activations = self.row_bytes[job.recompute] * job.micro_batch_size * alive
        activations /= sequence * config.cp
        if config.data == "fsdp2":
            layers = len(self.decoder.program.layers)
            return ELEMENT * (4 * updated + 3 * held / layers) + activations
        return ELEMENT * (2 * held + 2 * updated) + max(activations, ELEMENT * held)

    def _seconds(self, job: Job) -> float:
        device, config = self.device, job.parallel
        peak = device.flops_fp32 if job.autocast is None else device.flops_bf16
        again = self.forward if job.recompute == "full" else 0
        compute = (3 * self.forward + again) / job.world_size / (peak * device.efficiency)
        key = (f"{config.pp} {config.rp} {config.ring.merge}", Shape.of(job).micro_batches)
        if key not in self.waits:
            self.waits[key] = idle_share(job, self.decoder)
        return compute / (1 - self.waits[key]) + self._exchanges(job, compute)

    def _exchanges(self, job: Job, compute: float) -> float:
        device, config = self.device, job.parallel
        tokens = job.rows * job.row_length / job.world_size
        stream = tokens * job.model.hidden_size * self.element
        near = device.node.bandwidth
        time = COLLECTIVES_OF_TP * stream * self.visits * (config.tp - 1) / near
        ep = config.ep * config.etp
        of_experts = near if ep <= device.devices_per_node else device.network.bandwidth
        if ep > 1 and self.visits:
            travels = min(self.assignments, self.visits * (config.ep - 1))
            time += 4 * stream * travels / of_experts
        held, _ = self._held(job)
        across = job.world_size > device.devices_per_node
        of_data = device.network.bandwidth if across else near
        if config.data == "fsdp2":
            gathered = 3 * ELEMENT * held * Shape.of(job).micro_batches / of_data
            return time + max(0.0, gathered - compute)
        return time + 2 * ELEMENT * held / of_data

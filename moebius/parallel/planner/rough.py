"""Rough prices of layouts, by which a search decides which ones to simulate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moebius.model.context import Recompute
from moebius.model.decoder import Decoder
from moebius.model.moe.experts import DispatchedExperts
from moebius.model.moe.layer import MoE
from moebius.model.program import FINAL_STEP
from moebius.parallel.config import ParallelConfig
from moebius.parallel.planner.device import DeviceProfile
from moebius.parallel.planner.flops import flops_of
from moebius.parallel.planner.idle import idle_share
from moebius.parallel.planner.links import Reach, link_of
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
        self.flops: dict[tuple[Recompute, bool], float] = {}
        """by what is computed again, and whether on a ring"""

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

    def _held(self, job: Job) -> tuple[float, float, float]:
        """Parameters of a process, of experts and others, and how many it updates."""
        config, size = job.parallel, job.world_size
        depth = config.pp * config.rp
        dense = (self.sizes - self.of_experts) / (depth * config.tp)
        experts = self.of_experts / (depth * config.ep * config.etp)
        stage = size // depth
        updated = dense / (stage / config.tp) + experts / (stage / (config.ep * config.etp))
        return experts, dense, updated

    def _memory(self, job: Job) -> float:
        config = job.parallel
        experts, dense, updated = self._held(job)
        held = experts + dense
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
        kind = (job.recompute, config.rp > 1)
        if kind not in self.flops:
            flops = flops_of(job, self.decoder)
            self.flops[kind] = flops.model + flops.again
        compute = self.flops[kind] / job.world_size / (peak * device.efficiency)
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
        experts, dense, _ = self._held(job)
        once = ELEMENT * (experts / self._rate(job, ep) + dense / self._rate(job, config.tp))
        if config.data == "fsdp2":
            return time + max(0.0, 3 * once * Shape.of(job).micro_batches - compute)
        return time + 2 * once

    def _rate(self, job: Job, inner: int) -> float:
        """Bytes per second of a process in gathers among those that hold the same, which `inner`
        processes side by side share out."""
        per_node, stage = self.device.devices_per_node, job.world_size // job.parallel.pp
        stage //= job.parallel.rp
        reach = Reach(stage // inner, stage > per_node, max(1, per_node // inner))
        return link_of(reach, "all_gather", self.device).bandwidth

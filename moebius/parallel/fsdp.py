"""FSDP2 and HSDP (Zhao et al. 2023, arXiv 2304.11277): parameters are shared out, too.

A unit of sharding is a layer, or all passes of a recursion: its parameters are gathered once for
however many uses.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moebius.model.carry import Carry
from moebius.model.context import StepContext, TokenContext
from moebius.model.executor import Flow, LocalExecutor, TokenBatch
from moebius.model.moe.experts import DispatchedExperts
from moebius.model.objective import TeacherModel
from moebius.model.parameters import Role
from moebius.model.program import Program, Unit
from moebius.parallel.engine import (
    Holding,
    MakeOptimizer,
    begin_state,
    clip,
    square,
    step_where,
    sum_tensors,
)
from moebius.parallel.mesh import Mesh, partition
from moebius.parallel.messages import put_together, taken_apart
from moebius.parallel.part import Part, Parts
from moebius.parallel.place import Placed


class Root(nn.Module):
    """The unit of what belongs to no loop: whatever runs in it finds those parameters whole."""

    def __init__(self, decoder: nn.Module, loops: Iterable[nn.Module]) -> None:
        super().__init__()
        self.loops = nn.ModuleList(loops)
        self.decoder = decoder

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(*inputs)`."""
        return function(*inputs)


class Repeated(nn.Module):
    """Modules that are used several times before they are let go."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)

    def forward(self, function: Callable[..., Any], nest: Any, *tensors: Tensor) -> Any:
        """`function` of a nest whose tensors are handed in where FSDP2 sees them."""
        return taken_apart(function(put_together(nest, tensors)))


@dataclass(frozen=True)
class Result:
    """What a loop leaves."""

    flow: Flow
    streams: dict[int, Tensor]
    """at exits"""


def loops_of(program: Program) -> Iterator[tuple[Unit, ...]]:
    """The units of a program, those of a loop together."""
    units = iter(program.units)
    for segment in program.segments:
        count = len(segment.passes)
        if segment.router is None:
            count = sum(len(visits) for visits in segment.passes)
        own = tuple(next(units) for _ in range(count))
        yield from (own,) if len(segment.passes) > 1 else ((unit,) for unit in own)


class ShardedExecutor(LocalExecutor):
    """Runs a decoder whose parameters are gathered unit by unit."""

    def __init__(self, local: LocalExecutor, mesh: Mesh) -> None:
        super().__init__(local.decoder, local.autocast_dtype, local.program, local.spread)
        self.loops: dict[str, Repeated] = {}
        """by layer"""
        for units in loops_of(self.program):
            names = {visit.layer: None for unit in units for visit in unit.visits}
            routers = {u.segment.number for u in units if u.segment is not None}
            loop = Repeated(
                [self.decoder.layers[name] for name in names]
                + [self.decoder.depth_routers[number] for number in routers]
            )
            self.loops |= dict.fromkeys(names, loop)
        dense = device_mesh(mesh.axes.dense, ("dp_replicate", "dp_shard", "cp"), mesh)
        self._shard_experts(mesh)
        loops = list(dict.fromkeys(self.loops.values()))
        empty = {p for p in self.decoder.parameters() if not p.numel()}
        for loop in loops:
            fully_shard(loop, mesh=dense, ignored_params=empty)
        self.root = Root(self.decoder, loops)
        # The decoder leads to the layers, too, past the loops that they belong to.
        inside = {parameter for loop in loops for parameter in loop.parameters()}
        inside |= {p for p in self.decoder.parameters() if isinstance(p, DTensor)}
        fully_shard(self.root, mesh=dense, ignored_params=inside | empty)
        # Losses of routers come in by views of the stream; nothing changes it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        for module in self.root.modules():
            if isinstance(module, FSDPModule):  # these act on one module only
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def training_loss(
        self, batch: TokenBatch, step: StepContext, teacher: TeacherModel | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `LocalExecutor`."""
        total, sums = self.root(super().training_loss, batch, step, teacher)
        return total, sums

    def token_losses(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """See `LocalExecutor`."""
        with torch.no_grad():
            losses: dict[int, Tensor] = self.root(super().token_losses, batch, step, exits)
        return losses

    def streams(
        self, x_BSD: Tensor, tokens: TokenContext, step: StepContext, exits: Sequence[int]
    ) -> dict[int, Tensor]:
        """See `LocalExecutor`."""
        flow = Flow(x_BSD, Carry())
        found: dict[int, Tensor] = {}
        program = self.program.until(max(exits))
        for loop, units in groupby(program.units, lambda unit: self.loops[unit.visits[0].layer]):
            run = partial(self._run_units, tuple(units), tokens, step, exits)
            nest, tensors = taken_apart(flow)
            made, tensors = loop(run, nest, *tensors)
            result: Result = put_together(made, tensors)
            flow = result.flow
            found |= result.streams
        return found

    def _run_units(
        self,
        units: Sequence[Unit],
        tokens: TokenContext,
        step: StepContext,
        exits: Sequence[int],
        flow: Flow,
    ) -> Result:
        """The flow after some units, and the streams at exits on the way."""
        seen = {}
        for unit in units:
            flow = self.run(unit, flow, tokens, step)
            if unit.end in exits:
                seen[unit.end] = flow.x_BSD
        return Result(flow, seen)

    def _shard_experts(self, mesh: Mesh) -> None:
        """Experts that several processes divide among them have fewer copies than the rest."""
        if mesh.experts.size == 1:
            return
        experts = device_mesh(mesh.axes.expert, ("edp",), mesh)
        for module in self.decoder.modules():
            if isinstance(module, DispatchedExperts):
                fully_shard(module, mesh=experts, reshard_after_forward=False)


def device_mesh(sizes: dict[str, int], axes: Sequence[str], mesh: Mesh) -> DeviceMesh:
    """The processes along some axes as torch wants them: the replicated axis, if longer than 1, and
    the others as one."""
    names: tuple[str, ...] = ("shard",)
    groups = [mesh.data if "cp" in axes else mesh.edp]
    grid = torch.tensor(next(ranks for ranks in partition(sizes, axes) if mesh.rank in ranks))
    if mesh.dp_replicate.size > 1 and "cp" in axes:
        names, groups = ("replicate", "shard"), [mesh.dp_replicate, mesh.shard]
        grid = grid.view(mesh.dp_replicate.size, -1)
    process_groups = [group.process_group or dist.new_subgroups(1)[0] for group in groups]
    if len(process_groups) == 1:
        return DeviceMesh.from_group(
            process_groups[0], mesh.device_type, grid, mesh_dim_names=names
        )
    return DeviceMesh.from_group(process_groups, mesh.device_type, grid, mesh_dim_names=names)


class FSDPEngine:
    """Every process updates the parts of parameters that it holds (`data: fsdp2`)."""

    skips = True

    def __init__(
        self, executor: ShardedExecutor, placed: Sequence[Placed], mesh: Mesh, make: MakeOptimizer
    ) -> None:
        self.mesh = mesh
        self.squares: dict[str, Tensor] | None = None
        named = dict(executor.decoder.named_parameters())
        self.placed = [replace(p, parameter=named[p.name]) for p in placed]
        # A parameter without elements (constants of a pool that has none) was left as it is.
        filled = [p for p in self.placed if p.parameter.numel()]
        self.optimizer = make((p.parameter, p.spec) for p in filled)
        begin_state(self.optimizer)

    def step(self, clip_norm: float, sound: Tensor | None = None) -> Tensor:
        """See `Engine`; over the data axes FSDP2 has reduced already."""
        self._add_up_rest()
        norm = clip(self._holdings(), self.mesh, clip_norm, self.squares)
        step_where(self.optimizer, norm, sound)
        self.optimizer.zero_grad()
        return norm

    def _add_up_rest(self) -> None:
        mesh = self.mesh
        rest = {mesh.data_tp: mesh.tp}
        rest |= {mesh.copies[number]: mesh.neighbours[number] for number in mesh.copies}
        for whole, group in rest.items():
            members = [p.parameter for p in self.placed if p.placement.reduce is whole]
            sum_tensors(group, [local(p.grad) for p in members if p.grad is not None])

    def weight_square(self) -> Tensor:
        """See `Engine`."""
        return square(self._holdings(), self.mesh)

    def _holdings(self) -> Iterable[Holding]:
        mesh = self.mesh
        stage_size = mesh.world.size // mesh.depth.size
        for p in self.placed:
            if p.spec.role is Role.FROZEN:
                continue
            shards = mesh.edp if p.placement.reduce is mesh.edp else mesh.shard
            gradient = p.parameter.grad
            yield Holding(
                p.name,
                local(p.parameter.detach()),
                None if gradient is None else local(gradient),
                p.spec.role,
                p.placement.replicas(stage_size) // shards.size,
            )

    def parts(self) -> dict[str, Part]:
        """See `Engine`."""
        found = {}
        for p in self.placed:
            found[f"model/{p.name}"] = shared_part(p.parameter, p)
            for key, value in self.optimizer.state.get(p.parameter, {}).items():
                name = f"optimizer/{p.name}/{key}"
                found[name] = Part.of(value) if value.dim() == 0 else shared_part(value, p)
        return {name: part for name, part in found.items() if part.chunks}

    def take_over(self, parts: Parts) -> None:
        """See `Engine`: the parts are what it works on."""


def shared_part(tensor: Tensor, p: Placed) -> Part:
    """What this process has of a parameter, or of its state, of which FSDP2 cuts the rows."""
    cuts = p.placement.cuts
    if not isinstance(tensor, DTensor):
        return Part.of(tensor, cuts)
    # Rows in equal runs, the last one shorter; the replicated axis, if there is one, comes first.
    shards = tensor.device_mesh.size(tensor.device_mesh.ndim - 1)
    run = -(-tensor.shape[0] // shards)
    first = min(tensor.device_mesh.get_local_rank(tensor.device_mesh.ndim - 1) * run, len(tensor))
    row = math.prod(tensor.shape[1:])
    return Part.of(tensor.to_local(), cuts, tensor.shape, first * row)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""Placing a decoder on a mesh: its weights become the own parts of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moebius.model.decoder import Decoder
from moebius.model.parameters import ParameterSpec, named_specs
from moebius.model.spread import ALONE, Spread
from moebius.parallel.adaptive import SequenceCost
from moebius.parallel.arrangement import AdaptiveRows
from moebius.parallel.comm import Group
from moebius.parallel.config import ParallelConfig
from moebius.parallel.expert import split_experts
from moebius.parallel.mesh import Mesh
from moebius.parallel.placement import Cut, Placement
from moebius.parallel.rows import RowSpread
from moebius.parallel.stage import part_of
from moebius.parallel.tensor import split_weights


@dataclass(frozen=True)
class Placed:
    """A parameter of this process."""

    name: str
    parameter: nn.Parameter
    spec: ParameterSpec
    placement: Placement


def row_spread(config: ParallelConfig, mesh: Mesh, cost: SequenceCost | None = None) -> Spread:
    """How the rows of this process's batch are shared with others.

    `cost` is that of documents on processes, where they are placed by it.
    """
    if mesh.rows.size == 1:
        return ALONE
    shards = mesh.rows if config.sequence_parallel else mesh.cp
    if cost is None:
        return RowSpread(mesh.cp, shards)
    return AdaptiveRows(mesh.cp, shards, cost, config.context.room)


@torch.no_grad()
def place(
    decoder: Decoder, config: ParallelConfig, mesh: Mesh, tied: Mapping[str, Group]
) -> list[Placed]:
    """Cut the weights of a whole decoder, or of the part that a stage has, and say where they are.

    `tied` names the stages of the parts (see `stage.part_of`) that several have. The layout must be
    legal for the model, see `parallel.rules`.
    """
    cuts: dict[nn.Parameter, tuple[Cut, ...]] = {}
    reduce = _ReduceGroups(config, mesh)
    if mesh.tp.size > 1:
        for parameter, cut in split_weights(decoder, mesh.tp, config.sequence_parallel).items():
            cuts[parameter] = () if cut is None else (cut,)
            reduce.note_split(parameter, cut)
    for parameter, of_experts in _split_experts(decoder, config, mesh).items():
        cuts[parameter] = of_experts
        reduce.note_expert(parameter)
    placed = []
    for name, parameter, spec in named_specs(decoder):
        holders = tied.get(part_of(name))
        placement = Placement(cuts.get(parameter, ()), reduce.of(parameter), holders)
        parameter.data = placement.take(parameter.data).clone()
        placed.append(Placed(name, parameter, spec, placement))
    return placed


def _split_experts(
    decoder: Decoder, config: ParallelConfig, mesh: Mesh
) -> dict[nn.Parameter, tuple[Cut, ...]]:
    same_tokens = mesh.tp.size > 1 and not config.sequence_parallel
    if not same_tokens and mesh.experts.size == 1:
        return {}
    same = mesh.etp if same_tokens else None
    return split_experts(decoder, mesh.ep, mesh.etp, mesh.experts, same)


class _ReduceGroups:
    """Whose gradients of a parameter add up."""

    def __init__(self, config: ParallelConfig, mesh: Mesh) -> None:
        self.mesh = mesh
        self.usual = mesh.data_tp if config.sequence_parallel else mesh.data
        self.special: dict[nn.Parameter, Group] = {}

    def note_split(self, parameter: nn.Parameter, cut: Cut | None) -> None:
        """A weight that tensor parallelism has cut, or (None) whose gradient it has."""
        group = self.mesh.data_tp if cut is None else self.mesh.data
        if cut is not None and cut.copies > 1:
            group = self.mesh.copies[cut.copies]
        self.special[parameter] = group

    def note_expert(self, parameter: nn.Parameter) -> None:
        """A weight of experts."""
        self.special[parameter] = self.mesh.edp

    def of(self, parameter: nn.Parameter) -> Group:
        """The group."""
        return self.special.get(parameter, self.usual)

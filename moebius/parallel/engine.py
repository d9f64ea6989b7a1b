"""From gradients to new parameters on all processes: reduce, clip, step.

An engine owns the optimizer. Gradients are sums over the tokens of a process, in the unit of the
whole step's loss, so reducing them adds up and never divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebius.model.parameters import ParameterSpec, Role
from moebius.parallel.comm import Group
from moebius.parallel.ledger import gather_objects
from moebius.parallel.mesh import Mesh
from moebius.parallel.place import Placed

MakeOptimizer = Callable[[Iterable[tuple[nn.Parameter, ParameterSpec]]], torch.optim.Optimizer]
"""the optimizer over some tensors with the options of their roles"""


class Engine(Protocol):
    """What the training loop sees."""

    optimizer: torch.optim.Optimizer

    def step(self, clip_norm: float) -> Tensor:
        """Reduce, clip and apply the gradients, and drop them; returns the norm before clipping.

        Auxiliary routers are clipped by themselves, and not counted: they must not change the
        model.
        """

    def model_tensors(self) -> dict[str, Tensor]:
        """Every whole parameter by name; a collective call."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The whole optimizer's state as `<parameter>/<key>`; a collective call."""

    def load_model(self, tensors: dict[str, Tensor]) -> None:
        """Take the own parts of whole parameters."""

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Take the own parts of a whole optimizer's state; parameters without any have none."""


class ReplicatedEngine:
    """Every process updates all parameters that it holds (`data: ddp`)."""

    def __init__(self, placed: Sequence[Placed], mesh: Mesh, make: MakeOptimizer) -> None:
        self.placed = placed
        self.mesh = mesh
        self.optimizer = make((p.parameter, p.spec) for p in placed)

    def reduce(self) -> None:
        """Add gradients up, those of one group of processes in one call."""
        for group, members in by_group(self.placed).items():
            sum_gradients(group, [p.parameter for p in members])
        for group, members in tied(self.placed).items():
            parameters = [p.parameter for p in members]
            agree_on_use(group, parameters)
            sum_gradients(group, parameters)

    def step(self, clip_norm: float) -> Tensor:
        """See `Engine`."""
        self.reduce()
        norm = clip(self._gradients(), self.mesh, clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _gradients(self) -> Iterable[tuple[Tensor, Role, int]]:
        stage_size = self.mesh.world.size // self.mesh.depth.size
        for p in self.placed:
            if p.parameter.grad is not None:
                yield p.parameter.grad, p.spec.role, p.placement.replicas(stage_size)

    def model_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return whole_parameters(self.placed, self.mesh)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        found: dict[str, Tensor] = {}
        for p in self.placed:
            for key, value in self.optimizer.state.get(p.parameter, {}).items():
                whole = value if value.dim() == 0 else p.placement.join(value)
                found[f"{p.name}/{key}"] = whole
        return of_all_stages(found, self.mesh)

    @torch.no_grad()
    def load_model(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine`."""
        for p in self.placed:
            p.parameter.copy_(p.placement.take(tensors[p.name]))

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine`."""
        for p in self.placed:
            keys = [path for path in tensors if path.rpartition("/")[0] == p.name]
            state = {}
            for path in keys:
                value = tensors[path]
                own = value if value.dim() == 0 else p.placement.take(value)
                # Fused AdamW keeps its step counters, too, on the device of the parameter.
                state[path.rpartition("/")[2]] = own.to(p.parameter.device).clone()
            if state:
                self.optimizer.state[p.parameter] = state


def whole_parameters(placed: Iterable[Placed], mesh: Mesh) -> dict[str, Tensor]:
    """Every parameter of the model by name; a collective call."""
    own = {p.name: p.placement.join(p.parameter.detach()) for p in placed}
    return of_all_stages(own, mesh)


def of_all_stages(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """The tensors of processes with other layers together; a collective call."""
    if mesh.depth.size == 1:
        return tensors
    on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
    return {name: t for part in gather_objects(on_host, mesh.depth) for name, t in part.items()}


def by_group(placed: Iterable[Placed]) -> dict[Group, list[Placed]]:
    """Parameters whose gradients several processes add up, by which these are."""
    groups: dict[Group, list[Placed]] = {}
    for p in placed:
        groups.setdefault(p.placement.reduce, []).append(p)
    return groups


def tied(placed: Iterable[Placed]) -> dict[Group, list[Placed]]:
    """Parameters that processes with other layers hold, too, by which these are."""
    groups: dict[Group, list[Placed]] = {}
    for p in placed:
        if p.placement.tied is not None:
            groups.setdefault(p.placement.tied, []).append(p)
    return groups


@torch.no_grad()
def agree_on_use(group: Group, parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Which parameters some process of the group has used; the others give zeros to the sum."""
    used = [float(p.grad is not None) for p in parameters]
    flags = group.all_reduce(torch.tensor(used, device=parameters[0].device), dist.ReduceOp.MAX)
    for parameter, flag in zip(parameters, flags.tolist(), strict=True):
        if flag and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [bool(flag) for flag in flags.tolist()]


@torch.no_grad()
def sum_gradients(group: Group, parameters: Sequence[nn.Parameter]) -> None:
    """Sum everyone's gradients of some parameters in one call.

    A parameter that nothing used in this step has none, on no process: it stays so.
    """
    sum_tensors(group, [p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def sum_tensors(group: Group, tensors: Sequence[Tensor]) -> None:
    """Sum everyone's tensors, each in its place, in one call."""
    if group.size == 1 or not tensors:
        return
    flat = group.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


@torch.no_grad()
def clip(gradients: Iterable[tuple[Tensor, Role, int]], mesh: Mesh, clip_norm: float) -> Tensor:
    """Scale gradients, given with role and number of copies, as `Engine.step` says.

    Every element counts once, wherever and however often it is held. A collective call.
    """
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    squares = torch.zeros(2, dtype=torch.float64, device=mesh.device_type)
    for gradient, role, replicas in gradients:
        number = int(role is Role.AUX_ROUTER)
        groups[number].append(gradient)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        squares[number] += norm.square() / replicas
    norms = mesh.world.all_reduce(squares).sqrt()
    for norm, members in zip(norms, groups, strict=True):
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in members:
            gradient.mul_(factor.to(gradient.dtype))
    return norms[0]

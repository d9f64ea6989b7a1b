"""From gradients to new parameters on all processes: reduce, clip, step.

An engine owns the optimizer. Gradients are sums over the tokens of a process, in the unit of the
whole step's loss, so reducing them adds up and never divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebius.model.parameters import ParameterSpec, Role
from moebius.parallel.comm import Group
from moebius.parallel.mesh import Mesh
from moebius.parallel.part import Part, Parts
from moebius.parallel.place import Placed

MakeOptimizer = Callable[[Iterable[tuple[nn.Parameter, ParameterSpec]]], torch.optim.Optimizer]
"""the optimizer over some tensors with the options of their roles"""
MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1024
"""elements whose squares are summed up in the precision of the tensor"""


@dataclass(frozen=True)
class Holding:
    """What a process updates of a parameter."""

    name: str
    """of the parameter"""
    value: Tensor
    gradient: Tensor | None
    role: Role
    replicas: int
    """processes that have the same elements"""


class Engine(Protocol):
    """What the training loop sees."""

    optimizer: torch.optim.Optimizer
    skips: bool
    """whether a step can be left out on the device"""
    squares: dict[str, Tensor] | None
    """if it is a dict, every step leaves there the square of the norm of each parameter's gradient
    before clipping, as the part of this process in the sum over all; not so with DeepSpeed"""

    def step(self, clip_norm: float, sound: Tensor | None = None) -> Tensor:
        """Reduce, clip and apply the gradients, and drop them; returns the norm before clipping.

        Where the norm is not finite, or the bool `sound` is false, nothing is applied; the host
        need not know. Not so where the engine does not skip.

        Auxiliary routers are clipped by themselves, and not counted: they must not change the
        model.
        """

    def weight_square(self) -> Tensor:
        """Square of the norm of all trained parameters, as the part of this process in the sum over
        all, fp64."""

    def parts(self) -> dict[str, Part]:
        """What this process holds of every parameter, as `model/<parameter>`, and of the
        optimizer's state, as `optimizer/<parameter>/<key>`; a collective call."""

    def take_over(self, parts: Parts) -> None:
        """Go on from the values that were written into parts; a collective call."""


class ReplicatedEngine:
    """Every process updates all parameters that it holds (`data: ddp`)."""

    skips = True

    def __init__(
        self,
        placed: Sequence[Placed],
        mesh: Mesh,
        make: MakeOptimizer,
        whole: frozenset[Role] = frozenset(),
    ) -> None:
        self.placed = placed
        self.mesh = mesh
        self.squares: dict[str, Tensor] | None = None
        self.uneven = {
            group: [p.parameter for p in members]
            for group, members in tied(p for p in placed if p.spec.role in whole).items()
        }
        """updated in batches whose size differs from process to process"""
        self.optimizer = make((p.parameter, p.spec) for p in placed)
        begin_state(self.optimizer)

    def reduce(self) -> None:
        """Add gradients up, those of one group of processes in one call."""
        for group, members in by_group(self.placed).items():
            sum_gradients(group, [p.parameter for p in members])
        for group, members in tied(self.placed).items():
            parameters = [p.parameter for p in members]
            agree_on_use(group, parameters)
            sum_gradients(group, parameters)

    def step(self, clip_norm: float, sound: Tensor | None = None) -> Tensor:
        """See `Engine`."""
        self.reduce()
        norm = clip(self._holdings(), self.mesh, clip_norm, self.squares)
        step_where(self.optimizer, norm, sound)
        self.optimizer.zero_grad()
        for group, parameters in self.uneven.items():
            adopt(group, parameters)
        return norm

    def weight_square(self) -> Tensor:
        """See `Engine`."""
        return square(self._holdings(), self.mesh)

    def _holdings(self) -> Iterable[Holding]:
        stage_size = self.mesh.world.size // self.mesh.depth.size
        for p in self.placed:
            if p.spec.role is not Role.FROZEN:
                replicas = p.placement.replicas(stage_size)
                yield Holding(p.name, p.parameter.detach(), p.parameter.grad, p.spec.role, replicas)

    def parts(self) -> dict[str, Part]:
        """See `Engine`."""
        found = {}
        for p in self.placed:
            found[f"model/{p.name}"] = Part.of(p.parameter, p.placement.cuts)
            # An optimizer may keep a counter for a parameter without elements; others have none.
            state = self.optimizer.state.get(p.parameter, {}) if p.parameter.numel() else {}
            for key, value in state.items():
                cuts = p.placement.cuts if value.dim() else ()
                found[f"optimizer/{p.name}/{key}"] = Part.of(value, cuts)
        return found

    def take_over(self, parts: Parts) -> None:
        """See `Engine`: the parts are what it works on."""


def begin_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state of an Adam that has made no step.

    It would arise with the first gradient; so what a checkpoint holds does not depend on which
    parameters had one. Of an optimizer that leaves the `rest` to an Adam, these. Others are left as
    they are.
    """
    optimizer = getattr(optimizer, "rest", optimizer)
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # A fused optimizer keeps its step counters, too, on the device of the parameter.
            device = parameter.device if group["fused"] else None
            step = torch.zeros((), dtype=torch.float32, device=device)
            moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            optimizer.state[parameter] = {"step": step, **moments}


def step_where(optimizer: torch.optim.Optimizer, norm: Tensor, sound: Tensor | None) -> None:
    """Step, see `Engine.step`. Fused optimizers take the decision from the device, as loss scaling
    with half-precision floats needs it; others always step."""
    if optimizer.defaults.get("fused"):
        applied = norm.isfinite() if sound is None else norm.isfinite() & sound
        setattr(optimizer, "found_inf", (~applied).float())  # noqa: B010 - unknown to its type
    optimizer.step()


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
def adopt(group: Group, tensors: Sequence[Tensor]) -> None:
    """Take over the first process's values: the same product in a batch of another size may be
    rounded differently, and copies would drift apart."""
    if group.rank:
        for tensor in tensors:
            tensor.zero_()
    sum_tensors(group, tensors)


def square(holdings: Iterable[Holding], mesh: Mesh) -> Tensor:
    """See `Engine.weight_square`."""
    return _total(_squares((holding.value, holding.replicas) for holding in holdings), mesh)


def _squares(tensors: Iterable[tuple[Tensor, int]]) -> list[Tensor]:
    """The square of each norm, as one of so many replicas has it.

    In fp64, without copies in that: norms of short pieces are exact to 1e-7 in fp32, which over
    millions of elements loses the fourth digit. Elements beyond 1e19 count as not finite, as a step
    with such gradients is broken; below 1e-23 as 0.
    """
    norms, replicas = [], []
    for tensor, count in tensors:
        flat, exact = tensor.flatten(), torch.promote_types(tensor.dtype, torch.float32)
        end = flat.numel() // PIECE * PIECE
        pieces = torch.linalg.vector_norm(flat[:end].view(-1, PIECE), dim=1, dtype=exact)
        if end < flat.numel():
            rest = torch.linalg.vector_norm(flat[end:], dtype=exact)
            pieces = torch.cat([pieces, rest.unsqueeze(0)])
        norms.append(pieces)
        replicas.append(count)
    if not norms:
        return []
    parts = torch.cat(norms).double().square().split([len(pieces) for pieces in norms])
    return [part.sum() / count for part, count in zip(parts, replicas, strict=True)]


def _total(parts: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """Their sum, fp64."""
    nothing = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    return torch.stack([nothing, *parts]).sum()


@torch.no_grad()
def clip(
    holdings: Iterable[Holding],
    mesh: Mesh,
    clip_norm: float,
    kept: dict[str, Tensor] | None = None,
) -> Tensor:
    """Scale gradients as `Engine.step` says, and keep what `Engine.squares` says.

    Every element counts once, wherever and however often it is held. A collective call.
    """
    if kept is not None:
        kept.clear()
    held = [(h, h.gradient) for h in holdings if h.gradient is not None]
    gradients: tuple[list[Tensor], list[Tensor]] = ([], [])
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    squares = _squares((gradient, holding.replicas) for holding, gradient in held)
    for (holding, gradient), part in zip(held, squares, strict=True):
        number = int(holding.role is Role.AUX_ROUTER)
        gradients[number].append(gradient)
        parts[number].append(part)
        if kept is not None:  # of some engines a process has several pieces of a parameter
            kept[holding.name] = kept.get(holding.name, 0) + part
    norms = mesh.world.all_reduce(torch.stack([_total(p, mesh) for p in parts])).sqrt()
    for norm, members in zip(norms, gradients, strict=True):
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for dtype in {value.dtype for value in members}:
            scaled = [value for value in members if value.dtype == dtype]
            torch._foreach_mul_(scaled, factor.to(dtype))
    return norms[0] + 0 * norms[1]  # not finite where either is not

"""Muon for matrices, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes every update of a matrix
W of `[out, in]` nearly orthogonal. With gradient G, rate η, weight decay λ, momentum μ:

    M ← μ M + (1 - μ) G
    D = (1 - μ) G + μ M          (Nesterov; without: D = M)
    W ← W - η (0.2 sqrt(max(out, in)) O + λ W),    O = NewtonSchulz(D) ≈ U Vᵀ of D = U S Vᵀ

The scale is that of Moonlight (arXiv 2502.16982, equation 4): with it the root mean square of an
update is about 0.2, as AdamW's is, so learning rate and weight decay can be AdamW's. It does not
ask which side is `out`, so neither does it matter how a matrix is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moebius.config import ConfigNode

MOMENTUM = "momentum_buffer"
"""what Muon keeps of a matrix"""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""of `a X + b (X Xᵀ) X + c (X Xᵀ)² X`, steep at 0; singular values end up between 0.68 and 1.2"""
SMALLEST_NORM = 1e-7
ADAMW_RMS = 0.2
"""root mean square of AdamW's updates, as measured by Moonlight"""
CPU_ELEMENTS = 1 << 18
"""elements of matrices that a CPU orthogonalises at a time: they stay in its cache"""
DEVICE_ELEMENTS = 1 << 24
"""on other devices: many products side by side, little memory beside the model's"""


class MuonConfig(ConfigNode):
    """Muon for the matrices of some roles, see `trainer.muon`; the rest stays with AdamW.

    Its updates are scaled to AdamW's, so `optim.lr`, `optim.weight_decay` and `optim.roles` apply.
    """

    roles: Annotated[tuple[Literal["matrix", "expert"], ...], Field(strict=False, min_length=1)] = (
        "matrix",
        "expert",
    )
    """matrix: projections of attention and of dense and shared feed-forwards; expert: each matrix
    of each expert by itself"""
    momentum: float = Field(0.95, ge=0, lt=1)
    """decay of the running mean of gradients"""
    nesterov: bool = True
    """look ahead: step along the mean as it would be after the same gradient once more"""
    ns_steps: PositiveInt = 5
    """steps of the Newton-Schulz iteration; few leave small singular values small"""


def newton_schulz(matrices_BMN: Tensor, steps: int) -> Tensor:
    """Matrices with the singular vectors of those given and singular values near 1.

    Each is divided by its norm, after which no singular value exceeds 1, and then multiplied by the
    odd polynomial `QUINTIC` of itself, so many times. Products are in the precision of the input.
    """
    a, b, c = QUINTIC
    is_tall = matrices_BMN.shape[-2] > matrices_BMN.shape[-1]
    x = matrices_BMN.mT if is_tall else matrices_BMN  # the smaller of both Gram matrices
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if is_tall else x


def normalized(matrices_BMN: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm; one of zeros stays as it is."""
    norms: Tensor = torch.linalg.vector_norm(matrices_BMN, dim=(-2, -1), keepdim=True)
    return matrices_BMN / norms.clamp(min=SMALLEST_NORM)


@dataclass(frozen=True)
class Matrices:
    """Some matrices of a parameter, `[number, out, in]`: views of what is updated."""

    values: Tensor
    gradient: Tensor
    momentum: Tensor
    rate: float
    decay: float

    def split(self, number: int) -> Iterator[Matrices]:
        """The same in pieces of at most so many."""
        views = (tensor.split(number) for tensor in (self.values, self.gradient, self.momentum))
        for values, gradient, momentum in zip(*views, strict=True):
            yield Matrices(values, gradient, momentum, self.rate, self.decay)


class Muon(torch.optim.Optimizer):
    """Muon for some groups of parameters and `rest`, an AdamW, for the others: one optimizer.

    A group's parameters are matrices `[out, in]`, or stacks of them `[number, out, in]`, of each of
    which `stacked` lie above each other in `out`, and are matrices by themselves. Products are in
    `dtype`; None: in the precision of the parameter. As with fused optimizers, a step in which the
    attribute `found_inf` is not 0 changes nothing, and the host need not know.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        rest: torch.optim.AdamW,
        config: MuonConfig,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, {"lr": rest.defaults["lr"], "stacked": 1, "fused": True})
        self.config = config
        self.rest = rest
        self.dtype = dtype
        self.matrix_groups = list(self.param_groups)
        self.param_groups = [*self.matrix_groups, *rest.param_groups]
        self.state = rest.state
        self.found_inf: Tensor | None = None
        for group in self.matrix_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"no matrices: {list(parameter.shape)}")
                momentum = torch.zeros_like(parameter, requires_grad=False)
                self.state[parameter] = {MOMENTUM: momentum}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        applied = None if self.found_inf is None else self.found_inf == 0
        if applied is not None:
            setattr(self.rest, "found_inf", self.found_inf)  # noqa: B010 - unknown to its type
        self.rest.step()
        by_shape: dict[torch.Size, list[Matrices]] = {}
        for matrices in self._matrices():
            by_shape.setdefault(matrices.values.shape[1:], []).append(matrices)
        for shape, members in by_shape.items():
            is_cpu = members[0].values.device.type == "cpu"
            elements = CPU_ELEMENTS if is_cpu else DEVICE_ELEMENTS
            for batch in batches(members, max(elements // shape.numel(), 1)):
                self._update(batch, applied)

    def _matrices(self) -> Iterator[Matrices]:
        """What has a gradient and is here."""
        for group in self.matrix_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not local(parameter).numel():
                    continue
                gradient = local(parameter.grad).contiguous()
                tensors = (local(parameter), gradient, local(self.state[parameter][MOMENTUM]))
                values, gradient, momentum = (
                    as_matrices(tensor, group["stacked"]) for tensor in tensors
                )
                yield Matrices(values, gradient, momentum, group["lr"], group["weight_decay"])

    def _update(self, batch: Sequence[Matrices], applied: Tensor | None) -> None:
        """Update matrices of one shape."""
        directions = torch.cat([self._direction(matrices, applied) for matrices in batch])
        x = normalized(directions).to(self.dtype or directions.dtype)
        orthogonal = newton_schulz(x, self.config.ns_steps)
        scale = ADAMW_RMS * math.sqrt(max(orthogonal.shape[1:]))
        sizes = [len(matrices.values) for matrices in batch]
        for matrices, update in zip(batch, orthogonal.split(sizes), strict=True):
            values, rate = matrices.values, matrices.rate
            step = scale * update.to(values.dtype) + matrices.decay * values
            values.sub_(rate * step if applied is None else rate * step * applied)

    def _direction(self, matrices: Matrices, applied: Tensor | None) -> Tensor:
        """Where to, before it is made orthogonal; takes the gradient into the running mean."""
        gradient, momentum = matrices.gradient, matrices.momentum
        keep = self.config.momentum
        if applied is None:
            momentum.lerp_(gradient, 1 - keep)
        else:
            gradient.masked_fill_(~applied, 0.0)
            momentum.lerp_(gradient, (1 - keep) * applied.to(momentum.dtype))
        return gradient.lerp(momentum, keep) if self.config.nesterov else momentum


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor, maybe a DTensor, that is here."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def as_matrices(tensor: Tensor, stacked: int) -> Tensor:
    """A view of a parameter as `[number, out, in]`."""
    *_, rows, columns = tensor.shape
    return tensor.view(-1, rows // stacked, columns)


def batches(members: Iterable[Matrices], number: int) -> Iterator[list[Matrices]]:
    """Matrices of several parameters, at most so many at a time."""
    batch: list[Matrices] = []
    room = number
    for piece in (piece for matrices in members for piece in matrices.split(number)):
        if len(piece.values) > room:
            yield batch
            batch, room = [], number
        batch.append(piece)
        room -= len(piece.values)
    if batch:
        yield batch

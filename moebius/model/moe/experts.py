"""The expert pool: groups of experts that tokens are sent to, and experts computed in place."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.kernels.gru import gru_scan
from moebius.kernels.registry import PLAIN, Kernels
from moebius.model.context import TokenContext
from moebius.model.moe.config import ExpertSpec, MoEConfig
from moebius.model.moe.dispatch import Dispatch, Dispatcher, LocalDispatcher
from moebius.model.moe.pool import DISPATCHED, PoolShape
from moebius.model.parameters import ParameterModule, ParameterSpec, Role


class DispatchedExperts(ParameterModule, ABC):
    """A group of experts of one kind and width that rows are sorted for."""

    def __call__(
        self, rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor, kernels: Kernels = PLAIN
    ) -> Tensor:
        """See `forward`."""
        outputs: Tensor = super().__call__(rows_RD, weights_R, ends_E, kernels)
        return outputs

    @abstractmethod
    def forward(
        self, rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor, kernels: Kernels = PLAIN
    ) -> Tensor:
        """Weighted outputs `[R, D]` of rows sorted by expert."""

    @abstractmethod
    def flops_per_row(self) -> int:
        """Forward FLOPs of one row."""


class FFNExperts(DispatchedExperts):
    """E SwiGLU experts; dimension 0 of both weights is the expert's number in the group."""

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, hidden_size: int, count: int, width: int, std: float) -> None:
        super().__init__()
        expert = ParameterSpec(Role.EXPERT, std=std)
        self.declare("gate_up", (count, 2 * width, hidden_size), replace(expert, stacked=2))
        self.declare("down", (count, hidden_size, width), expert)

    def forward(
        self, rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor, kernels: Kernels = PLAIN
    ) -> Tensor:
        """See `grouped_swiglu`."""
        return kernels.grouped_swiglu(rows_RD, weights_R, self.gate_up, self.down, ends_E)

    def flops_per_row(self) -> int:
        """Three products."""
        _, hidden, width = self.down.shape
        return 6 * hidden * width


class LowRankExperts(DispatchedExperts):
    """E linear maps `scale * up(down(x))` of low rank (LoRA, arXiv 2106.09685).

    `up` begins with zeros, so at the first step the layer is the one without these experts.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(self, hidden_size: int, count: int, rank: int, std: float, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.declare("down", (count, rank, hidden_size), ParameterSpec(Role.EXPERT, std=std))
        self.declare("up", (count, hidden_size, rank), ParameterSpec(Role.EXPERT))

    def forward(
        self, rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor, kernels: Kernels = PLAIN
    ) -> Tensor:
        """Two grouped products, the weight folded in between."""
        inner = kernels.grouped_linear(rows_RD, self.down, ends_E)
        inner = inner * (self.scale * weights_R).to(inner.dtype).unsqueeze(1)
        return kernels.grouped_linear(inner, self.up, ends_E)

    def flops_per_row(self) -> int:
        """Two products."""
        _, hidden, rank = self.up.shape
        return 4 * hidden * rank


class GRUExpert(ParameterModule):
    """A recurrent unit over the tokens of a document (Hecto, arXiv 2506.22919), projected back.

    It needs the tokens in order, so it cannot stand behind a dispatcher: it is computed for all
    tokens and weighted, 0 where it was not chosen.
    """

    input_weight: nn.Parameter
    state_weight: nn.Parameter
    input_bias: nn.Parameter
    state_bias: nn.Parameter
    out: nn.Parameter

    def __init__(self, hidden_size: int, state_size: int, std: float) -> None:
        super().__init__()
        gates = ParameterSpec(Role.MATRIX, std=std, stacked=3)
        self.declare("input_weight", (3 * state_size, hidden_size), gates)
        recurrent = replace(gates, std=(3 * state_size) ** -0.5)
        self.declare("state_weight", (3 * state_size, state_size), recurrent)
        self.declare("input_bias", (3 * state_size,), ParameterSpec(Role.BIAS))
        self.declare("state_bias", (3 * state_size,), ParameterSpec(Role.BIAS))
        self.declare("out", (hidden_size, state_size), ParameterSpec(Role.MATRIX, std=std))

    def forward(self, x_TD: Tensor, tokens: TokenContext) -> Tensor:
        """Outputs of all tokens, `[T, D]`."""
        gates = F.linear(x_TD, self.input_weight, self.input_bias)
        segments_BS = tokens.segment_ids_BS
        states = gru_scan(
            gates.unflatten(0, segments_BS.shape), segments_BS, self.state_weight, self.state_bias
        )
        return F.linear(states.flatten(0, 1), self.out)

    def flops_per_row(self) -> int:
        """Input, state and output products."""
        return 2 * (self.input_weight.numel() + self.state_weight.numel() + self.out.numel())


class ZeroComputationExperts(ParameterModule):
    """Constant, copy and zero experts of MoE++, replicated on every rank and never dispatched."""

    mix: nn.Parameter
    constants: nn.Parameter

    def __init__(self, hidden_size: int, pool: PoolShape, std: float) -> None:
        super().__init__()
        self.first_constant = pool.first("constant")
        self.first_copy = pool.first("copy")
        self.first_zero = pool.first("zero")
        num_constant = pool.count("constant")
        self.declare("mix", (num_constant, 2, hidden_size), ParameterSpec(Role.ROUTER, std=std))
        self.declare("constants", (num_constant, hidden_size), ParameterSpec(Role.BIAS, std=std))

    def forward(self, x_TD: Tensor, weights_TN: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        """The pool's part of the layer's output, `[T, D]`; `weights` is 0 where not chosen."""
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            mix_logits_TM = F.linear(x_TD.to(dtype), self.mix.flatten(0, 1).to(dtype))
        return kernels.affine_experts(
            x_TD,
            weights_TN[:, self.first_copy : self.first_zero].sum(dim=-1),
            weights_TN[:, self.first_constant : self.first_copy],
            mix_logits_TM.unflatten(-1, (-1, 2)),
            self.constants,
        )

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of the mixing logits and of the constants' product."""
        return 2 * num_tokens * (self.mix.numel() + self.constants.numel())


class ExpertPool(ParameterModule):
    """All experts of a layer, or of a group of layers that reuse each other's."""

    def __init__(self, hidden_size: int, moe: MoEConfig, std: float) -> None:
        super().__init__()
        self.shape = moe.pool
        self.groups = nn.ModuleList()
        self.recurrent = nn.ModuleList()
        self.sizes: list[int] = []
        for spec, (kind, count) in zip(moe.sorted_experts, self.shape.groups, strict=True):
            if kind in DISPATCHED:
                self.groups.append(_dispatched(hidden_size, spec, count, std))
                self.sizes.append(count)
            elif kind == "gru":
                width = _width(spec)
                self.recurrent.extend(GRUExpert(hidden_size, width, std) for _ in range(count))
        self.zero = ZeroComputationExperts(hidden_size, self.shape, std)
        self.local_sizes = self.sizes
        """experts of each group that live here: all of them"""
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        tokens: TokenContext,
        beside: Callable[[], Tensor | None] | None = None,
        kernels: Kernels = PLAIN,
    ) -> Tensor:
        """Weighted sum of each token's experts, `[T, D]`, plus what `beside` makes.

        Everything that is computed where the tokens are is, while others are on their way.
        """
        arrive = None
        if self.groups:
            arrive = self.dispatcher.send(x_TD, ids_TK, weights_TK, self.sizes, kernels)
        y_TD = self._in_place(x_TD, ids_TK, weights_TK, tokens, kernels)
        always_TD = beside() if beside is not None else None
        if always_TD is not None:
            y_TD = y_TD + always_TD.to(y_TD.dtype)
        if arrive is None:
            return y_TD
        dispatch = arrive()
        rows_RD = self._compute(dispatch)
        return self.dispatcher.combine(rows_RD, dispatch, y_TD)

    def _in_place(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        tokens: TokenContext,
        kernels: Kernels,
    ) -> Tensor:
        """The part of experts that no token is sent to."""
        weights_TN = _by_expert(ids_TK, weights_TK, self.shape.num_experts)
        y_TD: Tensor = self.zero(x_TD, weights_TN, kernels)
        for number, expert in enumerate(self._recurrent()):
            weight_T1 = weights_TN[:, self.shape.first("gru") + number].unsqueeze(1)
            y_TD = y_TD + (weight_T1 * expert(x_TD, tokens)).to(y_TD.dtype)
        return y_TD

    def _compute(self, dispatch: Dispatch) -> Tensor:
        """Each group's rows by its experts."""
        groups, kernels = self._groups(), dispatch.kernels
        rows_RD, weights_R = dispatch.rows_RD, dispatch.weights_R
        ends_E = dispatch.order.ends_E
        if len(groups) == 1:
            return groups[0](rows_RD, weights_R, ends_E, kernels)
        last = torch.tensor(list(accumulate(self.local_sizes)), device=ends_E.device) - 1
        bounds = [0, *ends_E[last].tolist()]  # rows per group decide shapes: the host must know
        bounds[-1] = len(rows_RD)  # what is behind is padding of no expert
        first = 0
        parts = []
        for number, group in enumerate(groups):
            start, end = bounds[number : number + 2]
            ends = ends_E[first : first + self.local_sizes[number]] - start
            parts.append(group(rows_RD[start:end], weights_R[start:end], ends, kernels))
            first += self.local_sizes[number]
        return torch.cat(parts)

    def _groups(self) -> list[DispatchedExperts]:
        return [cast(DispatchedExperts, group) for group in self.groups]

    def _recurrent(self) -> list[GRUExpert]:
        return [cast(GRUExpert, expert) for expert in self.recurrent]

    def flops(self, num_tokens: int, rows_N: Sequence[float]) -> int:
        """Forward FLOPs for tokens of whose assignments `rows` went to each expert."""
        per_row = self.flops_per_row()
        routed = sum(
            round(rows * flops) for rows, flops in zip(rows_N, per_row, strict=True) if flops
        )
        recurrent = num_tokens * sum(expert.flops_per_row() for expert in self._recurrent())
        return routed + recurrent + self.zero.flops(num_tokens)

    def flops_per_row(self) -> list[int]:
        """For each expert the forward FLOPs of a token that is sent to it."""
        dispatched = [
            group.flops_per_row()
            for group, size in zip(self._groups(), self.sizes, strict=True)
            for _ in range(size)
        ]
        return dispatched + [0] * (self.shape.num_experts - len(dispatched))


def _dispatched(hidden_size: int, spec: ExpertSpec, count: int, std: float) -> DispatchedExperts:
    if spec.kind == "low_rank":
        return LowRankExperts(hidden_size, count, _width(spec), std, spec.scale)
    return FFNExperts(hidden_size, count, _width(spec), std)


def _width(spec: ExpertSpec) -> int:
    if spec.intermediate_size is None:
        raise ValueError(f"a {spec.kind} expert needs intermediate_size")
    return spec.intermediate_size


def _by_expert(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """Each token's weight of each expert, `[T, N]`, 0 where it was not chosen."""
    weights_TN = weights_TK.new_zeros(len(ids_TK), num_experts)
    return weights_TN.scatter_add(1, ids_TK.clamp(min=0), weights_TK * (ids_TK >= 0))

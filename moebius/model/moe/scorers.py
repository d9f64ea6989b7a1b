"""From a token to a raw score per expert.

A scorer is configured by a node and built into a module. It may read what the scorer of the
previous router passed on, and pass something on itself: that is the router's part of the `Carry`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from moebius.config import ConfigNode
from moebius.kernels.gru import gru_cell
from moebius.model.parameters import ParameterModule, ParameterSpec, Role

ROUTER_GRU = "router_gru"
"""name, after the sublayer's, of the recurrent unit that all routers of a kind share"""


@dataclass(frozen=True)
class ScorerShape:
    """What a scorer is built for."""

    sublayer: str
    hidden_size: int
    num_experts: int
    predecessor_experts: int | None
    """scores of the previous router; None where no visit of the layer has one: then there is no
    `W_g` that would never receive a gradient"""
    init_std: float
    role: Role = Role.ROUTER
    """of its parameters; FROZEN: they stay at their initial values"""


class Scorer(ParameterModule, ABC):
    """The interface; one object may serve several visits."""

    @abstractmethod
    def forward(
        self, x_TD: Tensor, state_TX: Tensor | None, shared: nn.ModuleDict
    ) -> tuple[Tensor, Tensor | None]:
        """Scores `[T, N]` and what the next router gets, None for nothing; all fp32 or wider."""

    @abstractmethod
    def flops(self, num_tokens: int, has_predecessor: bool) -> int:
        """Forward FLOPs."""


class ScorerConfig(ConfigNode):
    """What all scorers have in common."""

    init_std: float | None = Field(None, gt=0)
    """standard deviation of the initial weights; default: the model's `init_std`"""
    granularity: Literal["token", "document"] = "token"
    """token: each token by itself; document: all tokens of a document are routed like the first
    of them that is present in the row, which keeps the decision causal"""
    jitter: float = Field(0.0, ge=0, lt=1)
    """in training inputs are multiplied by uniform numbers within `1 +- jitter` (Switch)"""

    @property
    def passes_state(self) -> bool:
        """Whether a router passes something on to the next one."""
        return False

    def std(self, shape: ScorerShape) -> float:
        """Standard deviation of the initial weights."""
        return shape.init_std if self.init_std is None else self.init_std


class LinearScorerConfig(ScorerConfig):
    """`W x`, or with the gating residual of MoE++ `W x + W_g G` with G the previous scores."""

    kind: Literal["linear"] = "linear"
    gating_residual: Literal["none", "prev_layer", "prev_depth"] = "none"
    """add `W_g @ scores` of an earlier router (MoE++): of the layer before, as published, or of
    the same layer in the pass before, which stays inside a layer and is nothing at the first"""

    @property
    def passes_state(self) -> bool:
        """Its raw scores."""
        return self.gating_residual != "none"

    def build(self, shape: ScorerShape) -> Scorer:
        """The module."""
        return LinearScorer(self, shape)


class LinearScorer(Scorer):
    """See `LinearScorerConfig`."""

    weight: nn.Parameter
    residual: nn.Parameter | None

    def __init__(self, config: LinearScorerConfig, shape: ScorerShape) -> None:
        super().__init__()
        self.passes_state = config.passes_state
        spec = ParameterSpec(shape.role, std=config.std(shape))
        self.declare("weight", (shape.num_experts, shape.hidden_size), spec)
        self.residual = None
        if config.passes_state and shape.predecessor_experts is not None:
            # Zeros: at the first step the layer routes like one without the residual.
            size = (shape.num_experts, shape.predecessor_experts)
            self.declare("residual", size, ParameterSpec(shape.role))

    def forward(
        self, x_TD: Tensor, state_TX: Tensor | None, shared: nn.ModuleDict
    ) -> tuple[Tensor, Tensor | None]:
        """See `Scorer`; the state is the raw scores, so that residuals compound over depth."""
        logits_TN = F.linear(x_TD, self.weight.to(x_TD.dtype))
        if self.residual is not None and state_TX is not None:
            logits_TN = logits_TN + F.linear(state_TX, self.residual.to(x_TD.dtype))
        return logits_TN, logits_TN if self.passes_state else None

    def flops(self, num_tokens: int, has_predecessor: bool) -> int:
        """The score product and, after another router, the residual's."""
        residual = self.residual.numel() if has_predecessor and self.residual is not None else 0
        return 2 * num_tokens * (self.weight.numel() + residual)


class MLPScorerConfig(ScorerConfig):
    """Two layers (ModuleFormer: gelu, 256)."""

    kind: Literal["mlp"] = "mlp"
    intermediate_size: PositiveInt = 256
    """width between the two layers"""
    activation: Literal["gelu", "tanh"] = "gelu"
    """nonlinearity between the two layers"""

    def build(self, shape: ScorerShape) -> Scorer:
        """The module."""
        return MLPScorer(self, shape)


class MLPScorer(Scorer):
    """See `MLPScorerConfig`."""

    up: nn.Parameter
    weight: nn.Parameter

    def __init__(self, config: MLPScorerConfig, shape: ScorerShape) -> None:
        super().__init__()
        self.activation = torch.tanh if config.activation == "tanh" else F.gelu
        spec = ParameterSpec(shape.role, std=config.std(shape))
        self.declare("up", (config.intermediate_size, shape.hidden_size), spec)
        self.declare("weight", (shape.num_experts, config.intermediate_size), spec)

    def forward(
        self, x_TD: Tensor, state_TX: Tensor | None, shared: nn.ModuleDict
    ) -> tuple[Tensor, Tensor | None]:
        """See `Scorer`."""
        inner = self.activation(F.linear(x_TD, self.up.to(x_TD.dtype)))
        return F.linear(inner, self.weight.to(x_TD.dtype)), None

    def flops(self, num_tokens: int, has_predecessor: bool) -> int:
        """Two products."""
        return 2 * num_tokens * (self.up.numel() + self.weight.numel())


class CosineScorerConfig(ScorerConfig):
    """Cosine between a projection of the token and an embedding per expert, times a learned scale
    (X-MoE, arXiv 2204.09179; ModuleFormer's third gate)."""

    kind: Literal["cosine"] = "cosine"
    projection_size: PositiveInt = 64
    """channels in which the cosine is taken"""
    initial_scale: float = Field(10.0, gt=0)
    """the scale before training; it is learned, up to 100"""

    def build(self, shape: ScorerShape) -> Scorer:
        """The module."""
        return CosineScorer(self, shape)


class CosineScorer(Scorer):
    """See `CosineScorerConfig`."""

    projection: nn.Parameter
    weight: nn.Parameter
    log_scale: nn.Parameter

    def __init__(self, config: CosineScorerConfig, shape: ScorerShape) -> None:
        super().__init__()
        size, spec = config.projection_size, ParameterSpec(shape.role, std=config.std(shape))
        self.declare("projection", (size, shape.hidden_size), spec)
        self.declare("weight", (shape.num_experts, size), spec)
        role = shape.role if shape.role is Role.FROZEN else Role.BIAS
        self.declare("log_scale", (1,), ParameterSpec(role, mean=math.log(config.initial_scale)))

    def forward(
        self, x_TD: Tensor, state_TX: Tensor | None, shared: nn.ModuleDict
    ) -> tuple[Tensor, Tensor | None]:
        """See `Scorer`."""
        token = F.normalize(F.linear(x_TD, self.projection.to(x_TD.dtype)), dim=-1)
        expert = F.normalize(self.weight.to(x_TD.dtype), dim=-1)
        return F.linear(token, expert) * self.log_scale.exp().clamp(max=100.0), None

    def flops(self, num_tokens: int, has_predecessor: bool) -> int:
        """Two products."""
        return 2 * num_tokens * (self.projection.numel() + self.weight.numel())


class CentroidScorerConfig(ScorerConfig):
    """Distance to a frozen centroid per expert (Moirai-MoE, arXiv 2410.10469).

    The authors take centroids from clusters of a trained model's tokens. They are a frozen
    parameter, drawn at random where no checkpoint brings them.
    """

    kind: Literal["centroid"] = "centroid"
    init_std: float | None = Field(1.0, gt=0)
    """standard deviation of random centroids; inputs are normalised to 1"""
    prefer: Literal["nearest", "farthest"] = "nearest"
    """nearest, as the text says; farthest, as the released inference code does"""

    def build(self, shape: ScorerShape) -> Scorer:
        """The module."""
        return CentroidScorer(self, shape)


class CentroidScorer(Scorer):
    """See `CentroidScorerConfig`."""

    centroids: nn.Parameter

    def __init__(self, config: CentroidScorerConfig, shape: ScorerShape) -> None:
        super().__init__()
        self.sign = -1.0 if config.prefer == "nearest" else 1.0
        spec = ParameterSpec(Role.FROZEN, std=config.std(shape))
        self.declare("centroids", (shape.num_experts, shape.hidden_size), spec)

    def forward(
        self, x_TD: Tensor, state_TX: Tensor | None, shared: nn.ModuleDict
    ) -> tuple[Tensor, Tensor | None]:
        """See `Scorer`; the score is plus or minus the Euclidean distance."""
        centroids = self.centroids.to(x_TD.dtype)
        square = (
            x_TD.square().sum(dim=-1, keepdim=True)
            - 2 * F.linear(x_TD, centroids)
            + centroids.square().sum(dim=-1)
        )
        return self.sign * square.clamp(min=1e-6).sqrt(), None

    def flops(self, num_tokens: int, has_predecessor: bool) -> int:
        """The product in `|x|^2 - 2 x c + |c|^2`."""
        return 2 * num_tokens * self.centroids.numel()


class GRUScorerConfig(ScorerConfig):
    """A recurrent router over layers (RMoE, arXiv 2408.06793): `h_l = GRU(A_l x, h_{l-1})`, scores
    `G_l h_l`, one GRU for all layers, its state zero before the first."""

    kind: Literal["gru"] = "gru"
    state_size: PositiveInt = 128
    """channels of h"""
    detach_state: bool = False
    """let no gradient flow to earlier routers (the paper's ablation: most of the gain is lost)"""

    @property
    def passes_state(self) -> bool:
        """The state h."""
        return True

    def build(self, shape: ScorerShape) -> Scorer:
        """The module."""
        return GRUScorer(self, shape)


class GRUScorer(Scorer):
    """See `GRUScorerConfig`."""

    inward: nn.Parameter
    weight: nn.Parameter

    def __init__(self, config: GRUScorerConfig, shape: ScorerShape) -> None:
        super().__init__()
        self.detach_state = config.detach_state
        self.unit_name = f"{shape.sublayer}_{ROUTER_GRU}"
        spec = ParameterSpec(shape.role, std=config.std(shape))
        self.declare("inward", (config.state_size, shape.hidden_size), spec)
        self.declare("weight", (shape.num_experts, config.state_size), spec)

    def forward(
        self, x_TD: Tensor, state_TX: Tensor | None, shared: nn.ModuleDict
    ) -> tuple[Tensor, Tensor | None]:
        """See `Scorer`."""
        inner_TX = F.linear(x_TD, self.inward.to(x_TD.dtype))
        state_TX = torch.zeros_like(inner_TX) if state_TX is None else state_TX
        if self.detach_state:
            state_TX = state_TX.detach()
        unit = shared[self.unit_name]
        state_TX = unit(inner_TX, state_TX)
        return F.linear(state_TX, self.weight.to(x_TD.dtype)), state_TX

    def flops(self, num_tokens: int, has_predecessor: bool) -> int:
        """Input, output and the two products of the GRU."""
        state_size = self.weight.shape[1]
        own = self.inward.numel() + self.weight.numel()
        return 2 * num_tokens * (own + 6 * state_size**2)


class RouterGRU(ParameterModule):
    """The recurrent unit that routers of all layers share."""

    input_weight: nn.Parameter
    state_weight: nn.Parameter
    input_bias: nn.Parameter
    state_bias: nn.Parameter

    def __init__(self, config: GRUScorerConfig, frozen: bool) -> None:
        super().__init__()
        size = config.state_size
        role = Role.FROZEN if frozen else Role.ROUTER
        # As torch.nn.GRU, whose uniform range has this deviation.
        weight = ParameterSpec(role, std=(3 * size) ** -0.5)
        bias = ParameterSpec(Role.FROZEN if frozen else Role.BIAS)
        self.declare("input_weight", (3 * size, size), weight)
        self.declare("state_weight", (3 * size, size), weight)
        self.declare("input_bias", (3 * size,), bias)
        self.declare("state_bias", (3 * size,), bias)

    def forward(self, x_TX: Tensor, h_TX: Tensor) -> Tensor:
        """The next state, `[T, X]`."""
        dtype = x_TX.dtype
        gates = F.linear(x_TX, self.input_weight.to(dtype), self.input_bias.to(dtype))
        return gru_cell(gates, h_TX, self.state_weight.to(dtype), self.state_bias.to(dtype))


class NoScorerConfig(ScorerConfig):
    """The same score for all experts and no parameters, for selectors that do not ask."""

    kind: Literal["none"] = "none"

    def build(self, shape: ScorerShape) -> Scorer:
        """The module."""
        return NoScorer(shape)


class NoScorer(Scorer):
    """See `NoScorerConfig`."""

    def __init__(self, shape: ScorerShape) -> None:
        super().__init__()
        self.num_experts = shape.num_experts

    def forward(
        self, x_TD: Tensor, state_TX: Tensor | None, shared: nn.ModuleDict
    ) -> tuple[Tensor, Tensor | None]:
        """See `Scorer`."""
        return x_TD.new_zeros(len(x_TD), self.num_experts), None

    def flops(self, num_tokens: int, has_predecessor: bool) -> int:
        """None."""
        return 0

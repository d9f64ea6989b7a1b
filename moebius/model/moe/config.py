"""Configuration of routing over width: the router's stages and the pool it routes to."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from moebius.config import LIST, MAPPING, NUMBER, ByShape, ConfigNode
from moebius.model.moe.capacity import Capacity
from moebius.model.moe.losses import SwitchLoss
from moebius.model.moe.norms import Softmax
from moebius.model.moe.pool import ID_ORDER, ExpertKind, PoolShape
from moebius.model.moe.registry import (
    AnyCandidates,
    AnyController,
    AnyLoss,
    AnyNorm,
    AnyScorer,
    AnySelector,
    AnyWeights,
)
from moebius.model.moe.scorers import LinearScorerConfig
from moebius.model.moe.selectors import TopK
from moebius.model.moe.weights import Raw


class RouterConfig(ConfigNode):
    """The stages of routing over width, in order, and what steers them."""

    scorer: AnyScorer = LinearScorerConfig()
    """from a token to a raw score per expert"""
    norm: AnyNorm = Softmax()
    """from raw scores to scores"""
    candidates: Annotated[tuple[AnyCandidates, ...], Field(strict=False)] = ()
    """restrictions of the choice, all of which apply"""
    selector: AnySelector = TopK()
    """from scores to chosen experts"""
    weights: AnyWeights = Raw()
    """factors on the chosen experts' outputs"""
    capacity: Capacity | None = None
    """limit of assignments per expert; null: nothing is dropped"""
    losses: Annotated[tuple[AnyLoss, ...], Field(strict=False)] = (SwitchLoss(),)
    """auxiliary losses"""
    controllers: Annotated[tuple[AnyController, ...], Field(strict=False)] = ()
    """state that steers the selection, moved after every optimizer step"""
    per_depth: bool = False
    """parameters of its own for each pass of a recursion; else they are shared, and only state
    (biases, thresholds, statistics) is kept by pass"""
    frozen: bool = False
    """keep the scorer's parameters at their initial values"""

    def in_layer(self, index: int) -> RouterConfig:
        """The configuration of one unique layer, in which lists are numbers."""
        if not isinstance(self.selector, TopK) or isinstance(self.selector.top_k, int):
            return self
        selector = self.selector.model_copy(update={"top_k": self.selector.top_k[index]})
        return self.model_copy(update={"selector": selector})


class LayerSchedule(ConfigNode):
    """A number of experts that changes over the layers.

    With u the place of a layer from 0 to 1 and R = largest - smallest: uniform `largest`,
    descending `smallest + R (1 - u)`, ascending `smallest + R u`, pyramid `smallest + R (1 - |2u -
    1|)`, valley `smallest + R |2u - 1|`, wave `smallest + R (1 + cos(2 pi cycles u)) / 2`.
    """

    shape: Literal["uniform", "descending", "ascending", "pyramid", "valley", "wave"]
    """course over the layers (DynaMoE names six and gives no formulas: these are ours)"""
    largest: PositiveInt
    """most experts of a layer"""
    smallest: PositiveInt = 1
    """fewest experts of a layer; a budget may go below"""
    cycles: PositiveInt = 2
    """periods of wave"""
    snap: PositiveInt = 1
    """round to multiples of this, as expert parallelism of that degree needs"""
    budget: PositiveInt | None = None
    """scale the course so that the layers' numbers add up to this"""

    def counts(self, num_layers: int) -> tuple[int, ...]:
        """Experts of each layer: multiples of `snap`, at most `largest`."""
        spread = self.largest - self.smallest
        raw = [self.smallest + spread * self._course(i, num_layers) for i in range(num_layers)]
        low = -(-self.smallest // self.snap)
        high = self.largest // self.snap
        if self.budget is None:
            # The small addition rounds values halfway between two multiples alike on every path.
            nearest = [math.floor(value / self.snap + 0.5 + 1e-9) for value in raw]
            units = [min(max(unit, low), high) for unit in nearest]
        else:
            factor = self.budget / self.snap / sum(raw)
            units = _share_out([value * factor for value in raw], self.budget // self.snap, high)
        return tuple(unit * self.snap for unit in units)

    def _course(self, index: int, num_layers: int) -> float:
        """Between 0 (smallest) and 1 (largest)."""
        u = index / (num_layers - 1) if num_layers > 1 else 0.0
        return {
            "uniform": 1.0,
            "descending": 1 - u,
            "ascending": u,
            "pyramid": 1 - abs(2 * u - 1),
            "valley": abs(2 * u - 1),
            "wave": (1 + math.cos(2 * math.pi * self.cycles * u)) / 2,
        }[self.shape]


def _share_out(wanted: list[float], total: int, most: int) -> list[int]:
    """Whole numbers near `wanted` between 1 and `most` with a given sum, by largest remainder."""
    units = [min(max(math.floor(value), 1), most) for value in wanted]
    while (missing := total - sum(units)) != 0:
        step = 1 if missing > 0 else -1
        movable = [i for i, unit in enumerate(units) if 1 <= unit + step <= most]
        best = max(movable, key=lambda i: (step * (wanted[i] - units[i]), -i))
        units[best] += step
    return units


class ExpertSpec(ConfigNode):
    """A group of experts of one kind in the pool of a MoE layer."""

    kind: Literal["ffn", "low_rank", "gru", "constant", "copy", "zero"]
    """ffn: a SwiGLU; low_rank: a linear map of low rank (LoRA); gru: a recurrent unit over the
    document's tokens; constant: a1*x + a2*v; copy: x; zero: 0 (MoE++)"""
    count: Annotated[
        Annotated[PositiveInt, NUMBER]
        | Annotated[tuple[PositiveInt, ...], Field(strict=False), LIST]
        | Annotated[LayerSchedule, MAPPING],
        ByShape,
    ] = 1
    """how many of them: a number, a list with one per MoE layer (MoLA), or a schedule (DynaMoE)"""
    intermediate_size: PositiveInt | None = None
    """width of each; the rank of low_rank, the state size of gru"""
    scale: float = Field(1.0, gt=0)
    """factor on the output of low_rank experts (LoRA: alpha / r)"""

    def count_in(self, index: int, num_layers: int) -> int:
        """How many of them a layer has."""
        if isinstance(self.count, LayerSchedule):
            return self.count.counts(num_layers)[index]
        return self.count if isinstance(self.count, int) else self.count[index]


class SharedExperts(ConfigNode):
    """SwiGLU experts that every token passes, beside the routed ones (DeepSeekMoE)."""

    count: PositiveInt = 1
    """how many; they act as one of `count * intermediate_size`"""
    intermediate_size: PositiveInt
    """width of each"""
    scale: float = Field(1.0, gt=0)
    """factor on their output"""


class DenseLayers(ConfigNode):
    """Layers that keep one SwiGLU for all tokens (DeepSeekMoE 16B: the first)."""

    layers: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
    """numbers of unique layers, from 0"""
    intermediate_size: PositiveInt
    """their width"""


class ChainConfig(ConfigNode):
    """Several turns through the experts of a layer (Chain-of-Experts, arXiv 2506.18945)."""

    iterations: PositiveInt = 2
    """C, turns"""
    residual: Literal["inner", "outer", "both"] = "inner"
    """inner: each turn adds to its input; outer: the last turn's result is added to the layer's
    input; both"""
    norm: Literal["per_iteration", "once"] = "per_iteration"
    """per_iteration: the stream is normalised before each turn and never replaced; once: only the
    first turn's input is, and with inner residuals the normalised stream replaces the stream, as
    published"""
    routers: Literal["per_iteration", "shared"] = "per_iteration"
    """a router for each turn, or one for all"""


class MoEConfig(ConfigNode):
    """A mixture of heterogeneous experts."""

    kind: Literal["moe"] = "moe"
    experts: Annotated[tuple[ExpertSpec, ...], Field(strict=False, min_length=1)]
    """the pool; its ids are numbered ffn, low_rank, gru, constant, copy, zero, whatever the order
    here"""
    shared: SharedExperts | None = None
    """experts that are always on"""
    router: RouterConfig = RouterConfig()
    """who goes where"""
    chain: ChainConfig | None = None
    """several turns through the experts"""
    reuse: PositiveInt = 1
    """so many consecutive layers route over all their experts together (ReXMoE)"""
    dense: DenseLayers | None = None
    """layers without routing"""

    def moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Which of the unique layers route: lists and schedules count these."""
        dense = self.dense.layers if self.dense else ()
        return tuple(index for index in range(num_layers) if index not in dense)

    def in_layer(self, index: int, num_layers: int) -> MoEConfig:
        """The configuration of one unique layer, in which lists and schedules are numbers."""
        layers = self.moe_layers(num_layers)
        index = layers.index(index)
        experts = tuple(
            spec.model_copy(update={"count": spec.count_in(index, len(layers))})
            for spec in self.experts
        )
        return self.model_copy(update={"experts": experts, "router": self.router.in_layer(index)})

    @property
    def iterations(self) -> int:
        """Turns through the experts."""
        return self.chain.iterations if self.chain else 1

    @property
    def sorted_experts(self) -> tuple[ExpertSpec, ...]:
        """The groups in the order of their ids."""
        return tuple(sorted(self.experts, key=lambda spec: ID_ORDER.index(spec.kind)))

    @property
    def pool(self) -> PoolShape:
        """The pool of one layer; of a configuration made by `in_layer`."""
        groups: list[tuple[ExpertKind, int]] = []
        for spec in self.sorted_experts:
            if not isinstance(spec.count, int):
                raise TypeError("the pool of a layer is that of its own configuration")
            groups.append((spec.kind, spec.count * self.reuse))
        return PoolShape(tuple(groups), num_owners=self.reuse)

    @property
    def num_experts(self) -> int:
        """N, the number of experts a router of the layer scores."""
        return self.pool.num_experts

    @property
    def num_assignments(self) -> int:
        """K, the most experts a token of the layer can have."""
        return self.router.selector.max_assignments(self.num_experts)

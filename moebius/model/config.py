"""Configuration of the model, and the rules that span its fields."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moebius.config import ConfigNode, Problem

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
ExpertKind = Literal["ffn", "constant", "copy", "zero"]


class AttentionConfig(ConfigNode):
    """Grouped-query attention with rotary positions."""

    num_heads: PositiveInt
    """query heads"""
    num_kv_heads: PositiveInt
    """key-value heads; each serves `num_heads / num_kv_heads` query heads"""
    head_dim: int = Field(ge=2, multiple_of=2)
    """channels of one head; even, because rotary embedding turns pairs"""
    rope_theta: float = Field(10_000.0, gt=0)
    """base of the rotary frequencies"""


class DenseConfig(ConfigNode):
    """One SwiGLU for all tokens."""

    kind: Literal["dense"] = "dense"
    intermediate_size: PositiveInt
    """width between the two projections"""


class ExpertSpec(ConfigNode):
    """A group of experts of one kind in the pool of a MoE layer."""

    kind: ExpertKind
    """ffn: a SwiGLU; constant: a1*x + a2*v; copy: x; zero: 0 (MoE++)"""
    count: PositiveInt = 1
    """how many of them"""
    intermediate_size: PositiveInt | None = None
    """width of each; ffn experts only"""


class ScorerConfig(ConfigNode):
    """How a token's scores over the experts arise; softmax makes them probabilities."""

    kind: Literal["linear"] = "linear"
    gating_residual: bool = False
    """add `W_g @ scores of the previous MoE layer` (MoE++ pathway-aware router)"""
    init_std: float | None = Field(None, gt=0)
    """standard deviation of the initial router weights; default: the model's `init_std`"""


class SelectorConfig(ConfigNode):
    """Which experts a token goes to."""

    kind: Literal["top_k"] = "top_k"
    top_k: PositiveInt = 2
    """experts per token, zero-computation ones included"""


class WeightPolicyConfig(ConfigNode):
    """How the chosen experts' outputs are weighted."""

    kind: Literal["raw", "renormalize", "drop_null_renormalize"] = "raw"
    """raw: the probability (MoE++ paper); renormalize: divided by the sum over the chosen
    (Mixtral); drop_null_renormalize: likewise, zero experts counting as 0 (MoE++ release)"""


class RouterConfig(ConfigNode):
    """The stages of routing over width, in order."""

    scorer: ScorerConfig = ScorerConfig()
    selector: SelectorConfig = SelectorConfig()
    weights: WeightPolicyConfig = WeightPolicyConfig()


class SwitchBalanceConfig(ConfigNode):
    """Load-balance loss `sum_i eta_i f_i P_i`, scaled to 1 at perfect balance."""

    kind: Literal["switch"] = "switch"
    coefficient: float = Field(0.01, ge=0)
    """weight of the loss beside the cross-entropy, per MoE layer"""
    tau: float = Field(1.0, gt=0)
    """load of an ffn expert relative to a zero-computation one at balance (MoE++ eq. 7)"""
    scope: Literal["sequence", "micro_batch"] = "sequence"
    """over which tokens load and probability are averaged; `sequence` is independent of how a
    batch is cut into micro-batches, `micro_batch` (as published) is not"""
    paper_scale: bool = False
    """read `coefficient` as the beta of MoE++, whose loss is `K*tau/(tau*E + Z)` at balance"""


class MoEConfig(ConfigNode):
    """A mixture of heterogeneous experts."""

    kind: Literal["moe"] = "moe"
    experts: Annotated[tuple[ExpertSpec, ...], Field(strict=False)]
    """the pool; its ids are numbered ffn, constant, copy, zero, whatever the order here"""
    router: RouterConfig = RouterConfig()
    balance: SwitchBalanceConfig | None = SwitchBalanceConfig()
    """load-balance loss, or null for none"""

    def count(self, kind: ExpertKind) -> int:
        """Number of experts of one kind."""
        return sum(spec.count for spec in self.experts if spec.kind == kind)

    @property
    def num_experts(self) -> int:
        """N, the number of experts the router scores."""
        return sum(spec.count for spec in self.experts)


class DepthRouterConfig(ConfigNode):
    """Expert-choice routing over depth (Mixture-of-Recursions): each depth picks its tokens."""

    kind: Literal["expert_choice"] = "expert_choice"
    capacities: Annotated[tuple[float, ...], Field(strict=False)] | None = None
    """share of the sequence that enters each depth; default (N_r - r + 1) / N_r"""
    activation: Literal["sigmoid", "tanh", "constant"] = "sigmoid"
    """gate = alpha * activation(logit); constant: alpha alone"""
    alpha: float = Field(0.1, gt=0)
    """scale of the gate"""
    gating: Literal["weighted", "additive"] = "weighted"
    """weighted: h + gate * block(h), as published; additive: h + gate * (block(h) - h)"""
    aux_coefficient: float = Field(0.001, ge=0)
    """weight of the loss that teaches `sigmoid(logit) >= 1/2` to reproduce the selection; per token
    of the whole batch (the authors' 0.001 acts like 0.001 * their accumulation steps)"""


class DepthConfig(ConfigNode):
    """Which unique layer runs where in the unrolled depth."""

    num_layers: PositiveInt
    """unrolled layers: how many a token passes when none is skipped"""
    sharing: Sharing = "none"
    """how unrolled layers share weights; `middle_*` keeps the first and last layer unique"""
    num_recursions: PositiveInt = 1
    """how often shared layers are used"""
    router: DepthRouterConfig | None = None
    """which tokens enter each recursion; null: all"""


class ModelConfig(ConfigNode):
    """A decoder-only transformer, routed over width and depth."""

    vocab_size: PositiveInt
    """rows of the embedding; token ids must be smaller"""
    hidden_size: PositiveInt
    """width of the residual stream"""
    attention: AttentionConfig
    ffn: Annotated[DenseConfig | MoEConfig, Field(discriminator="kind")]
    """the second sublayer of every block"""
    depth: DepthConfig
    tie_embeddings: bool = True
    """use the embedding as the output head"""
    norm_eps: float = Field(1e-5, gt=0)
    """added to the mean square in RMSNorm"""
    init_std: float = Field(0.02, gt=0)
    """standard deviation of initial weights"""


def attention_rules(model: ModelConfig) -> Iterator[Problem]:
    """Query heads must be served evenly by key-value heads."""
    heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    if heads % kv_heads:
        yield Problem(
            "attention.num_kv_heads",
            f"{kv_heads} does not divide num_heads = {heads}; "
            f"allowed: {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}",
        )


def expert_rules(model: ModelConfig) -> Iterator[Problem]:
    """The pool of a MoE layer must be buildable and large enough for the selector."""
    if not isinstance(model.ffn, MoEConfig):
        return
    for number, spec in enumerate(model.ffn.experts):
        path = f"ffn.experts.{number}.intermediate_size"
        if spec.kind == "ffn" and spec.intermediate_size is None:
            yield Problem(path, "missing; an ffn expert needs a width, for example 1024")
        if spec.kind != "ffn" and spec.intermediate_size is not None:
            yield Problem(path, f"{spec.intermediate_size}, but a {spec.kind} expert has no width")
    groups = sum(spec.kind == "ffn" for spec in model.ffn.experts)
    if groups != 1:
        yield Problem("ffn.experts", f"{groups} groups of kind ffn; exactly one is supported")
    top_k = model.ffn.router.selector.top_k
    if top_k > model.ffn.num_experts:
        yield Problem(
            "ffn.router.selector.top_k",
            f"{top_k} experts per token, but the pool has {model.ffn.num_experts}",
        )


def sharing_rules(model: ModelConfig) -> Iterator[Problem]:
    """Unrolled layers must be a whole number of recursions (plus two for `middle_*`)."""
    depth = model.depth
    if depth.sharing == "none":
        if depth.num_recursions != 1:
            yield Problem(
                "depth.num_recursions",
                f"{depth.num_recursions}, but sharing is none; use 1 or another sharing",
            )
        return
    ends = 2 if depth.sharing.startswith("middle") else 0
    looped = depth.num_layers - ends
    if looped < depth.num_recursions or looped % depth.num_recursions:
        lower = max(looped // depth.num_recursions, 1) * depth.num_recursions + ends
        nearest = (lower, lower + depth.num_recursions)
        yield Problem(
            "depth.num_layers",
            f"{depth.num_layers} layers cannot be {depth.num_recursions} recursions of "
            f"{depth.sharing}; the nearest that can: {nearest[0]}, {nearest[1]}",
        )


def depth_router_rules(model: ModelConfig) -> Iterator[Problem]:
    """Capacities must fit the recursions, and only a looped block can be left early."""
    router, depth = model.depth.router, model.depth
    if router is None:
        return
    if depth.sharing not in ("cycle", "middle_cycle"):
        yield Problem(
            "depth.router",
            f"routing over depth needs sharing cycle or middle_cycle, not {depth.sharing}: "
            "tokens can leave only between passes of one block",
        )
    capacities = router.capacities
    if capacities is None:
        return
    path = "depth.router.capacities"
    if len(capacities) != depth.num_recursions:
        yield Problem(
            path, f"{len(capacities)} capacities for num_recursions = {depth.num_recursions}"
        )
    if any(not 0 < c <= 1 for c in capacities):
        yield Problem(path, f"{list(capacities)}: each must be in (0, 1]")
    elif any(later > earlier for earlier, later in itertools.pairwise(capacities)):
        yield Problem(path, f"{list(capacities)}: must not increase, a token cannot come back")


MODEL_RULES = (attention_rules, expert_rules, sharing_rules, depth_router_rules)

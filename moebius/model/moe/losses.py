"""Auxiliary losses of a router, each a mean over the tokens of its call site.

Those that look at load average over groups of tokens, their scope:

- `global`: the tokens of the whole step. What the step's other micro-batches and ranks do is not
  known when a gradient is due, so load and mean probability are those of the previous step; the
  loss is linear in the present probabilities and the same however the batch is cut.
- `sequence`: each row by itself, also the same however the batch is cut between rows.
- `micro_batch`: as most published code has it; depends on how the batch is cut.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moebius.model.moe.entropy import Measure, entropy
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.routing import Routing
from moebius.model.moe.stage import Stage

Scope = Literal["global", "sequence", "micro_batch"]


@dataclass(frozen=True)
class Load:
    """Assignments and probability per group of tokens and expert."""

    counts_GN: Tensor
    prob_sums_GN: Tensor
    tokens_G: Tensor

    @property
    def mean_probs_GN(self) -> Tensor:
        """P of the papers; a group without tokens has none."""
        return self.prob_sums_GN / self.tokens_G.clamp(min=1).unsqueeze(1)

    def mean(self, values_G: Tensor) -> Tensor:
        """The mean over groups, weighted by their tokens."""
        return (values_G * self.tokens_G).sum() / self.tokens_G.sum().clamp(min=1)


@dataclass(frozen=True)
class Observation:
    """What a router did at one call site, before capacities."""

    routing: Routing
    valid_T: Tensor
    per_row: Load
    last_step: Load | None
    """one group: the whole previous step; None where no loss has scope `global`"""
    pool: PoolShape

    def load(self, scope: Scope, eta_N: Tensor) -> Load:
        """Load by the groups of a scope. Before the first step it is in balance (`1 / eta`)."""
        rows = self.per_row
        if scope == "sequence":
            return rows
        together = Load(
            rows.counts_GN.sum(0, True), rows.prob_sums_GN.sum(0, True), rows.tokens_G.sum(0, True)
        )
        if scope == "micro_batch":
            return together
        counts_1N = self.reference.counts_GN
        fresh = counts_1N.sum() == 0
        counts_1N = torch.where(fresh, (1 / eta_N).unsqueeze(0), counts_1N)
        return Load(counts_1N, together.prob_sums_GN, together.tokens_G)

    @property
    def reference(self) -> Load:
        """The previous step."""
        if self.last_step is None:
            raise ValueError("a loss of scope global needs the load of the previous step")
        return self.last_step

    def token_mean(self, values_T: Tensor) -> Tensor:
        """The mean over present tokens."""
        return (values_T * self.valid_T).sum() / self.valid_T.sum().clamp(min=1)


class Loss(Stage):
    """What all losses have in common."""

    coefficient: float
    """weight beside the cross-entropy, per router call site"""

    @property
    def remembers_load(self) -> bool:
        """Whether it needs the load of the previous step."""
        return getattr(self, "scope", None) == "global"

    @property
    def needs_fixed_k(self) -> bool:
        """Whether it is defined for a fixed number of experts per token only."""
        return False

    @abstractmethod
    def value(self, seen: Observation) -> Tensor:
        """The loss, 0-dim."""

    def unit_coefficient(self, pool: PoolShape, num_assignments: int) -> float:
        """The weight of the loss as we define it."""
        return self.coefficient


class SwitchLoss(Loss):
    """Load balance `sum_i eta_i f_i P_i`, scaled to 1 at perfect balance (Switch, MoE++ eq. 7)."""

    kind: Literal["switch"] = "switch"
    coefficient: float = Field(0.01, ge=0)
    """weight beside the cross-entropy, per router call site"""
    tau: float = Field(1.0, gt=0)
    """load of a computing expert relative to a zero-computation one at balance (MoE++); matters
    in pools that have both"""
    scope: Scope = "global"
    """over which tokens load and probability are averaged"""
    published_scale: Literal["switch", "moepp", "mixtral"] = "switch"
    """read `coefficient` as one for a loss that at balance is 1 (Switch, Megatron, DeepSeek, OLMo),
    `K tau / (tau E + Z)` (MoE++) or K (RMoE and old Mixtral code, which sum over assignments)"""

    @property
    def needs_fixed_k(self) -> bool:
        """Published scales that contain K."""
        return self.published_scale != "switch"

    def unit_coefficient(self, pool: PoolShape, num_assignments: int) -> float:
        """The published coefficient times the published loss at balance."""
        if self.published_scale == "moepp":
            shares = float((1 / pool.load_weights(self.tau)).sum())
            return self.coefficient * num_assignments / shares
        if self.published_scale == "mixtral":
            return self.coefficient * num_assignments
        return self.coefficient

    def computing_share(self, pool: PoolShape) -> float:
        """At balance of MoE++ eq. 7, `tau E / (tau E + Z)`."""
        share_N = 1 / pool.load_weights(self.tau)
        return float(share_N[: pool.num_computing].sum() / share_N.sum())

    def value(self, seen: Observation) -> Tensor:
        """See `switch_loss`."""
        eta_N = seen.pool.load_weights(self.tau).to(seen.valid_T.device)
        return switch_loss(seen.load(self.scope, eta_N), eta_N)


class DeviceLoss(Loss):
    """Load balance between groups of experts that share a device (DeepSeekMoE eq. 15-17)."""

    kind: Literal["device"] = "device"
    coefficient: float = Field(0.05, ge=0)
    """weight beside the cross-entropy, per router call site"""
    num_groups: PositiveInt
    """devices, each with an equal range of the dispatched experts' ids"""
    scope: Scope = "global"
    """over which tokens load and probability are averaged"""

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """Devices hold equally many experts."""
        if pool.num_dispatched % self.num_groups or not pool.num_dispatched:
            yield (
                "num_groups",
                f"{self.num_groups} groups do not divide {pool.num_dispatched} experts evenly",
            )

    def value(self, seen: Observation) -> Tensor:
        """`1 + sum_d (f'_d - 1) P'_d`, f' the mean of a group's `E f_i`, P' its probability.

        Where all experts are dispatched this is `sum_d f'_d P'_d`. 1 at balance, where it pulls no
        probability to or from the experts that are not.
        """
        num_dispatched = seen.pool.num_dispatched
        eta_N = torch.ones(seen.pool.num_experts, device=seen.valid_T.device)
        load = seen.load(self.scope, eta_N)
        counts_GE = load.counts_GN[:, :num_dispatched]
        share_GE = counts_GE / counts_GE.sum(dim=1, keepdim=True).clamp(min=1e-9)
        mean_load_GD = num_dispatched * share_GE.unflatten(1, (self.num_groups, -1)).mean(dim=-1)
        probs_GE = load.mean_probs_GN[:, :num_dispatched]
        probs_GD = probs_GE.unflatten(1, (self.num_groups, -1)).sum(dim=-1)
        return 1 + load.mean(((mean_load_GD - 1) * probs_GD).sum(dim=1))


class MutualInformationLoss(Loss):
    """`H(expert | token) - H(expert)`: each token decided, all experts used (ModuleFormer).

    0 for a router that treats all tokens alike, `-log N` for one that sends each token to one
    expert and the same number to each.
    """

    kind: Literal["mutual_information"] = "mutual_information"
    coefficient: float = Field(0.01, ge=0)
    """weight beside the cross-entropy, per router call site"""
    scope: Scope = "global"
    """over which tokens the probability of an expert is averaged"""

    def value(self, seen: Observation) -> Tensor:
        """In nats."""
        conditional_T = entropy(seen.routing.probs_TN, "shannon", 1.0, normalized=False)
        return seen.token_mean(conditional_T) - marginal_entropy(seen, self.scope)


class ConcentrationLoss(Loss):
    """`H(expert)`: the load on few experts, so that the others can be pruned (ModuleFormer)."""

    kind: Literal["concentration"] = "concentration"
    coefficient: float = Field(0.01, ge=0)
    """weight beside the cross-entropy, per router call site"""
    scope: Scope = "global"
    """over which tokens the probability of an expert is averaged"""

    def value(self, seen: Observation) -> Tensor:
        """In nats."""
        return marginal_entropy(seen, self.scope)


class EntropyLoss(Loss):
    """Mean entropy of the tokens' probabilities: keeps a router from flattening to buy experts
    (Dynamic_MoE: shannon, not normalised; DynMoLE: tsallis 1.1, normalised)."""

    kind: Literal["entropy"] = "entropy"
    coefficient: float = 1e-4
    """weight beside the cross-entropy, per router call site; negative: reward entropy"""
    measure: Measure = "shannon"
    """which entropy"""
    index: float = Field(1.1, gt=0)
    """q of tsallis and renyi"""
    normalized: bool = False
    """divide by the entropy of equal probabilities"""

    def value(self, seen: Observation) -> Tensor:
        """Between 0 and 1, or in nats."""
        probs_TN = seen.routing.probs_TN
        return seen.token_mean(entropy(probs_TN, self.measure, self.index, self.normalized))


class ZLoss(Loss):
    """Mean `logsumexp(logits)^2`: keeps logits small (ST-MoE, arXiv 2202.08906)."""

    kind: Literal["z"] = "z"
    coefficient: float = Field(1e-3, ge=0)
    """weight beside the cross-entropy, per router call site"""

    def value(self, seen: Observation) -> Tensor:
        """Of the raw scores, before temperature and noise."""
        return seen.token_mean(seen.routing.logits_TN.logsumexp(dim=-1).square())


def switch_loss(load: Load, eta_N: Tensor) -> Tensor:
    """`sum_i(eta_i f_i P_i) * sum_i(1/eta_i)`, averaged over groups by their tokens.

    Switch Transformer (Fedus et al. 2021) with the weights eta of MoE++: f is an expert's share of
    the group's assignments, P its mean probability. Minimising it drives `eta_i * f_i` to the same
    value for all experts, where the loss is 1, for any K, also one that varies by token.
    Gradients flow through P. Groups without tokens contribute nothing.
    """
    share_GN = load.counts_GN / load.counts_GN.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return load.mean((eta_N * share_GN * load.mean_probs_GN).sum(dim=1) * (1 / eta_N).sum())


def marginal_entropy(seen: Observation, scope: Scope) -> Tensor:
    """Entropy of the mean probability of each expert, `H(expert)`, in nats.

    With scope `global`: `-sum_i P_i log Q_i` with Q the previous step's means. Its gradient is that
    of the entropy as far as Q is P.
    """
    uniform_N = torch.ones(seen.pool.num_experts, device=seen.valid_T.device)
    load = seen.load(scope, uniform_N)
    probs_GN = load.mean_probs_GN
    if scope != "global":
        return load.mean(entropy(probs_GN, "shannon", 1.0, normalized=False))
    last_1N = seen.reference.mean_probs_GN
    last_1N = torch.where(last_1N.sum() == 0, uniform_N / len(uniform_N), last_1N)
    return -(probs_GN * last_1N.clamp(min=torch.finfo(last_1N.dtype).tiny).log()).sum()

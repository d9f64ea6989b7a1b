"""Configuration of the depth: shared layers, and which tokens pass them how often."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, Tag

from moebius.config import ConfigNode, kind_or
from moebius.model.moe.config import RouterConfig
from moebius.model.moe.losses import SwitchLoss
from moebius.model.moe.norms import Softmax
from moebius.model.moe.registry import AnyController, AnyLoss, AnyNorm, AnyScorer
from moebius.model.moe.scorers import CosineScorerConfig, LinearScorerConfig, MLPScorerConfig
from moebius.model.moe.selectors import TopK
from moebius.model.schedule import NonNegativeScheduled, value_at

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
KVSharing = Literal["per_depth", "shared_first", "hybrid"]
DepthScorer = Annotated[
    LinearScorerConfig | MLPScorerConfig | CosineScorerConfig, Field(discriminator="kind")
]
"""scorers that need nothing but the token"""


class CausalLoss(ConfigNode):
    """Teach `sigmoid(logit) >= 1/2` to reproduce the selection, by binary cross-entropy."""

    kind: Literal["loss"] = "loss"
    coefficient: float = Field(0.001, ge=0)
    """weight beside the cross-entropy, per token of the whole batch"""
    published_accumulation: PositiveInt = 1
    """accumulation steps of the run that a published coefficient comes from: the authors' code
    divides its other losses by them, but not this one, so theirs acts that many times stronger"""

    @property
    def weight(self) -> float:
        """The coefficient of the loss as a mean over the tokens of the batch."""
        return self.coefficient * self.published_accumulation


class CausalRouter(ConfigNode):
    """A second router per depth that learns to predict the selection and leaves the model alone.

    Its input is detached, its gradients are clipped by themselves, and its role `aux_router` has a
    learning rate of its own.
    """

    kind: Literal["router"] = "router"
    scorer: DepthScorer = LinearScorerConfig()
    """from a token to its score"""


class NotCausal(ConfigNode):
    """Nothing: the model can be trained and evaluated looking ahead, but not generate."""

    kind: Literal["none"] = "none"


class ExpertChoiceConfig(ConfigNode):
    """Each depth picks its tokens (Mixture-of-Recursions, arXiv 2507.10524, section 2.2)."""

    kind: Literal["expert_choice"] = "expert_choice"
    capacities: Annotated[tuple[NonNegativeScheduled, ...], Field(strict=False)] | None = None
    """share of the sequence that enters each depth, numbers or `[[step, share], ...]`; default
    (N_r - r + 1) / N_r"""
    warmup_steps: NonNegativeInt = 0
    """optimizer steps over which shares fall from 1 to `capacities` along half a cosine"""
    multiple_of: PositiveInt = 1
    """round numbers of tokens up to multiples of this"""
    scope: Literal["row", "document"] = "row"
    """which tokens compete: those of a row, as published, or of a document in a row"""
    scorer: DepthScorer = LinearScorerConfig()
    """from a token to its score"""
    temperature: float = Field(1.0, gt=0)
    """divides the scorer's input"""
    activation: Literal["sigmoid", "tanh", "none", "constant"] = "sigmoid"
    """gate = alpha * activation(logit); none: the logit itself; constant: alpha alone"""
    alpha: float = Field(0.1, gt=0)
    """scale of the gate"""
    gating: Literal["weighted", "additive"] = "weighted"
    """weighted: h + gate * block(h), as published; additive: h + gate * (block(h) - h)"""
    causal: Annotated[
        Annotated[CausalLoss, Tag("loss")]
        | Annotated[CausalRouter, Tag("router")]
        | Annotated[NotCausal, Tag("none")],
        kind_or("loss"),
    ] = CausalLoss()
    """how selecting without looking ahead is learned"""
    z_coefficient: float = Field(0.0, ge=0)
    """weight of the mean squared logit"""

    def shares(self, num_recursions: int, step: int) -> tuple[float, ...]:
        """c_r of every depth at an optimizer step (0: before the first)."""
        if self.capacities is None:
            final = [(num_recursions - number) / num_recursions for number in range(num_recursions)]
        else:
            final = [value_at(capacity, step) for capacity in self.capacities]
        left = 0.0
        if step < self.warmup_steps:
            left = 0.5 * (1 + math.cos(math.pi * step / self.warmup_steps))
        return tuple(share + (1 - share) * left for share in final)


class TokenChoiceConfig(ConfigNode):
    """Each token picks its number of passes once, before the first (section 2.2 there).

    A choice among N_r depths is routing over width with one expert per depth, so scorer, norm,
    losses (balance, z) and controllers (loss-free balance) are those of `docs/routing.md`.
    """

    kind: Literal["token_choice"] = "token_choice"
    scorer: AnyScorer = LinearScorerConfig()
    """from a token to a score per depth"""
    norm: AnyNorm = Softmax()
    """from scores to probabilities"""
    alpha: float = Field(1.0, gt=0)
    """gate = alpha * probability of the chosen depth"""
    gating: Literal["last", "every"] = "last"
    """which passes' results the gate multiplies: the token's last, as the authors measured, or
    every one, as their paper writes"""
    losses: Annotated[tuple[AnyLoss, ...], Field(strict=False)] = (SwitchLoss(coefficient=0.1),)
    """auxiliary losses"""
    controllers: Annotated[tuple[AnyController, ...], Field(strict=False)] = ()
    """state that steers the choice, moved after every optimizer step"""
    full_depth_steps: NonNegativeInt = 0
    """optimizer steps in which every token makes all passes"""
    multiple_of: PositiveInt = 1
    """round the slots of a pass up to a multiple of this, empty ones at the end; not where several
    processes share a row"""

    def shares(self, num_recursions: int, step: int) -> tuple[float, ...]:
        """The share of the tokens that enters every depth if all depths are chosen as often."""
        if step < self.full_depth_steps:
            return (1.0,) * num_recursions
        return tuple((num_recursions - number) / num_recursions for number in range(num_recursions))

    @property
    def stages(self) -> RouterConfig:
        """The router over depths."""
        return RouterConfig(
            scorer=self.scorer,
            norm=self.norm,
            selector=TopK(top_k=1),
            losses=self.losses,
            controllers=self.controllers,
        )


class LowRankConfig(ConfigNode):
    """`W + scale * B_r A_r` at pass r."""

    rank: PositiveInt
    """rows of A"""
    scale: float = Field(1.0, gt=0)
    """factor on the low-rank part"""
    gains: bool = True
    """also a vector per pass behind each norm, as kind `gain`; without, passes share their norms
    as published, and a dense model is recovered only if its norms are alike"""


class LoraConfig(LowRankConfig):
    """`W x + scale * B_r A_r x` in every linear map of a shared layer (arXiv 2410.20672)."""

    kind: Literal["lora"] = "lora"


class DoraConfig(LowRankConfig):
    """`m_r * V / |V|` by output, `V = W + scale * B_r A_r` (DoRA, arXiv 2402.09353)."""

    kind: Literal["dora"] = "dora"


class GainConfig(ConfigNode):
    """A vector per pass behind each norm of a shared layer: the cheapest relaxation."""

    kind: Literal["gain"] = "gain"
    gains: ClassVar[bool] = True


AdapterConfig = Annotated[LoraConfig | DoraConfig | GainConfig, Field(discriminator="kind")]
DepthRouterConfig = Annotated[
    Annotated[ExpertChoiceConfig, Tag("expert_choice")]
    | Annotated[TokenChoiceConfig, Tag("token_choice")],
    kind_or("expert_choice"),
]


class DepthConfig(ConfigNode):
    """Which unique layer runs where in the unrolled depth."""

    num_layers: PositiveInt
    """unrolled layers: how many a token passes when none is skipped"""
    sharing: Sharing = "none"
    """how unrolled layers share weights; `middle_*` keeps the first and last layer unique"""
    num_recursions: PositiveInt = 1
    """how often shared layers are used"""
    groups: PositiveInt = 1
    """with cycle and middle_cycle: consecutive groups of layers that are each repeated by
    themselves; not published, quality unknown"""
    router: DepthRouterConfig | None = None
    """which tokens enter each recursion; null: all"""
    kv: KVSharing = "per_depth"
    """keys that a pass attends to: those it makes of its own tokens; those of the first pass,
    which alone makes any; or of each earlier token the newest (hybrid)"""
    adapter: AdapterConfig | None = None
    """what differs between the uses of a shared layer"""

"""Configuration of routing over depth: shared layers, and which tokens pass them again."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moebius.config import ConfigNode

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]


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

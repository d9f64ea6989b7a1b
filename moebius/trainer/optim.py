"""AdamW and Muon with options by parameter role."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from moebius.config import ConfigNode
from moebius.model.parameters import ParameterSpec, Role
from moebius.trainer.muon import Muon, MuonConfig
from moebius.trainer.schedules import CosineSchedule, Schedule

RoleName = Literal[
    "embed",
    "head",
    "matrix",
    "expert",
    "router",
    "aux_router",
    "norm_in",
    "adapter",
    "gain",
    "bias",
]
Decay = Annotated[float, Field(ge=0, lt=1)]
UNDECAYED = (Role.NORM_IN, Role.GAIN, Role.BIAS)


class RoleOptions(ConfigNode):
    """Deviations for the parameters of one role."""

    lr_scale: float | None = Field(None, ge=0)
    """factor on the learning rate; null: 1, and 10 for `aux_router`, as published"""
    weight_decay: float | None = Field(None, ge=0)
    """null: the common one (norm gains and biases: none)"""


class OptimConfig(ConfigNode):
    """AdamW (Loshchilov & Hutter 2019) and what surrounds its step."""

    lr: float = Field(3e-4, gt=0)
    """peak learning rate"""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """decay of the first and second moment"""
    eps: float = Field(1e-8, gt=0)
    """added to the root of the second moment"""
    weight_decay: float = Field(0.1, ge=0)
    """decoupled weight decay"""
    clip_norm: float = Field(1.0, gt=0)
    """largest global gradient norm"""
    schedule: Schedule = CosineSchedule()
    """course of the learning rate"""
    roles: dict[RoleName, RoleOptions] = Field(default_factory=dict)
    """options by parameter role"""
    muon: MuonConfig | None = None
    """Muon in place of AdamW for matrices of some roles; null: AdamW for all"""


def muon_roles(config: OptimConfig) -> frozenset[Role]:
    """Roles whose parameters Muon updates."""
    return frozenset(Role(name) for name in config.muon.roles) if config.muon else frozenset()


def build_optimizer(
    parameters: Iterable[tuple[nn.Parameter, ParameterSpec]],
    config: OptimConfig,
    muon_dtype: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """One parameter group per role, each with its `lr_scale`; frozen parameters are in none.

    Muon has a group per role and number of stacked matrices, see `Muon`, which has `muon_dtype`.
    """
    groups: dict[tuple[Role, int], list[nn.Parameter]] = {}
    of_muon = muon_roles(config)
    for parameter, spec in parameters:
        if spec.role is not Role.FROZEN:
            stacked = spec.stacked if spec.role in of_muon else 0
            groups.setdefault((spec.role, stacked), []).append(parameter)
    rest, matrices = [], []
    for (role, stacked), members in groups.items():
        group = {"params": members, **_options(role, config)}
        if stacked:
            matrices.append(group | {"stacked": stacked})
        else:
            rest.append(group)
    adamw = torch.optim.AdamW(
        rest or [_nothing()], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    if config.muon is None:
        return adamw
    return Muon(matrices or [_nothing(1)], adamw, config.muon, muon_dtype)


def _options(role: Role, config: OptimConfig) -> dict[str, float]:
    """Of the group of a role."""
    options = next((o for name, o in config.roles.items() if name == role), RoleOptions())
    decay = options.weight_decay
    if decay is None:
        decay = 0.0 if role in UNDECAYED else config.weight_decay
    scale = options.lr_scale
    if scale is None:
        scale = 10.0 if role is Role.AUX_ROUTER else 1.0
    return {"weight_decay": decay, "lr_scale": scale}


def _nothing(*shape: int) -> dict[str, Any]:
    """A group for an optimizer that must have one: a process may have nothing to update, where more
    processes than elements share it out."""
    empty = nn.Parameter(torch.zeros(*shape, 0))
    return {"params": [empty], "lr_scale": 1.0, "weight_decay": 0.0}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the coming step in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]

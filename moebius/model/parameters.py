"""Parameters with a role and an initial distribution, both declared where they are made.

Optimizer groups, weight decay, clipping and sharding read roles, never name patterns. Values are
drawn from a generator of their own per parameter, seeded by (seed, name): neither the order of
construction nor a layout that owns only part of the model changes them.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from moebius.kernels.registry import PLAIN, Kernels


class Role(StrEnum):
    """What a parameter is for."""

    EMBED = "embed"
    HEAD = "head"
    MATRIX = "matrix"
    EXPERT = "expert"
    ROUTER = "router"
    AUX_ROUTER = "aux_router"
    NORM_IN = "norm_in"
    ADAPTER = "adapter"
    GAIN = "gain"
    BIAS = "bias"
    FROZEN = "frozen"


@dataclass(frozen=True)
class ParameterSpec:
    """Role and initial distribution: normal with standard deviation `std` around `mean`."""

    role: Role
    mean: float = 0.0
    std: float = 0.0
    stacked: int = 1
    """how many matrices lie above each other in the last but one dimension"""


class ParameterModule(nn.Module):
    """A module that declares its own parameters; children are ordinary attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter_specs: dict[str, ParameterSpec] = {}

    def derive(self) -> None:
        """Set initial values that follow from those of other parameters; there are none here."""

    def declare(self, name: str, shape: tuple[int, ...], spec: ParameterSpec) -> None:
        """Make `self.<name>` an uninitialised parameter; `initialize` fills it.

        One with the role FROZEN takes no gradient and keeps its initial value.
        """
        parameter = nn.Parameter(torch.empty(shape), requires_grad=spec.role is not Role.FROZEN)
        setattr(self, name, parameter)
        self.parameter_specs[name] = spec


def named_specs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParameterSpec]]:
    """Every parameter once, with its full name and its spec.

    Raises KeyError for a parameter that was not made by `ParameterModule.declare`.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full_name = f"{prefix}.{name}" if prefix else name
            specs = getattr(module, "parameter_specs", {})
            if name not in specs:
                raise KeyError(f"parameter {full_name} was made without a role")
            yield full_name, parameter, specs[name]


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter from its own generator, on the CPU: the device changes nothing."""
    for name, parameter, spec in named_specs(model):
        if spec.std == 0.0:
            parameter.fill_(spec.mean)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        values = torch.empty(parameter.shape, dtype=torch.float32)
        parameter.copy_(values.normal_(spec.mean, spec.std, generator=generator))
    for module in model.modules():
        if isinstance(module, ParameterModule):
            module.derive()


class Linear(ParameterModule):
    """`x @ weight.T`, without bias; `weight` is `[out, in]`."""

    weight: nn.Parameter

    def __init__(self, in_size: int, out_size: int, role: Role, std: float) -> None:
        super().__init__()
        self.declare("weight", (out_size, in_size), ParameterSpec(role, std=std))

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension."""
        return nn.functional.linear(x, self.weight)

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs: one multiplication and one addition per weight and token."""
        return 2 * num_tokens * math.prod(self.weight.shape)


class RMSNorm(ParameterModule):
    """Root-mean-square normalisation (Zhang & Sennrich 2019) with a gain, computed in fp32."""

    weight: nn.Parameter

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.declare("weight", (size,), ParameterSpec(Role.NORM_IN, mean=1.0))

    def forward(self, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        """Normalise the last dimension; the result has the precision of `x`."""
        return kernels.rms_norm(x, self.weight, self.eps)

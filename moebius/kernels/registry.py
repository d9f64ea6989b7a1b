"""The implementation of each operation: the plain one, or another that a run chooses.

Functions of one operation are exchanged together and have the names, arguments and meaning of the
plain ones. To add a backend, write them in a module and name it in `BACKENDS`.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moebius.kernels.attention import sdpa
from moebius.kernels.cpp import build
from moebius.kernels.depth_select import add_gated_rows, take_rows, top_k_positions
from moebius.kernels.grouped_linear import grouped_linear
from moebius.kernels.grouped_swiglu import grouped_swiglu
from moebius.kernels.permute import Order, permute, sort_by_expert, unpermute
from moebius.kernels.rms_norm import rms_norm
from moebius.kernels.rope import apply_rope
from moebius.kernels.route import Picked, route
from moebius.kernels.swiglu import swiglu
from moebius.kernels.zero_experts import affine_experts

Operation = Literal[
    "permute",
    "grouped_gemm",
    "swiglu",
    "zero_experts",
    "route",
    "depth_select",
    "rms_norm",
    "rope",
    "attention",
    "cross_entropy",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
Problem = tuple[str, str]
"""why a backend cannot run here, and what to do about it"""
Requirement = Callable[[torch.device, torch.dtype], Problem | None]
"""why it cannot run on a device with products in a precision; None: it can"""


@dataclass(frozen=True)
class Kernels:
    """One function for each name; the definitions by default."""

    sort_by_expert: Callable[..., Order] = sort_by_expert
    permute: Callable[..., tuple[Tensor, Tensor]] = permute
    unpermute: Callable[..., Tensor] = unpermute
    grouped_linear: Callable[..., Tensor] = grouped_linear
    grouped_swiglu: Callable[..., Tensor] = grouped_swiglu
    swiglu: Callable[..., Tensor] = swiglu
    affine_experts: Callable[..., Tensor] = affine_experts
    route: Callable[..., Picked] = route
    top_k_positions: Callable[..., Tensor] = top_k_positions
    take_rows: Callable[..., Tensor] = take_rows
    add_gated_rows: Callable[..., Tensor] = add_gated_rows
    rms_norm: Callable[..., Tensor] = rms_norm
    apply_rope: Callable[..., Tensor] = apply_rope
    attention: Callable[..., Tensor] = sdpa
    row_losses: Callable[..., Tensor] | None = None
    """see `linear_cross_entropy`"""
    alignment: int = 1
    """rows of an expert are padded to a multiple of it"""


PLAIN = Kernels()
"""the definitions"""


@dataclass(frozen=True)
class Backend:
    """Where the functions of one implementation of an operation are."""

    functions: Mapping[str, str]
    """field of `Kernels` -> `module:function`, the module in `moebius.kernels`"""
    problem: Requirement
    flash_implementation: str | None = None
    """what torch's attention is told to use, for the whole process"""


def choose(
    names: Mapping[Operation, str], device: torch.device, dtype: torch.dtype, alignment: int = 1
) -> Kernels:
    """The functions of the backends that are named, the plain ones for operations that are not.

    `dtype` is that of products. Raises KernelError where a backend cannot run here.
    """
    found: dict[str, Callable[..., Any]] = {}
    for operation, chosen in names.items():
        backend = BACKENDS[operation][chosen]
        problem = backend.problem(device, dtype)
        if problem is not None:
            raise KernelError(operation, chosen, *problem)
        if backend.flash_implementation is not None:
            try:
                torch.nn.attention.activate_flash_attention_impl(backend.flash_implementation)
            except Exception as error:  # whatever the package raises where it does not fit the GPU
                reason = " ".join(f"torch cannot use it: {error}".split())
                raise KernelError(operation, chosen, reason, "choose varlen") from error
        for field, function in backend.functions.items():
            module, _, name = function.partition(":")
            found[field] = getattr(importlib.import_module(f"moebius.kernels.{module}"), name)
    return replace(PLAIN, alignment=alignment, **found)


class KernelError(Exception):
    """A backend that was asked for cannot run here."""

    def __init__(self, operation: Operation, name: str, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.operation = operation
        self.name = name
        self.hint = hint


def is_installed(package: str) -> bool:
    """Whether a package, or a module of one, is there; nothing is imported but its parents."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _always(device: torch.device, dtype: torch.dtype) -> Problem | None:
    return None


def _triton(device: torch.device, dtype: torch.dtype) -> Problem | None:
    if not is_installed("triton"):
        return "triton is not installed", "pip install 'moebius[gpu]'"
    if device.type == "cuda" or importlib.import_module("triton").knobs.runtime.interpret:
        return None
    return (
        f"it has no kernels for device {device.type}",
        "choose torch; TRITON_INTERPRET=1 runs them in the interpreter, for tests",
    )


def cpp_problem(device: torch.device, dtype: torch.dtype) -> Problem | None:
    """Why there are no operations in C++; a process that asks first may build them."""
    if device.type != "cpu":
        return f"it has no kernels for device {device.type}", "choose triton"
    if dtype not in build.DTYPES:
        return f"it has no kernels for {str(dtype)[6:]}", "choose torch"
    reason = build.load()
    if reason is not None:
        hint = "install g++, set CXX to another compiler or XDG_CACHE_HOME to another folder"
        return reason, f"{hint}, or choose torch"
    return None


def _half_on_cuda(package: str, install: str) -> Requirement:
    """The requirement of packages whose kernels run in half precision on CUDA devices only."""

    def problem(device: torch.device, dtype: torch.dtype) -> Problem | None:
        if not is_installed(package):
            return f"the package {package} is not installed", install
        if device.type != "cuda":
            return f"it has no kernels for device {device.type}", "choose another one"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it has no products in {str(dtype)[6:]}", "train.precision=bf16"
        return None

    return problem


def _named_alike(folder: str, problem: Requirement, *functions: str) -> Backend:
    """Functions that have the names of the plain ones."""
    return Backend({path.split(":")[1]: f"{folder}.{path}" for path in functions}, problem)


_from_triton = partial(_named_alike, "triton", _triton)
_from_cpp = partial(_named_alike, "cpp", cpp_problem)


def _flash(function: str, package: str, install: str, implementation: str | None = None) -> Backend:
    problem = _half_on_cuda(package, install)
    return Backend({"attention": f"flash:{function}"}, problem, implementation)


PLAIN_BACKEND = Backend({}, _always)
BACKENDS: Mapping[Operation, Mapping[str, Backend]] = {
    "permute": {
        "torch": PLAIN_BACKEND,
        "triton": _from_triton("permute:sort_by_expert", "permute:permute", "permute:unpermute"),
        "cpp": _from_cpp("permute:sort_by_expert", "permute:permute", "permute:unpermute"),
    },
    "grouped_gemm": {
        "torch": PLAIN_BACKEND,
        "triton": _from_triton("grouped_linear:grouped_linear", "grouped_swiglu:grouped_swiglu"),
        "cpp": _from_cpp("grouped_linear:grouped_linear", "swiglu:grouped_swiglu"),
        "megablocks": Backend(
            {
                "grouped_linear": "megablocks:grouped_linear",
                "grouped_swiglu": "megablocks:grouped_swiglu",
            },
            _half_on_cuda(
                "megablocks",
                "it asks for an older torch: pip install --no-deps --no-build-isolation "
                "megablocks grouped_gemm",
            ),
        ),
    },
    "swiglu": {"torch": PLAIN_BACKEND, "cpp": _from_cpp("swiglu:swiglu")},
    "zero_experts": {
        "torch": PLAIN_BACKEND,
        "triton": _from_triton("zero_experts:affine_experts"),
        "cpp": _from_cpp("zero_experts:affine_experts"),
    },
    "route": {"torch": PLAIN_BACKEND, "triton": _from_triton("route:route")},
    "depth_select": {
        "torch": PLAIN_BACKEND,
        "triton": _from_triton(
            "depth_select:top_k_positions", "depth_select:take_rows", "depth_select:add_gated_rows"
        ),
    },
    "rms_norm": {
        "torch": PLAIN_BACKEND,
        "triton": _from_triton("rms_norm:rms_norm"),
        "cpp": _from_cpp("rms_norm:rms_norm"),
    },
    "rope": {
        "torch": PLAIN_BACKEND,
        "triton": _from_triton("rope:apply_rope"),
        "cpp": _from_cpp("rope:apply_rope"),
    },
    "attention": {
        "sdpa": PLAIN_BACKEND,
        "blocks": Backend({"attention": "attention:blocks"}, _always),
        "cpp": Backend({"attention": "cpp.attention:documents"}, cpp_problem),
        "varlen": _flash("varlen", "torch.nn.attention.varlen", "pip install 'torch>=2.11'"),
        "fa3": _flash("varlen", "flash_attn_interface", "build flash-attention/hopper", "FA3"),
        "fa4": _flash("varlen", "flash_attn.cute", "pip install --pre flash-attn-4", "FA4"),
        "flash_attn": _flash(
            "flash_attn", "flash_attn", "pip install flash-attn --no-build-isolation"
        ),
    },
    "cross_entropy": {
        "torch": PLAIN_BACKEND,
        "triton": _from_triton("cross_entropy:row_losses"),
        "cpp": _from_cpp("cross_entropy:row_losses"),
    },
}

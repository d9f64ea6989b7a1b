"""The configuration of kernels, and what it amounts to on a device."""

import importlib
import os
import shutil
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from pydantic import PositiveInt

from moebius.config import ConfigNode
from moebius.errors import LayoutError
from moebius.kernels.registry import (
    BACKENDS,
    KernelError,
    Kernels,
    Operation,
    choose,
    cpp_problem,
    is_installed,
)
from moebius.model.config import ModelConfig
from moebius.model.moe.config import MoEConfig
from moebius.parallel.together import gathered, together
from moebius.parallel.world import agree, is_first_here
from moebius.trainer.cpu import uses_onednn

OnGPU = Literal["torch", "triton"]
"""of an operation that is written for GPUs, too"""
OnBoth = Literal["torch", "triton", "cpp"]
"""of one that is written for GPUs and for CPUs"""
RECOMPILE_LIMIT = 64
"""kinds of layers and passes that differ in what is compiled; torch gives up at 8"""
TIMED = (9, 0)
"""compute capability of the GPU of `benchmarks/results/gpu-nvidia-h200.json`"""
FEW_EXPERTS = 16
"""up to so many their groups are large, and rounding them up costs little"""


class KernelsConfig(ConfigNode):
    """How operations are computed. The numbers are the same up to rounding.

    A backend that is named and cannot run here is an error; `auto` takes what is known to be the
    fastest here of what can.
    """

    backend: Literal["auto", "torch", "triton", "cpp"] = "auto"
    """of every operation that is not named below, torch for those that it does not have. auto: on a
    CPU cpp if there is a C++ compiler, which is called once and takes seconds, else torch, and
    attention in blocks; in bf16 on Hopper GPUs and later ones triton where it is installed, and
    attention by sdpa, which is slower than varlen but takes heads of any size; else torch"""
    permute: OnBoth | None = None
    """tokens to rows sorted by expert, and back"""
    grouped_gemm: Literal["torch", "triton", "cpp", "megablocks"] | None = None
    """products of experts; cpp: those of torch, groups side by side on threads, and the activation
    in one pass"""
    swiglu: Literal["torch", "cpp"] | None = None
    """activation of dense feed-forwards"""
    zero_experts: OnBoth | None = None
    """zero, copy and constant experts"""
    route: OnGPU | None = None
    """scores, choice and statistics of a router"""
    depth_select: OnGPU | None = None
    """choosing tokens for a pass, and putting them back"""
    rms_norm: OnBoth | None = None
    """norms, with the factor of a visit"""
    rope: OnBoth | None = None
    """rotary positions"""
    attention: Literal["sdpa", "blocks", "cpp", "varlen", "fa3", "fa4", "flash_attn"] | None = None
    """sdpa: with a dense mask, for everything; blocks: pieces of rows, for CPUs; cpp: tiles of
    pairs, of which nothing is kept; varlen: torch's own FlashAttention over packed documents, or
    version 3 or 4 of it; flash_attn: that package"""
    cross_entropy: OnBoth | None = None
    """losses and gradients of a chunk of logits"""
    alignment: PositiveInt | None = None
    """rows of an expert are padded to a multiple of it; null: 1, and with oneDNN on a CPU, which
    prepares itself for each number of rows that it meets, 32, or 16 for many experts"""
    compile: bool = False
    """compile the computations of each kind of layer by torch.compile, which takes a minute at the
    first step; layers that talk to other processes cannot be compiled"""


def choose_kernels(
    config: KernelsConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Kernels, str]:
    """The functions for a device and a precision of products, and a line that names backends.

    A collective call: what one process cannot run, `auto` takes on none, for processes that hold
    copies of a tensor should come to the same bits. Raises LayoutError on all where a backend that
    is named cannot run on one.
    """
    wanted = {"cpp" if config.backend == "auto" else config.backend, *dict(config).values()}
    if device.type == "cpu" and not config.compile and "cpp" in wanted:
        _build_in_turn(device, dtype)
    return together(partial(_choose, config, model, device, dtype), LayoutError)


def _build_in_turn(device: torch.device, dtype: torch.dtype) -> None:
    """Let one process of each node call the compiler: the others find what it has built."""
    if is_first_here():
        cpp_problem(device, dtype)
    agree(0)


def _choose(
    config: KernelsConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Kernels, str]:
    if config.compile:
        prepare_compiler(device)
    default = _default(config, device, dtype)
    names = {operation: _name(config, operation, default) for operation in get_args(Operation)}
    alignment = config.alignment or _alignment(model, device, dtype)
    try:
        kernels = choose(names, device, dtype, alignment)
    except KernelError as error:
        named = error.operation if getattr(config, error.operation) else "backend"
        raise LayoutError(f"kernels.{named}: {error.name}, but {error}", error.hint) from None
    said = [f"{operation} {name}" for operation, name in names.items() if name != "torch"]
    others = [] if len(said) == len(names) else ["torch"]
    if default.missing:
        others.append(f"no cpp ({default.missing})")
    if alignment > 1:
        others.append(f"groups of {alignment} rows")
    return kernels, "kernels: " + ", ".join([*said, *others])


def prepare_compiler(device: torch.device) -> None:
    """Tell torch that numbers of rows vary.

    Raises LayoutError where there is nothing to compile with.
    """
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        raise LayoutError(
            "kernels.compile: true, but there is no C++ compiler", "install g++, or set CXX"
        )
    settings: Any = importlib.import_module("torch._dynamo.config")  # it takes a while
    settings.capture_dynamic_output_shape_ops = True
    settings.capture_scalar_outputs = True
    settings.recompile_limit = RECOMPILE_LIMIT


@dataclass(frozen=True)
class Default:
    """Backends of operations that a config does not name."""

    backend: str
    attention: str
    missing: str = ""
    """why it is no better one"""


def _default(config: KernelsConfig, device: torch.device, dtype: torch.dtype) -> Default:
    if config.backend == "cpp":
        return Default("cpp", "cpp")
    if config.backend != "auto" or config.compile:
        return Default("triton" if config.backend == "triton" else "torch", "sdpa")
    if device.type == "cpu":
        own, _ = cpp_problem(device, dtype) or ("", "")
        missing = next(filter(None, gathered(own)), "")
        return Default("torch", "blocks", missing) if missing else Default("cpp", "cpp")
    if dtype == torch.bfloat16 and is_installed("triton") and _is_timed(device):
        return Default("triton", "sdpa")
    return Default("torch", "sdpa")


def _is_timed(device: torch.device) -> bool:
    """Whether Triton's kernels have been timed on a GPU of this kind, or on an older one."""
    return torch.cuda.get_device_capability(device) >= TIMED


def _name(config: KernelsConfig, operation: Operation, default: Default) -> str:
    named: str | None = getattr(config, operation)
    if named is None and operation == "attention":
        return default.attention
    return named or (default.backend if default.backend in BACKENDS[operation] else "torch")


def _alignment(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    onednn = dtype != torch.float32 or uses_onednn()
    if device.type != "cpu" or not onednn or not isinstance(model.ffn, MoEConfig):
        return 1
    return 32 if model.ffn.pool.num_dispatched <= FEW_EXPERTS else 16

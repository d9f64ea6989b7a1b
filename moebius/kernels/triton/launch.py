"""Launching Triton kernels, and the launches of real sizes that can be compiled ahead of time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""names of Triton's types in the signature of a kernel"""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1): on CPU tensors, slowly.

    There `tl.dot` of bf16 multiplies bit patterns: kernels with products take `UPCAST`.
    """
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Variant:
    """A launch of real size: what a kernel is compiled for without a GPU."""

    kernel: Any
    types: Mapping[str, str]
    """argument -> `*bf16`, `i32`, ...; pointers and sizes named in `divisible` divide by 16"""
    constants: Mapping[str, Any]
    """the `tl.constexpr` arguments"""
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    has_products: bool = False
    """whether tensor cores must be at work"""

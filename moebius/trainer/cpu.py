"""What a CPU needs told before it computes: threads, which library multiplies, freed memory."""

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt

from moebius.config import ConfigNode
from moebius.errors import LayoutError

PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
PRIMITIVE_CAPACITY = 16384
"""of oneDNN's 1024 too few for the numbers of rows that experts get"""
WORST_FP32 = 5e-6
"""relative error of a product in fp32; in bf16 it is a thousand times as large"""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_FROM_HEAP = (2**30, 2**25)
"""sizes up to which tensors come from the heap; old versions of glibc refuse the first"""


class CPUConfig(ConfigNode):
    """How to run on a CPU. The numbers stay the same up to rounding."""

    threads: PositiveInt | None = None
    """of each process; null: what torch takes, which is OMP_NUM_THREADS where that is set"""
    fp32_products: Literal["auto", "mkl", "onednn"] = "auto"
    """which library multiplies in fp32. auto: oneDNN on AMD processors with AVX-512, which MKL does
    not use there, if a probe finds its products as exact as fp32 is; else torch's default, mkl"""
    keep_memory: bool = True
    """freed memory stays with the process instead of being returned and cleared page by page: new
    tensors are made without a page fault, and the process keeps its peak (glibc only)"""


def prepare_cpu(config: CPUConfig, precision: Literal["fp32", "bf16"]) -> Iterator[str]:
    """Apply the settings to this process, before it computes; lines that say what holds.

    Raises LayoutError where oneDNN is asked for and would multiply in bf16.
    """
    os.environ.setdefault(PRIMITIVES, str(PRIMITIVE_CAPACITY))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    library = _choose_library(config.fp32_products)
    said = [f"{torch.get_num_threads()} threads", f"fp32 products by {library}"]
    if config.keep_memory and _keep_memory():
        said.append("freed memory is kept")
    yield "cpu: " + ", ".join(said)
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield "cpu: this processor has no products in bf16; train.precision=fp32 is much faster"


def _choose_library(wanted: Literal["auto", "mkl", "onednn"]) -> str:
    """Tell torch which library to use in fp32, and name it.

    Torch has no such switch: allowing oneDNN less precision makes torch ask oneDNN, which uses it
    only where the CPU can multiply tiles in bf16 (AMX). There the probe fails.
    """
    if wanted == "mkl" or (wanted == "auto" and not _is_amd_with_avx512()):
        _allow("none")
        return "mkl"
    _allow("bf16")
    error = _error()
    if error <= WORST_FP32:
        return "onednn"
    _allow("none")
    if wanted == "onednn":
        raise LayoutError(
            f"cpu.fp32_products: onednn, whose products have an error of {error:.0e} here",
            "use auto or mkl",
        )
    return "mkl"


def uses_onednn() -> bool:
    """Whether oneDNN multiplies in fp32."""
    return bool(torch.backends.mkldnn.matmul.fp32_precision == "bf16")  # type: ignore[attr-defined]


def _allow(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]


def _error() -> float:
    """Largest error of a product in fp32, relative to the largest element."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = a.double() @ b.double()
    return float((a @ b - exact).abs().max() / exact.abs().max())


def _is_amd_with_avx512() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _keep_memory() -> bool:
    """Tell malloc; whether it listens."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    if not any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_FROM_HEAP):
        return False  # the others alone would let every large tensor be cleared anew
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)
    return True

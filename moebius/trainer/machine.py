"""The machine: which device to use, and what it can do (measured instead of looked up)."""

import os
import time

import torch

from moebius.errors import LayoutError
from moebius.trainer.config import Device

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


def select_device(name: Device) -> torch.device:
    """The device of that name, auto being cuda where there is one; of several the launcher's.

    Raises LayoutError where the asked one is not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise LayoutError("device: cuda, but torch sees no CUDA device", "use auto or cpu")
    if not available or name == "cpu":
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if local >= count:
        raise LayoutError(
            f"process {local} of this node, counted from 0, but it has {count} CUDA devices",
            f"start {count} with --nproc-per-node",
        )
    return torch.device("cuda", local)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The best rate of a large square matrix product on this machine in this precision.

    Repeats the product for about `seconds` and takes the fastest. The operand is drawn from a
    generator of its own, so that measuring does not disturb anything.
    """
    size = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        began = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best

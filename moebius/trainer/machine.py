"""What the machine can do: the denominator of MFU, measured instead of looked up."""

import time

import torch


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

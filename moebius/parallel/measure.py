"""What devices and the links between them reach: measured, by all processes at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, time

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.parallel.comm import Group

REPETITION = 0.05
"""seconds that a repetition takes at least: several time slices of a scheduler, so that a core that
is shared looks as slow as it is"""
COLLECTIVES = 5
"""repetitions of a collective, after one that does not count"""
PINGS = 20
Shape = tuple[int, int, int]
"""rows, columns and inner size of a product"""


@dataclass(frozen=True)
class Rates:
    """Of something that was repeated, per second."""

    best: float
    """of the fastest repetition"""
    sustained: float
    """of all together"""


def product_rates(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape], seconds: float
) -> Rates:
    """FLOPs of matrix products, each shape once and then again, for about so many seconds.

    The operands come from a generator of its own: measuring disturbs nothing.
    """
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    pairs = [(drawn(rows, inner), drawn(inner, columns)) for rows, columns, inner in shapes]
    flops = sum(2 * rows * columns * inner for rows, columns, inner in shapes)

    def multiply() -> None:
        for a, b in pairs:
            torch.mm(a, b)

    return _repeated(multiply, flops, device, seconds)


def copy_rates(device: torch.device, num_bytes: int, seconds: float) -> Rates:
    """Bytes read and written per second where memory of the device is copied."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return _repeated(lambda: target.copy_(source), moved, device, seconds)


def _repeated(
    action: Callable[[], object], amount: float, device: torch.device, seconds: float
) -> Rates:
    action()  # the first time chooses kernels and takes memory
    synchronize(device)
    best, done = 0.0, 0
    began = perf_counter()
    while (total := perf_counter() - began) < seconds or not done:
        count, start = 0, perf_counter()
        while (taken := perf_counter() - start) < REPETITION or not count:
            action()
            synchronize(device)
            count += 1
        best = max(best, count * amount / taken)
        done += count
    return Rates(best, done * amount / total)


def synchronize(device: torch.device) -> None:
    """Wait for what a device has been told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_reduce_rate(group: Group, device: torch.device, num_bytes: int) -> float:
    """Bytes per second that this process sends in the fastest of some all-reduces; collective."""
    x = torch.ones(num_bytes // 4, device=device)
    sent = 2 * (group.size - 1) / group.size * x.numel() * x.element_size()
    return sent / _fastest(lambda: group.all_reduce(x), COLLECTIVES, device)


def all_to_all_rate(group: Group, device: torch.device, num_bytes: int) -> float:
    """Bytes per second that this process sends in the fastest of some all-to-alls; collective."""
    rows = max(1, num_bytes // 4 // group.size)
    x = torch.ones(rows * group.size, device=device)
    splits = [rows] * group.size

    def exchange() -> None:
        _, work = group.all_to_all(x, splits, splits)
        if work is not None:
            work.wait()

    sent = (group.size - 1) * rows * x.element_size()
    return sent / _fastest(exchange, COLLECTIVES, device)


def all_reduce_latency(group: Group, device: torch.device) -> float:
    """Seconds of the fastest of some all-reduces of one number; collective."""
    x = torch.ones(1, device=device)
    return _fastest(lambda: group.all_reduce(x), PINGS, device)


def exchange_rate(to: int, source: int, device: torch.device, num_bytes: int) -> float:
    """Bytes per second in the fastest of some messages to a process while one comes from another;
    all processes of a ring call it."""
    sent = torch.ones(num_bytes // 4, device=device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        messages = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()

    return sent.numel() * sent.element_size() / _fastest(exchange, COLLECTIVES, device)


def message_latency(partner: int, device: torch.device, first: bool) -> float:
    """Seconds that a small message takes to another process: half of the fastest round trip.

    Both processes call it, one of them as the first.
    """
    x = torch.ones(1, device=device)

    def there_and_back() -> None:
        for sends in (first, not first):
            if sends:
                dist.send(x, partner)
            else:
                dist.recv(x, partner)

    return _fastest(there_and_back, PINGS, device) / 2


def clock_offset(partner: int, asks: bool) -> float:
    """Seconds by which the partner's clock is ahead of the clock of the process that asks, which
    knows it to half of the fastest round trip; the partner gets 0. Both call it."""
    found: list[tuple[float, float]] = []
    # Seconds since 1970 need fp64.
    said = torch.zeros(1, dtype=torch.float64)
    for _ in range(PINGS):
        if asks:
            sent = time()
            dist.send(said, partner)
            dist.recv(said, partner)
            received = time()
            found.append((received - sent, float(said) - (sent + received) / 2))
        else:
            dist.recv(said, partner)
            said.fill_(time())
            dist.send(said, partner)
    return min(found)[1] if found else 0.0


def _fastest(action: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """Seconds. All processes repeat as often: the others wait for each repetition."""
    taken = []
    for _ in range(repetitions + 1):
        start = perf_counter()
        action()
        synchronize(device)
        taken.append(perf_counter() - start)
    return min(taken[1:])

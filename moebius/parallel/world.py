"""The processes a launcher started, and how they join."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moebius.errors import LayoutError

T = TypeVar("T")
PREPARATION = timedelta(days=2)
"""how long others wait for what one process prepares"""


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the first process of its node."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0) == 0


def check_alone(command: str) -> None:
    """Raise LayoutError where a launcher has started several processes for a command of one."""
    if world_size() > 1:
        raise LayoutError(
            f"world size {world_size()}: moebius {command} runs in one process",
            "start it without torchrun, or with --nproc-per-node 1 on one node",
        )


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Store | None]:
    """Connect the processes, if there are several; `timeout` in seconds is that of collectives.

    Gives the store through which they have found each other.

    Every attempt of a launcher gets a store, or a part of one, of its own: addresses of processes
    that have died would otherwise be tried again.
    """
    if world_size() == 1 and _missing():
        yield None
        return
    check_launch()
    shared, number, size = next(rendezvous("env://"))
    store = PrefixStore(attempt_name(), shared)
    check_alike("device", {"train.device": device.type}, store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=number,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield store
    finally:
        dist.destroy_process_group()


def end_threads() -> None:
    """End the threads of groups that only cycles of objects still hold, after `joined`.

    They may let go of a tensor at any time, and a thread that does so while the interpreter ends
    takes the process down with it (SIGABRT).
    """
    if world_size() > 1:
        gc.collect()


def _missing() -> list[str]:
    return [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]


def check_launch() -> None:
    """Raise LayoutError where processes were started that cannot find each other."""
    if missing := _missing():
        raise LayoutError(
            f"WORLD_SIZE is {world_size()}, but {', '.join(missing)} is not set",
            "start the processes with torchrun",
        )


def attempt_name() -> str:
    """A name that all processes of an attempt agree on, and that no other attempt has in a store.

    The agents of torchrun count restarts each for itself, and only of those they began. Where each
    attempt has a new store (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1) the count is not needed.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False":
        return "attempt"
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def main_first(action: Callable[[], T], store: Store | None) -> T:
    """Do something on one process of the world before all others do it: what it leaves on disk the
    others find."""
    if store is not None and not is_main():
        store.wait(["prepared"], PREPARATION)
    result = action()
    if store is not None and is_main():
        store.set("prepared", "1")
    return result


def from_main(key: str, value: Callable[[], Any], store: Store | None) -> Any:
    """What the main process finds, a JSON value, on all processes. Each key is used once."""
    if store is None:
        return value()
    if is_main():
        store.set(key, json.dumps(value()))
    else:
        store.wait([key], PREPARATION)
    return json.loads(store.get(key))


def check_alike(kind: str, facts: Mapping[str, Any], store: Store | None) -> None:
    """Raise LayoutError, naming the fact, on a process where one differs from the main process's.

    Nodes may have other files than the first; what comes after would wait for ever or go wrong.
    Facts of each kind are compared once.
    """
    if store is None:
        return
    if is_main():
        store.set(kind, json.dumps(facts))
        return
    expected = json.loads(store.get(kind))
    for name in sorted(facts.keys() | expected.keys()):
        if facts.get(name) != expected.get(name):
            raise LayoutError(
                f"{name}: {facts.get(name)}, but {expected.get(name)} on the main process",
                "give all nodes the same run file, corpus and kind of device",
            )


def agree(value: int) -> int:
    """The largest of everyone's numbers."""
    if world_size() == 1:
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)

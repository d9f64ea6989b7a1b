"""Actions that succeed on all processes or fail on all of them, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist

from moebius.errors import MoebiusError
from moebius.parallel.world import agree, world_size

T = TypeVar("T")
WAIT_SECONDS = 0.05


def gathered(value: Any) -> list[Any]:
    """Everyone's value, by rank; a collective call."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The value of the first process on all; a collective call."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def together(action: Callable[[], T], failure: type[MoebiusError]) -> T:
    """What an action gives on this process; a collective call.

    Where it raises `failure` on some process, all raise it, with the message of the first of them:
    otherwise they would wait for one that is gone.
    """
    result: list[T] = []
    message = ""
    try:
        result.append(action())
    except failure as error:
        message = str(error)
    if agree(int(bool(message))):
        raise failure(next(text for text in gathered(message) if text))
    return result[0]


def patiently(action: Callable[[], T], failure: type[MoebiusError], alive: Callable[[], None]) -> T:
    """As `together`, for an action that may take some processes longer than a collective waits.

    It runs in a thread, and must not communicate. `alive` is called while others are waited for.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    def give() -> T:
        if errors:
            raise errors[0]
        return results[0]

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    while agree(int(thread.is_alive())):
        if not thread.is_alive():
            alive()
        thread.join(WAIT_SECONDS)
    return together(give, failure)

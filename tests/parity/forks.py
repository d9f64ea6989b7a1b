"""Real processes for layout tests: forked from this one, which has imported torch already.

A forked process costs milliseconds where a started one imports torch for seconds. Works as long as
the parent has not touched CUDA.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def run_forked(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """`function(*args)` in so many gloo processes; what each returned, by rank.

    Results are pickled: numbers, strings, and tensors as numpy arrays. A process that raises or
    hangs fails the call with the first traceback, and all are killed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            target = (rank, world_size, f"{folder}/store", sender, function, args)
            process = context.Process(target=_enter, args=target, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            missing = sorted(set(range(len(pipes))) - results.keys())
            raise TimeoutError(f"ranks {missing} did not finish")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _enter(
    rank: int,
    world_size: int,
    store: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        sender.send((True, function(*args)))
        dist.destroy_process_group()
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)

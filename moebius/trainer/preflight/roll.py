"""Who is there and how far: nobody waits for ever for a process that does not answer.

A process may be blocked where no exception reaches it, in a driver or in a file system. So a thread
of each process watches the time, and ends the process; the main one's says who is to blame.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from moebius.errors import LaunchError, MoebiusError
from moebius.parallel.world import attempt_name, check_launch, rank, world_size

POLL = 0.25
"""seconds between looks of the thread"""
GRACE = 2.0
"""seconds in which the others may say what they failed of"""
MARGIN = 5.0
"""seconds for collectives, which give up after `wait`, to say so: that tells more"""
LATE = 10.0
"""seconds after which others end that the main process should have ended"""
LONG = timedelta(days=1)
"""a wait that a thread ends"""
Blame = Callable[[list[str], str], None]
"""told, on the main process, of nodes whose processes do not answer and of the line that says so"""


def node_name() -> str:
    """Of this node, as SLURM calls it where it started the process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def local_rank() -> int:
    """The number of this process on its node."""
    return int(os.environ.get("LOCAL_RANK") or rank())


class Roll:
    """The processes of a launch, by what they tell a store. Made by `roll_call`."""

    def __init__(self, store: Store, watching: Store, wait: float, blame: Blame) -> None:
        self.store = store
        self.wait = wait
        self.blame = blame
        self._watching = watching
        self._stages = ["start"]
        self._deadline = monotonic() + wait
        self._over = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def begin(self) -> None:
        """Tell the others that this process is there, and wait for all."""
        self.store.set(f"here/{rank()}", node_name())
        self._thread.start()
        self.store.wait([f"here/{r}" for r in range(world_size())], LONG)

    def reach(self, stage: str) -> None:
        """This process begins a stage; all do, in the same order."""
        self.store.set(f"at/{rank()}", str(len(self._stages)))
        self._stages.append(stage)
        self._deadline = monotonic() + self.wait + MARGIN

    def everyones(self, name: str, value: str) -> list[str]:
        """What each process says, by rank, before there are collectives; each name is used once."""
        self.store.set(f"{name}/{rank()}", value)
        keys = [f"{name}/{r}" for r in range(world_size())]
        self.store.wait(keys, LONG)
        return [self.store.get(key).decode() for key in keys]

    @contextmanager
    def stage(self, name: str, alone: bool = False) -> Iterator[None]:
        """Something that may fail on this process; `alone`: without waiting for another.

        Raises LaunchError for a failure, where there is one process; where there are several, the
        main one says who failed, and all end.
        """
        self.reach(name)
        try:
            yield
        except (MoebiusError, OSError, RuntimeError) as error:
            self.fail(error, alone)

    def fail(self, error: Exception, alone: bool) -> NoReturn:
        """Give up, see `stage`."""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if world_size() == 1:
            if isinstance(error, MoebiusError):
                raise error
            raise LaunchError(f"{node_name()}: {self._stages[-1]}: {reason}") from None
        code = error.exit_code if isinstance(error, MoebiusError) else LaunchError.exit_code
        said = {"stage": self._stages[-1], "reason": reason, "alone": alone, "code": code}
        self.store.set(f"failed/{rank()}", json.dumps(said))
        self.store.set("failure", "1")
        while True:  # until the thread ends the process
            sleep(1)

    def conclude(self, code: int) -> None:
        """The main process tells the others how it ended."""
        self.store.set("outcome", str(code))

    def outcome(self) -> int:
        """What the main process has concluded, for the others."""
        self.reach("report")
        self.store.wait(["outcome"], LONG)
        return int(self.store.get("outcome"))

    def close(self) -> None:
        """All has been said; the main process, who may hold the store, waits for the others."""
        self._over.set()
        self._thread.join()
        if rank() != 0:
            self.store.set(f"bye/{rank()}", "1")
            return
        with suppress(RuntimeError):
            byes = [f"bye/{r}" for r in range(1, world_size())]
            if byes:
                self.store.wait(byes, timedelta(seconds=LATE))

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            try:
                self._look()
            except RuntimeError:  # with the main process the store is gone
                if not self._over.is_set():
                    sleep(GRACE)  # it may be that nothing is left to do
                if not self._over.is_set():
                    self._end(None if local_rank() else f"{self._who(0)}: it has gone")

    def _look(self) -> None:
        late = monotonic() - self._deadline
        if rank() == 0 and self._watching.check(["failure"]):
            self._accuse(*self._failure())
        elif rank() == 0 and late > 0:
            self._accuse(*self._lagging())
        elif rank() != 0 and self._watching.check(["verdict"]):
            self._end(None, int(self._watching.get("verdict")))
        elif rank() != 0 and late > LATE:
            said = self._watching.add("last word", 1) > 1
            self._end(None if said else self._lagging()[1])

    def _accuse(self, ranks: list[int], line: str, code: int = LaunchError.exit_code) -> NoReturn:
        # What most fail of is not a matter of nodes.
        named = ranks if 2 * len(ranks) <= world_size() else []
        nodes = {self._node(r) for r in named}
        if "" in nodes:  # nothing has come from there
            nodes = nodes - {""} | set(self._absent())
        self.blame(sorted(nodes), line)
        self._end(line, code)

    def _end(self, line: str | None, code: int = LaunchError.exit_code) -> NoReturn:
        """A process that is blocked cannot be ended in another way."""
        if line is not None:
            print(f"error: {line}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            if rank() == 0:
                self._watching.set("verdict", str(code))
                sleep(3 * POLL)
        os._exit(code)

    def _failure(self) -> tuple[list[int], str, int]:
        """Who is to blame for a failure, the line, and the exit code."""
        until = monotonic() + GRACE
        while len(failed := self._failed()) < world_size() and monotonic() < until:
            sleep(POLL)
        own = {r: found for r, found in failed.items() if found["alone"]}
        if own:
            first = min(own)
            reason = str(own[first]["reason"])
            if len(own) == world_size():  # a mistake of the user, which all have found
                return [*own], reason, int(own[first]["code"])
            line = f"{self._who(first)} {_and([*own])}in '{own[first]['stage']}': {reason}"
            return [*own], line, LaunchError.exit_code
        silent = [r for r in range(world_size()) if r not in failed]
        # Of those who are only slower to give up than others, nothing is known.
        stage = max(self._at(r) for r in failed)
        silent = [r for r in silent if self._at(r) < stage] or silent
        found = failed[min(failed)]
        if silent:
            line = f"{self._who(silent[0])} {_and(silent)}does not answer in '{found['stage']}'"
            line += f"; expected: all {world_size()} processes - exclude the node"
            return silent, line, LaunchError.exit_code
        line = f"'{found['stage']}' failed between the processes: {found['reason']}"
        return [], line, LaunchError.exit_code

    def _failed(self) -> dict[int, dict[str, Any]]:
        """What the processes said that have given up."""
        return {
            r: json.loads(self._watching.get(f"failed/{r}"))
            for r in range(world_size())
            if self._watching.check([f"failed/{r}"])
        }

    def _lagging(self) -> tuple[list[int], str]:
        """Those who are behind the others, and the line."""
        at = [self._at(r) for r in range(world_size())]
        furthest = max(at)
        behind = [r for r in range(world_size()) if at[r] < furthest]
        # All wait at the start for those who are not even there.
        absent = [r for r in range(world_size()) if at[r] < 0]
        named = absent or behind
        if not named:
            stage = self._stages[furthest]
            line = f"all {world_size()} processes are in '{stage}' since {self.wait:.0f} s"
            return [], f"{line} - look for what holds it up, or give it more time with --wait"
        stage = self._stages[min(at[named[0]] + 1, len(self._stages) - 1)]
        line = f"{self._who(named[0])} {_and(named)}has not come to '{stage}' in {self.wait:.0f} s"
        absent_nodes = self._absent()
        if absent_nodes:
            line += f" (no process on {', '.join(absent_nodes)})"
        hint = "exclude the node, or give it more time with --wait"
        return named, f"{line}; expected: all {world_size()} processes - {hint}"

    def _at(self, number: int) -> int:
        """The stage of a process; -1: it has not been seen."""
        if self._watching.check([f"at/{number}"]):
            return int(self._watching.get(f"at/{number}"))
        return 0 if self._watching.check([f"here/{number}"]) else -1

    def _here(self) -> dict[int, str]:
        """Nodes of the processes that have been seen."""
        return {
            r: self._watching.get(f"here/{r}").decode()
            for r in range(world_size())
            if self._watching.check([f"here/{r}"])
        }

    def _node(self, number: int) -> str:
        """Where a process is: it says so, or one that began on the same node; else ''."""
        here = self._here()
        if number in here:
            return here[number]
        size = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        return next((name for r, name in here.items() if r // size == number // size), "")

    def _who(self, number: int) -> str:
        name = ""
        with suppress(RuntimeError):
            name = self._node(number)
        return f"rank {number}" + (f" on node {name}" if name else "")

    def _absent(self) -> list[str]:
        """Nodes of a SLURM step from which nobody has come."""
        seen = {*self._here().values()}
        return [name for name in step_nodes() if name not in seen]


def _and(ranks: list[int]) -> str:
    return f"(and {len(ranks) - 1} more) " if len(ranks) > 1 else ""


def step_nodes() -> list[str]:
    """Names of the nodes of the SLURM step around this process; none outside of one."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes:
        return []
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def _stores(wait: float) -> Iterable[Store]:
    """Two connections, for the process and for its thread. Raises LaunchError."""
    if world_size() == 1:
        alone = HashStore()
        return alone, alone
    check_launch()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun has a store already; without it the main process makes one.
    makes = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def connect(is_master: bool) -> Store:
        store = TCPStore(
            host,
            port,
            world_size(),
            is_master,
            timedelta(seconds=wait),
            wait_for_workers=False,
        )
        return PrefixStore(f"preflight_{attempt_name()}", store)

    try:
        return connect(makes), connect(False)
    except RuntimeError:
        raise LaunchError(
            f"rank {rank()} on node {node_name()}: nobody answers at {host}:{port} in {wait:.0f} s",
            "is rank 0 there, and may this node connect to it?",
        ) from None


@contextmanager
def roll_call(wait: float, blame: Blame) -> Iterator[Roll]:
    """All processes of the launch, once they are there; none of their stages takes longer than
    `wait` seconds."""
    store, watching = _stores(wait)
    roll = Roll(store, watching, wait, blame)
    roll.begin()
    try:
        yield roll
    finally:
        roll.close()


@contextmanager
def process_group(roll: Roll, device: torch.device) -> Iterator[None]:
    """Collectives between the processes, if there are several."""
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("group", roll.store),
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(seconds=roll.wait),
    )
    yield
    dist.destroy_process_group()

"""A process beside those of a node that ends them all when one of them hangs.

Whatever holds a worker up - a collective that waits for ever, a dead file system, SIGSTOP - does
not hold up this process: it shares nothing with them but the board. It says who is late, writes
down the Python stacks of all workers and kills them, so that their launcher sees a failure at once
and starts the next attempt. Standard library only: it starts in the time of a bare interpreter.
"""

import argparse
import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from moebius.trainer.watch.board import Board, BoardReader, Record, process_state

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
DUMP_SECONDS = 3.0
"""how long workers may take to write their stacks"""
REPORT_SECONDS = 4.0
"""how long the report may take before workers are killed without it"""
STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device",
    "T": "stopped",
    "t": "stopped",
    "": "gone",
}


class Worker(NamedTuple):
    """One watched process at one moment."""

    record: Record
    state: str
    """a value of `STATES`"""
    waited: float
    """seconds since its last mark"""

    @property
    def alive(self) -> bool:
        """Whether the process can still be killed."""
        return self.state != "gone"

    @property
    def active(self) -> bool:
        """Whether it is alive and at work."""
        return self.alive and not self.record.done

    @property
    def overdue(self) -> bool:
        """Whether it is longer without a mark than its section allows."""
        return self.active and 0 < self.record.allowed < self.waited

    def __str__(self) -> str:
        return f"rank {self.record.rank} (pid {self.record.pid}, {self.state})"

    @property
    def place(self) -> str:
        """Where it is and for how long."""
        step = "" if self.record.step < 0 else f" of step {self.record.step}"
        return f"in '{self.record.section}'{step} for {seconds(self.waited)}"

    @property
    def limit(self) -> str:
        """How long it may be there."""
        return f"allowed are {seconds(self.record.allowed)}"


class Watchdog:
    """The workers of a board, seen at every poll."""

    def __init__(self, board: Path, folder: Path, poll: float) -> None:
        self.board = board
        self.reader = BoardReader(board)
        self.folder = folder
        self.poll = poll
        self.workers: list[Worker] = []
        self.missing: list[int] = []
        """local ranks whose process has not been seen alive yet"""
        self._looked = time.monotonic()

    def look(self) -> None:
        """Read the board and the states of the processes.

        Time in which this process did not run is not held against the others: then the node slept,
        or somebody stopped them all.
        """
        now = time.monotonic()
        passed = min(now - self._looked, self.poll + 1)
        self._looked = now
        before = {(w.record.pid, w.record.started): w for w in self.workers}
        self.workers, self.missing = [], []
        for place, record in enumerate(self.reader.records()):
            old = before.get((record.pid, record.started)) if record else None
            state = state_of(record.pid, record.started) if record else "gone"
            if record is None or (old is None and state == "gone"):
                self.missing.append(place)  # the record, if any, is of an earlier attempt
                continue
            waited = min(now - record.time, passed)
            if old is not None and old.record.total == record.total:
                waited = old.waited + passed
            self.workers.append(Worker(record, state, waited))

    def verdict(self) -> tuple[list[Worker], str] | None:
        """Who holds the others up and a sentence that says so; None while everything is in time."""
        overdue = [worker for worker in self.workers if worker.overdue]
        if not overdue:
            return None
        first = max(overdue, key=lambda worker: worker.waited - worker.record.allowed)
        halted = halted_ones(self.workers)
        if self.missing and not halted:
            ranks = ", ".join(map(str, self.missing))
            text = f"local rank {ranks} was never seen alive; {first} has been {first.place}"
            return [first], f"{text}, {first.limit}"
        late = halted or hindmost(self.workers)
        names = ", ".join(map(str, late))
        text = f"{names} {'has' if len(late) == 1 else 'have'} been {late[0].place}"
        if not late[0].overdue:
            text += f"; {first} has been {first.place}"
        text += f", {late[0].limit if late[0].overdue else first.limit}"
        if not halted and len(late) == sum(worker.active for worker in self.workers) > 1:
            text += ", no rank of this node is behind the others"
        return late, text

    def end(self, late: list[Worker], text: str) -> None:
        """Write the report, say what happened and kill all workers, the late ones first."""
        node = os.uname().nodename
        path = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{node}.txt"
        # The folder may be what hangs: nothing that is written there may hold up the end.
        written = threading.Event()
        writing = threading.Thread(target=self._report, args=(path, text, written), daemon=True)
        writing.start()
        writing.join(REPORT_SECONDS)
        where = path if written.is_set() else f"could not be written to {self.folder}"
        say(f"watchdog: {text}; stacks of all ranks of this node: {where}; ending this attempt")
        self.kill(late)

    def kill(self, first: list[Worker]) -> None:
        """Kill all workers that are alive, some before the others."""
        for worker in [*first, *(w for w in self.workers if w not in first)]:
            send(worker.record, signal.SIGKILL)

    def _report(self, path: Path, text: str, written: threading.Event) -> None:
        workers = [worker for worker in self.workers if worker.alive]
        able = [worker.record for worker in workers if handles_dump(worker.record)]
        with suppress(OSError):
            files = {r.rank: stack_file(self.board, r.rank) for r in able}
            old = {rank: size_of(file) for rank, file in files.items()}
            for record in able:
                send(record, signal.SIGUSR2)
            for worker in workers:
                if worker.state == "stopped":
                    send(worker.record, signal.SIGCONT)
            wait_for_stacks(files, old)
            parts = [text]
            for worker in self.workers:
                file = files.get(worker.record.rank)
                stacks = stacks_after(file, old[worker.record.rank]) if file else "no stacks"
                parts.append(f"=== {worker} {worker.place} since its last mark\n{stacks}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(parts) + "\n")
            written.set()
            for file in files.values():
                file.unlink(missing_ok=True)


def halted_ones(workers: list[Worker]) -> list[Worker]:
    """Those that are stopped or have ended before their work was done."""
    return [w for w in workers if not w.record.done and w.state in ("stopped", "gone")]


def hindmost(workers: list[Worker]) -> list[Worker]:
    """Those that are least far: in the earliest step and there with the fewest marks.

    Marks of earlier steps do not count: a rank that reports or saves makes more of them.
    """
    active = [worker for worker in workers if worker.active]
    least = min((w.record.step, w.record.marks) for w in active)
    return [w for w in active if (w.record.step, w.record.marks) == least]


def watch(path: Path, folder: Path, poll: float, launcher: int | None) -> None:
    """Watch the processes of a board until all of them have ended, or end them."""
    launcher_started = process_state(launcher)[1] if launcher else 0
    watchdog = Watchdog(path, folder, poll)
    while True:
        watchdog.look()
        if not watchdog.missing:
            # All have it open; without a name, nothing is left of it however they end.
            path.unlink(missing_ok=True)
        if not any(worker.active for worker in watchdog.workers):
            break
        verdict = watchdog.verdict()
        if verdict is not None:
            watchdog.end(*verdict)
            break
        if launcher and state_of(launcher, launcher_started) == "gone":
            say(f"watchdog: the launcher (pid {launcher}) is gone; ending its workers")
            watchdog.kill([])
            break
        time.sleep(poll)
    path.unlink(missing_ok=True)


def start(
    board: Board, folder: Path, *, orphans: bool = False, poll: float = 0.25
) -> "subprocess.Popen[bytes]":
    """Start the watchdog of this node, which ends by itself; for one worker of the node.

    `folder` takes its reports and is made for the first one. With `orphans`, workers are ended too
    when the process that started this one is gone: only for launchers that live as long as their
    workers.
    """
    command = [sys.executable, "-m", __name__, str(board.path), str(folder), "--poll", str(poll)]
    if orphans and board.parent:  # 0: in another PID namespace, where it cannot be seen
        command += ["--launcher", str(board.parent)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def dump_on_signal(board: Board) -> ExitStack:
    """Let SIGUSR2 write the stacks of all threads of this process, whatever it is doing, into a
    file beside the board until what is returned is closed."""
    path = stack_file(board.path, board.rank)
    path.unlink(missing_ok=True)  # a process of an earlier attempt may still hold it
    with ExitStack() as stack:
        file = stack.enter_context(path.open("w"))
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
        stack.callback(faulthandler.unregister, signal.SIGUSR2)
        stack.callback(path.unlink, missing_ok=True)
        return stack.pop_all()


def state_of(pid: int, started: int) -> str:
    """What a process does, in a word; "gone" where its pid belongs to nobody or to a later one."""
    letter, found = process_state(pid)
    return STATES.get(letter, "gone") if found == started else "gone"


def send(record: Record, number: signal.Signals) -> None:
    """Send a signal to the process of a record, never to a later one with its pid."""
    if state_of(record.pid, record.started) != "gone":
        with suppress(ProcessLookupError):
            os.kill(record.pid, number)


def handles_dump(record: Record) -> bool:
    """Whether a process has a handler for SIGUSR2, which would end it otherwise."""
    try:
        status = Path(f"/proc/{record.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1)


def wait_for_stacks(files: dict[int, Path], old: dict[int, int]) -> None:
    """Wait until all files have grown and grow no more, but not for long."""
    end = time.monotonic() + DUMP_SECONDS
    before = old
    while time.monotonic() < end:
        time.sleep(0.1)
        sizes = {rank: size_of(file) for rank, file in files.items()}
        if sizes == before and all(sizes[rank] > old[rank] for rank in sizes):
            return
        before = sizes


def stack_file(board: Path, rank: int) -> Path:
    """Where a worker writes its stacks."""
    return board.with_name(f"{board.name}.{rank}.stacks")


def size_of(file: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def stacks_after(file: Path, begin: int) -> str:
    """What was written to a file from a byte on."""
    try:
        text = file.read_bytes()[begin:].decode(errors="replace")
    except FileNotFoundError:
        text = ""
    return text.rstrip() or f"no stacks within {seconds(DUMP_SECONDS)}"


def seconds(value: float) -> str:
    """A time as text."""
    return f"{round(value, 1):g} s"


def say(line: str) -> None:
    """Write a line to stderr unless that would block or nobody is there to read it."""
    with suppress(OSError):
        if select.select([], [2], [], 1)[1]:
            os.write(2, f"{line}\n".encode()[: select.PIPE_BUF])


def main() -> None:
    """The command line of the process that `start` starts."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("board", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--poll", type=float, default=0.25)
    parser.add_argument("--launcher", type=int)
    options = parser.parse_args()
    watch(options.board, options.folder, options.poll, options.launcher)
    os._exit(0)  # a report may still be stuck in a thread


if __name__ == "__main__":
    main()

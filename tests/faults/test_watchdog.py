"""The watchdog with real processes: who is late is named, all stacks are kept, nobody stays."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from moebius.trainer.watch import watchdog as module
from moebius.trainer.watch.board import (
    RECORD_SIZE,
    Board,
    BoardReader,
    Record,
    board_path,
    process_state,
)
from moebius.trainer.watch.progress import Progress, WatchdogConfig
from moebius.trainer.watch.watchdog import Watchdog, dump_on_signal, send, start, state_of

Course = Callable[[Progress], None]
FORK = multiprocessing.get_context("fork")
LIMITS = WatchdogConfig(start=60, load=60, data=60, step=0.8, evaluate=60, save=60)
POLL = 0.1


@dataclass
class Node:
    """A few processes with a watchdog, which the first of them starts."""

    folder: Path
    attempt: str = "0"
    size: int = 3
    orphans: bool = False
    dumps: bool = True
    processes: list[BaseProcess] = field(default_factory=list)

    @property
    def board(self) -> Path:
        return board_path(f"{self.folder}-{self.attempt}", os.getpid())

    @property
    def reports(self) -> list[Path]:
        return sorted((self.folder / "reports").glob("*.txt"))

    def run(self, *courses: Course) -> None:
        self.size = max(self.size, len(courses))
        path = self.board
        for local_rank, course in enumerate(courses):
            process = FORK.Process(target=self._work, args=(path, local_rank, course))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes once all have ended, or after a time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def watchdog(self) -> tuple[int, int]:
        """Its pid and start time."""
        path = self.folder / "watchdog"
        until(path.exists)
        pid, started = path.read_text().split()
        return int(pid), int(started)

    def _work(self, path: Path, local_rank: int, course: Course) -> None:
        rank, reports = 10 + local_rank, self.folder / "reports"
        board = Board(path, rank, local_rank, self.size)
        stacks = dump_on_signal(board) if self.dumps else None
        progress = Progress(LIMITS, board)
        if local_rank == 0:
            watchdog = start(board, reports, orphans=self.orphans, poll=POLL)
            temporary = self.folder / "watchdog.tmp"
            temporary.write_text(f"{watchdog.pid} {process_state(watchdog.pid)[1]}")
            temporary.rename(self.folder / "watchdog")
        course(progress)
        if stacks:
            stacks.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.join()
    made.board.unlink(missing_ok=True)


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def wait_in_c() -> None:
    """As in a collective: no Python code runs."""
    os.read(os.pipe()[0], 1)


def in_a_collective(progress: Progress) -> None:
    with progress.section("step"):
        progress.mark(step=17)
        wait_in_c()


def stops_itself(progress: Progress) -> None:
    with progress.section("step"):
        progress.mark(step=17)
        os.kill(os.getpid(), signal.SIGSTOP)
        wait_in_c()


def waits_for_data(progress: Progress) -> None:
    """It has made more marks than any other, but not in this step."""
    for _ in range(20):
        progress.mark(step=16)
    with progress.section("data"):
        progress.mark(step=17)
        wait_in_c()


def goes_on_to_the_step(progress: Progress) -> None:
    with progress.section("data"):
        progress.mark(step=17)
    in_a_collective(progress)


def ends_early(progress: Progress) -> None:
    progress.mark(step=17)
    time.sleep(0.4)


def works(progress: Progress) -> None:
    """Twice as long as a step may take."""
    with progress.section("step"):
        for step in range(16):
            progress.mark(step=step)
            time.sleep(0.1)


def has_no_limit(progress: Progress) -> None:
    assert progress.board is not None
    progress.board.write("step", 0, 0, 0.0)
    time.sleep(1.6)


def takes_its_time_at_the_end(progress: Progress) -> None:
    with progress.section("step"):
        progress.done()
        time.sleep(1.6)


def sleeps(progress: Progress) -> None:
    time.sleep(60)


KILLED = -signal.SIGKILL


def test_a_stopped_process_is_named_and_all_stacks_are_kept(
    node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    node.run(in_a_collective, stops_itself, in_a_collective)
    assert node.wait(LIMITS.step + 5) == [KILLED] * 3
    assert time.monotonic() - begun < LIMITS.step + 5
    line = capfd.readouterr().err
    pid = node.processes[1].pid
    assert line.startswith(f"watchdog: rank 11 (pid {pid}, stopped) has been in 'step' of step 17")
    assert "allowed are 0.8 s" in line
    assert line.count("\n") == 1
    (report,) = node.reports
    assert str(report) in line
    _, *parts = report.read_text().split("=== ")
    for rank, (part, function) in enumerate(
        zip(parts, ["in_a_collective", "stops_itself", "in_a_collective"], strict=True), start=10
    ):
        assert part.startswith(f"rank {rank} (pid {node.processes[rank - 10].pid}, ")
        assert "Current thread" in part
        assert f"in {function}\n" in part
    assert not list(node.folder.rglob("*.stacks")), "they are in the report"
    assert not node.board.exists()


def test_who_is_an_earlier_place_than_the_others_is_named(
    node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    """Though it is the others that are over their limit."""
    node.run(goes_on_to_the_step, waits_for_data, goes_on_to_the_step)
    assert node.wait(LIMITS.step + 5) == [KILLED] * 3
    line = capfd.readouterr().err
    assert line.startswith(f"watchdog: rank 11 (pid {node.processes[1].pid}, sleeping) has been in")
    assert "in 'data' of step 17" in line
    assert "has been in 'step' of step 17" in line
    assert "in waits_for_data\n" in node.reports[0].read_text()


def test_a_process_that_has_gone_is_named(node: Node, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody has asked for its exit code yet: it is a zombie."""
    node.run(in_a_collective, ends_early)
    until(lambda: node.processes[0].exitcode is not None, LIMITS.step + 5)
    line = capfd.readouterr().err
    assert f"rank 11 (pid {node.processes[1].pid}, gone) has been in 'start'" in line


def test_where_all_are_in_one_place_nobody_is_blamed(
    node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    """The cause is on another node. Nobody has a handler for the signal, which kills nobody."""
    node.size, node.dumps = 2, False
    node.run(in_a_collective, in_a_collective)
    assert node.wait(LIMITS.step + 5) == [KILLED] * 2
    line = capfd.readouterr().err
    assert "no rank of this node is behind the others" in line
    assert "rank 10" in line
    assert "rank 11" in line
    assert node.reports[0].read_text().count("no stacks") == 2


def test_a_process_that_never_began_is_named(node: Node, capfd: pytest.CaptureFixture[str]) -> None:
    node.run(in_a_collective, in_a_collective)
    assert node.wait(LIMITS.step + 5) == [KILLED] * 2
    assert "watchdog: local rank 2 was never seen alive; rank 1" in capfd.readouterr().err


def test_nothing_happens_while_marks_come_in_time(
    node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor to a process without a limit, nor to one whose work is done; then the watchdog ends."""
    node.run(works, has_no_limit, takes_its_time_at_the_end)
    watchdog = node.watchdog()
    until(lambda: not node.board.exists())  # it has seen all
    assert node.wait(10) == [0] * 3
    until(lambda: state_of(*watchdog) == "gone", 1)
    assert capfd.readouterr().err == ""
    assert not node.reports


def test_the_watchdog_lasts_as_long_as_a_worker_whatever_signal_it_gets(node: Node) -> None:
    node.run(sleeps, sleeps, sleeps)
    watchdog = node.watchdog()
    until(lambda: not node.board.exists())
    for number in module.IGNORED:
        os.kill(watchdog[0], number)
    node.processes[0].kill()
    node.processes[1].kill()
    time.sleep(5 * POLL)
    assert state_of(*watchdog) != "gone"
    node.processes[2].kill()
    until(lambda: state_of(*watchdog) == "gone", 1)


def test_the_next_attempt_has_a_board_of_its_own(tmp_path: Path, node: Node) -> None:
    node.run(in_a_collective, in_a_collective, in_a_collective)
    assert node.wait(LIMITS.step + 5) == [KILLED] * 3
    second = Node(tmp_path, attempt="1")
    assert second.board != node.board
    second.run(works, works, works)
    assert second.wait(10) == [0] * 3
    assert len(node.reports) == 1


def test_workers_end_with_their_launcher(tmp_path: Path) -> None:
    def launch() -> None:
        node = Node(tmp_path, orphans=True)
        node.run(sleeps, sleeps, sleeps)
        until(lambda: not node.board.exists())
        (tmp_path / "pids.tmp").write_text(" ".join(str(p.pid) for p in node.processes))
        (tmp_path / "pids.tmp").rename(tmp_path / "pids")
        time.sleep(60)

    launcher = FORK.Process(target=launch)
    launcher.start()
    until((tmp_path / "pids").exists)
    workers = [(int(p), process_state(int(p))[1]) for p in (tmp_path / "pids").read_text().split()]
    time.sleep(5 * POLL)
    assert "gone" not in [state_of(*worker) for worker in workers]
    launcher.kill()
    launcher.join()
    until(lambda: {state_of(*worker) for worker in workers} == {"gone"}, 2)


def test_a_later_process_with_the_same_pid_is_left_alone() -> None:
    other = subprocess.Popen(["sleep", "60"])
    pid, started = other.pid, process_state(other.pid)[1]
    record = Record(pid, started - 1, 1, 1, 0, 0, 0, 0.0, 0.0, False, "step")
    send(record, signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.2)
    send(record._replace(started=started), signal.SIGKILL)
    assert other.wait(5) == KILLED


class Clock:
    """A clock that stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


def test_time_in_which_the_watchdog_did_not_run_does_not_count(
    tmp_path: Path, clock: Clock
) -> None:
    """The node slept, or a terminal stopped everybody."""
    board = Board(tmp_path / "board", 0, 0, 1)
    watchdog = Watchdog(board.path, tmp_path, poll=0.25)
    board.write("step", 1, 1, allowed=10)
    watchdog.look()
    clock.now += 1000
    watchdog.look()
    assert watchdog.verdict() is None
    polls = 0
    while watchdog.verdict() is None:
        clock.now += 0.25
        polls += 1
        watchdog.look()
    assert polls == pytest.approx((10 - 1.25) / 0.25, abs=1)
    board.write("step", 1, 2, allowed=10)
    watchdog.look()
    assert watchdog.verdict() is None


def test_a_folder_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        Progress(LIMITS, Board(tmp_path / "board", 0, 0, 1))
        time.sleep(60)

    process = FORK.Process(target=work)
    process.start()
    until(lambda: (tmp_path / "board").exists() and bool((tmp_path / "board").stat().st_size))
    watchdog = Watchdog(tmp_path / "board", tmp_path, POLL)
    until(lambda: watchdog.reader.records() != [None])
    watchdog.look()
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.1)
    monkeypatch.setattr(Watchdog, "_report", lambda *_: threading.Event().wait(2))
    watchdog.end([], "rank 0 hangs")
    process.join(1)
    assert process.exitcode == KILLED
    assert f"could not be written to {tmp_path}" in capfd.readouterr().err


def test_a_record_of_an_earlier_process_is_not_watched(tmp_path: Path) -> None:
    """A board that was left over: the processes that it names may be gone or be others."""
    path = tmp_path / "board"

    def leave() -> None:
        for local_rank in range(2):
            Progress(LIMITS, Board(path, local_rank, local_rank, 2))

    process = FORK.Process(target=leave)
    process.start()
    process.join()
    reader = BoardReader(path)
    assert [record and record.pid for record in reader.records()] == [process.pid] * 2
    Progress(LIMITS, Board(path, 5, 1, 2))
    watchdog = Watchdog(path, tmp_path, POLL)
    watchdog.look()
    assert [worker.record.rank for worker in watchdog.workers] == [5]
    assert watchdog.missing == [0]


def test_a_torn_record_leaves_the_one_before(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 3, 1, 2)
    reader = BoardReader(board.path)
    assert reader.records() == [None, None]
    board.write("data", 1, 1, 2.0)
    board.write("step", 1, 2, 3.0)
    nobody, newest = reader.records()
    assert nobody is None
    assert newest is not None
    assert newest[:7] == (os.getpid(), process_state(os.getpid())[1], os.getppid(), 2, 3, 1, 2)
    assert newest[8:] == (3.0, False, "step")
    begin = 2 * RECORD_SIZE  # of the second place, where the second record lies first
    for byte in range(begin, begin + 90):
        with board.path.open("r+b") as file:
            file.seek(byte)
            old = file.read(1)
            file.seek(byte)
            file.write(bytes([old[0] ^ 1]))
            file.flush()
            before = reader.records()[1]
            assert before is not None
            assert (before.section, before.total) == ("data", 1), byte
            file.seek(byte)
            file.write(old)
    assert reader.records()[1] == newest


def test_a_reader_never_sees_half_a_record(tmp_path: Path) -> None:
    """While another process writes as fast as it can, in records that it can tell apart."""
    path = tmp_path / "board"

    def write() -> None:
        board = Board(path, 0, 0, 1)
        while True:
            number = board.total
            board.write("ab"[number % 2] * 16, number, 2 * number, 3.0 * number)

    process = FORK.Process(target=write)
    process.start()
    until(lambda: path.exists() and bool(path.stat().st_size))
    reader, seen = BoardReader(path), 0
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        (record,) = reader.records()
        if record is not None or seen:
            assert record is not None, "there has been one"
            seen, number = record.total, record.step
            assert record.total == number + 1
            assert (record.marks, record.allowed) == (2 * number, 3.0 * number)
            assert record.section == "ab"[number % 2] * 16
    process.kill()
    process.join()
    assert seen > 1000


def test_time_is_accounted_to_the_innermost_section(clock: Clock) -> None:
    progress = Progress(LIMITS)

    def fail() -> None:
        with progress.section("save"):
            clock.now += 1000
            raise ValueError("in it")

    clock.now += 1
    with progress.section("step"):
        clock.now += 10
        with progress.section("data"):
            clock.now += 100
        clock.now += 20
        with pytest.raises(ValueError, match="in it"):
            fail()
        assert progress.current == "step"
        clock.now += 30
        assert progress.spent() == {"start": 1, "step": 60, "data": 100, "save": 1000}
    clock.now += 2
    assert progress.spent() == {"start": 3, "step": 60, "data": 100, "save": 1000}
    assert sum(progress.spent().values()) == clock.now - Clock.now


def test_every_mark_is_on_the_board_and_told_to_listeners(tmp_path: Path, clock: Clock) -> None:
    board = Board(tmp_path / "board", 0, 0, 1)
    reader = BoardReader(board.path)

    def place() -> tuple[str, int, int, float, float]:
        (record,) = reader.records()
        assert record is not None
        return record.section, record.step, record.marks, record.time, record.allowed

    progress = Progress(LIMITS, board)
    heard: list[tuple[str, str]] = []
    progress.listeners.append(lambda section, phase: heard.append((section, phase)))
    assert place() == ("start", -1, 1, clock.now, LIMITS.start)
    clock.now += 1
    with progress.section("step"):
        progress.mark("forward", step=5)
        assert place() == ("step", 5, 1, clock.now, LIMITS.step)
        clock.now += 1
        with progress.section("data"):
            assert place() == ("data", 5, 2, clock.now, LIMITS.data)
        clock.now += 1
        progress.mark("backward", step=5)
        assert place() == ("step", 5, 4, clock.now, LIMITS.step)
    step = ("step", "")
    assert heard == [
        *(step, ("step", "forward"), ("data", ""), step, ("step", "backward"), ("start", "")),
    ]
    process = FORK.Process(target=progress.mark)  # such as one that reads data
    process.start()
    process.join()
    assert process.exitcode == 0
    assert place() == ("start", 5, 5, clock.now, LIMITS.start)


def test_without_the_watchdog_no_section_has_a_limit() -> None:
    assert WatchdogConfig().allowed("step") == 600
    assert WatchdogConfig(enabled=False).allowed("step") == 0


def test_the_watchdog_needs_the_standard_library_only() -> None:
    """It starts at once and stays small."""
    code = (
        "import sys, moebius.trainer.watch.watchdog;"
        "outside = {'torch', 'numpy', 'pydantic', 'moebius.config'} & set(sys.modules);"
        "assert not outside, outside"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

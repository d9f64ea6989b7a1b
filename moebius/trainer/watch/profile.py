"""Profiles: what the processor and the device do in some steps, and how long each of it takes."""

from __future__ import annotations

import gzip
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerActivity, profile, record_function

from moebius.config import ConfigNode
from moebius.errors import LayoutError
from moebius.files import replaced
from moebius.trainer.watch.phases import PHASES

if TYPE_CHECKING:
    from moebius.trainer.watch.progress import Progress

SHOWN = ("data", *PHASES)
"""of a step, as its progress names them"""
ROWS = 12
"""operations that a summary shows"""
CHUNK = 1 << 20
"""bytes that are compressed at once"""
ALLOCATIONS = 100_000
"""newest ones that a snapshot of memory holds; each takes some KB"""


class ProfileConfig(ConfigNode):
    """A record of what is done in some steps, in `<run_dir>/profile`."""

    steps: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
    """first and last optimizer step, both included, counted from 1"""
    ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] | None = (0,)
    """processes that record; null: all of them"""
    stacks: bool = False
    """record calls of Python, too; makes the steps several times as long"""
    memory: bool = False
    """record what allocates memory of the GPU, for pytorch.org/memory_viz"""

    def chooses(self, rank: int) -> bool:
        """Whether a process records."""
        return self.ranks is None or rank in self.ranks


def check_ranks(config: ProfileConfig | None, processes: int) -> None:
    """Raise LayoutError where a process is to be profiled that does not exist."""
    for rank in (config and config.ranks) or ():
        if rank >= processes:
            raise LayoutError(
                f"profile.ranks: {rank}, but there are {processes} processes, counted from 0",
                "name others, or null for all",
            )


def check_memory(config: ProfileConfig | None, device: torch.device) -> None:
    """Raise LayoutError where the device has no record of its memory."""
    if config is not None and config.memory and device.type != "cuda":
        raise LayoutError(
            f"profile.memory: true, but the device is {device.type}; allowed: on cuda",
            "set it to false",
        )


class Operation(NamedTuple):
    """All calls of one operation in all recorded steps."""

    name: str
    calls: int
    seconds: float
    """without those of operations inside of it"""


class Clock:
    """Time that passes in phases, on a GPU as its stream comes to them and not as they are asked
    of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """From here on a phase lasts, until the next one."""
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self.device))
            self._marks.append((phase, moment))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Of each phase; the device must have come to all of them."""
        total: dict[str, float] = {}
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            passed = begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
            total[phase] = total.get(phase, 0.0) + passed
        return total


class Recording:
    """Some steps of one process, recorded. For the main thread.

    Made before a step that warms up the profiler, or right before the first one. What happens
    between recorded steps is in the trace, outside of their ranges, but not in the summary.
    """

    def __init__(self, config: ProfileConfig, progress: Progress, device: torch.device) -> None:
        self.config, self.progress, self.device = config, progress, device
        self.steps: list[int] = []
        self.stopped = False
        self._inside = False
        """whether a recorded step is under way"""
        self._clock = Clock(device)
        self._open = ""
        """the phase whose range is open"""
        self._step, self._phase = ExitStack(), ExitStack()
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, with_stack=config.stacks)
        self._profiler.prepare_trace()

    def begin(self, step: int) -> None:
        """A step begins that is to be recorded."""
        if not self.steps:
            self._start()
        self.steps.append(step)
        self._step.enter_context(record_function(f"step {step}"))
        self._clock.mark("rest")
        self._inside = True

    def end(self) -> None:
        """The step is over, on the device too: what it does belongs to the step that asked."""
        self._synchronize()
        self._inside = False
        self._close_phase()
        self._clock.mark("")
        self._step.close()

    def stop(self) -> None:
        """Record no more, whatever is open; once."""
        if self.stopped:
            return
        self.stopped = True
        if self.steps:
            self.progress.listeners.remove(self._enter)
        else:
            self._profiler.start_trace()  # what was prepared can only be ended after a start
        self._close_phase()
        self._step.close()
        self._profiler.stop_trace()

    def write(self, folder: Path, rank: int) -> Path:
        """Write the trace, and the snapshot of memory beside it, and give the path of the first.

        Raises OSError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{self.steps[0]}-rank-{rank}"
        with replaced(folder / f"{name}.json.gz", folder / f"{name}.tmp") as temporary:
            self._export(temporary)
        if self.config.memory:
            with replaced(folder / f"{name}.pickle", folder / f"{name}.tmp") as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
        return folder / f"{name}.json.gz"

    def _export(self, path: Path) -> None:
        """Write the compressed trace; the profiler itself would compress it line by line."""
        plain = path.with_name(f"{path.name}.json")
        try:
            self._profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target, CHUNK)
        finally:
            plain.unlink(missing_ok=True)

    def release(self) -> None:
        """Stop, and forget what was recorded."""
        self.stop()
        if self.config.memory and self.steps:
            torch.cuda.memory._record_memory_history(enabled=None)

    def summary(self) -> tuple[Table, Table]:
        """Phases and operations; shares are of the time of a step."""
        seconds, count = self._clock.seconds(), len(self.steps)
        seconds.pop("", None)
        total = sum(seconds.values())
        phases = table("phase", "ms per step", "share")
        for name in (*SHOWN, "rest"):
            phases.add_row(name, *_time(seconds.get(name, 0.0), count, total))
        phases.add_row("step", *_time(total, count, total))
        found = operations(self._profiler.events() or (), self.device.type)
        rest = found[ROWS:]
        others = Operation(f"{len(rest)} others", sum(o.calls for o in rest), sum_of(rest))
        rows = table("operation", "calls per step", "ms per step", "share")
        for name, calls, spent in [*found[:ROWS], *([others] if rest else [])]:
            label = Text(name, no_wrap=True, overflow="ellipsis")  # kernels have long names
            rows.add_row(label, f"{calls / count:g}", *_time(spent, count, total))
        return phases, rows

    def _start(self) -> None:
        self._synchronize()
        if self.config.memory:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=ALLOCATIONS)
        self._profiler.start_trace()
        self.progress.listeners.append(self._enter)

    def _enter(self, section: str, phase: str) -> None:
        """Hear of a mark of the progress: close the range of a phase, and open that of another."""
        if not self._inside or current_thread() is not main_thread():
            return  # another thread writes a checkpoint beside the steps
        name = phase if section == "step" else section
        if name == self._open:
            return
        self._close_phase()
        if name in SHOWN:
            self._open = name
            self._phase.enter_context(record_function(name))
            self._clock.mark(name)
        else:
            self._clock.mark("rest")

    def _close_phase(self) -> None:
        self._open = ""
        self._phase.close()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def table(first: str, *numbers: str) -> Table:
    """An empty table of a summary."""
    made = Table(box=None, pad_edge=False)
    made.add_column(first)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def operations(events: Sequence[Any], device: str) -> list[Operation]:
    """What was done on a device within ranges of steps, by name, what takes longest first.

    On a GPU these are kernels and copies. Ranges are no operations, though GPUs have them, too.
    """
    spans = [
        event.time_range
        for event in events
        if event.is_user_annotation and is_on(event, "cpu") and event.name.startswith("step ")
    ]
    found: dict[str, Operation] = {}
    for event in events:
        begin = event.time_range.start
        if not is_operation(event) or not is_on(event, device):
            continue
        if not any(span.start <= begin < span.end for span in spans):
            continue
        spent = event.self_cpu_time_total if device == "cpu" else event.time_range.elapsed_us()
        _, calls, seconds = found.get(event.name, Operation(event.name, 0, 0.0))
        found[event.name] = Operation(event.name, calls + 1, seconds + spent / 1e6)
    return sorted(found.values(), key=lambda operation: -operation.seconds)


def is_on(event: Any, device: str) -> bool:
    """Whether an event was on a kind of device."""
    return bool(event.device_type.name.lower() == device)


def is_operation(event: Any) -> bool:
    """Whether an event is neither a range nor a call of Python."""
    # Not every torch that can run this says of events whether they are calls of Python.
    return not (event.is_user_annotation or getattr(event, "is_python_function", False))


def sum_of(found: Sequence[Operation]) -> float:
    """Seconds of operations together."""
    return sum(operation.seconds for operation in found)


def _time(seconds: float, steps: int, total: float) -> tuple[str, str]:
    return f"{1e3 * seconds / steps:.2f}", f"{seconds / total:.1%}"

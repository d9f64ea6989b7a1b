"""What a person sees: a live view in a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from moebius.trainer.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class ConsoleCallback(Callback):
    """In a terminal a live view of the last report under the lines of evaluations and events; else
    one line per report.

    Not a terminal means a log file: no escape codes, no carriage returns, one line per interval.
    """

    name = "console"
    priority = 10

    def __init__(self, console: Console) -> None:
        self.console = console
        self.is_live = console.is_terminal and not console.quiet
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[eta]}"),
            console=console,
            expand=True,
        )
        self.report: list[str] = []
        """parts of the last one"""
        self.happened = ""
        """the last event or checkpoint"""
        self.live = Live(
            get_renderable=self.view, console=console, refresh_per_second=4, auto_refresh=True
        )

    def view(self) -> Group:
        """The bar, a line for each part of the last report, and what happened last."""
        lines = [line for line in (*self.report, self.happened) if line]
        return Group(self.bar, *(Text(line, overflow="ellipsis", no_wrap=True) for line in lines))

    def on_start(self, run: Run) -> None:
        """Say where the run begins."""
        num_steps = run.config.train.num_steps
        for task in self.bar.task_ids:  # of before the run went back
            self.bar.remove_task(task)
        self.task = self.bar.add_task("train", total=num_steps, completed=run.step, eta="starting")
        begin = f"continuing after step {run.step}" if run.step else "starting"
        self._print(f"{begin}: {num_steps} steps on {run.device.type}, run folder {run.folder}")
        if self.is_live:
            self.live.start()

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=run.step)

    def on_metrics(self, run: Run, metrics: dict[str, float]) -> None:
        """Show a report of training or of an evaluation."""
        num_steps = run.config.train.num_steps
        step = f"step {run.step:>{len(str(num_steps))}}"
        if "train/loss" in metrics:
            seconds = (num_steps - run.step) * metrics["speed/step_seconds"]
            parts = training_parts(metrics)
            self.report = parts
            self.bar.update(self.task, eta=f"ETA {duration(seconds)}")
            if not self.is_live:
                first, *rest = parts
                line = " | ".join((first, f"ETA {duration(seconds)}", *rest))
                self._print(f"{step}/{num_steps} | {line}")
        elif "eval/loss" in metrics:
            self._print(f"{step} | {evaluation_line(metrics)}")

    def on_event(self, run: Run, kind: str, text: str) -> None:
        """Print what happened."""
        self._tell(f"{kind}: {text}")

    def on_saved(self, run: Run, step: int) -> None:
        """Print that there is a checkpoint."""
        self._tell(f"saved: step {step}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.live.stop()

    def _tell(self, line: str) -> None:
        self.happened = f"{clock()} | {line}"
        self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(f"{clock()} | {line}", highlight=False, markup=False, soft_wrap=True)


def clock() -> str:
    """The time of day."""
    return time.strftime("%H:%M:%S")


def training_parts(metrics: dict[str, float]) -> list[str]:
    """Loss and speed and, where the model has them, the health of its routers over width and of
    those over depth."""
    parts = [
        f"loss {metrics['train/loss']:.4f} | {metrics['speed/tokens_per_second']:,.0f} tok/s | "
        f"MFU {metrics['speed/mfu']:.1%}"
    ]
    if "width/computing_share" in metrics:
        parts.append(
            f"k {metrics['width/experts_per_token']:.1f}, "
            f"{metrics['width/computing_share']:.0%} ffn, "
            f"load x{metrics['width/load_max_over_mean']:.1f}, "
            f"{metrics['width/dead_share']:.0%} dead"
        )
    depth = []
    if "depth/agreement" in metrics:
        depth.append(f"depth {metrics['depth/agreement']:.0%} causal")
    if "depth/mean_passes" in metrics:
        depth.append(f"{metrics['depth/mean_passes']:.2f} passes")
    return [*parts, ", ".join(depth)] if depth else parts


def evaluation_line(metrics: dict[str, float]) -> str:
    """Validation loss; for a model that routes over depth in both modes of selection."""
    line = (
        f"validation loss {metrics['eval/loss']:.4f}, "
        f"{metrics['eval/bits_per_byte']:.4f} bits per byte"
    )
    if "eval/topk_loss" in metrics:
        line += f" (selecting as in training: {metrics['eval/topk_loss']:.4f})"
    for name, value in metrics.items():
        if name.startswith("eval/exit_") and name.endswith("_loss"):
            line += f", exit {name.split('_')[1]}: {value:.4f}"
    return line


def duration(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

"""What a person sees: a live bar in a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moebius.trainer.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class ConsoleCallback(Callback):
    """One line per report; in a terminal a progress bar below them.

    Not a terminal means a log file: no escape codes, no carriage returns, one line per interval.
    """

    name = "console"
    priority = 10

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )

    def on_start(self, run: Run) -> None:
        """Say where the run begins."""
        num_steps = run.config.train.num_steps
        for task in self.progress.task_ids:  # of before the run went back
            self.progress.remove_task(task)
        self.task = self.progress.add_task(
            "train", total=num_steps, completed=run.step, status="starting"
        )
        self.progress.start()
        begin = f"continuing after step {run.step}" if run.step else "starting"
        self._print(f"{begin}: {num_steps} steps on {run.device.type}, run folder {run.folder}")

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=run.step)

    def on_metrics(self, run: Run, metrics: dict[str, float]) -> None:
        """Print a training or an evaluation line."""
        step = f"step {run.step:>{len(str(run.config.train.num_steps))}}"
        if "train/loss" in metrics:
            remaining = run.config.train.num_steps - run.step
            line = training_line(metrics, remaining * metrics["speed/step_seconds"])
            self.progress.update(self.task, status=line)
            self._print(f"{step}/{run.config.train.num_steps} | {line}")
        elif "eval/loss" in metrics:
            self._print(f"{step} | {evaluation_line(metrics)}")

    def on_event(self, run: Run, kind: str, text: str) -> None:
        """Print what happened."""
        self._print(f"{kind}: {text}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.progress.stop()

    def _print(self, line: str) -> None:
        self.console.print(
            f"{time.strftime('%H:%M:%S')} | {line}", highlight=False, markup=False, soft_wrap=True
        )


def training_line(metrics: dict[str, float], eta_seconds: float) -> str:
    """Loss, speed and, where the model has them, the health of its routers."""
    parts = [
        f"loss {metrics['train/loss']:.4f}",
        f"{metrics['speed/tokens_per_second']:,.0f} tok/s",
        f"MFU {metrics['speed/mfu']:.1%}",
        f"ETA {duration(eta_seconds)}",
    ]
    if "width/computing_share" in metrics:
        parts.append(
            f"k {metrics['width/experts_per_token']:.1f}, "
            f"{metrics['width/computing_share']:.0%} ffn, "
            f"load x{metrics['width/load_max_over_mean']:.1f}"
        )
    if "depth/agreement" in metrics:
        parts.append(f"depth {metrics['depth/agreement']:.0%} causal")
    if "depth/mean_passes" in metrics:
        parts.append(f"{metrics['depth/mean_passes']:.2f} passes")
    return " | ".join(parts)


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

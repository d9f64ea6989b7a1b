"""Running short trainings and the command line from tests."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import Tensor

from moebius.data.corpus import open_corpora
from moebius.parallel.world import is_main
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.callbacks.interrupt import InterruptCallback
from moebius.trainer.commands.train import callbacks_of
from moebius.trainer.comparison import MACHINE
from moebius.trainer.config import RunConfig
from moebius.trainer.folder import check_folder, claim_folder, lock_folder
from moebius.trainer.loop import train
from moebius.trainer.resume import resume
from moebius.trainer.run import Run
from tests.parity.whole import whole_tensors

REPOSITORY = Path(__file__).parents[2]


class StopAfter(Callback):
    """Asks for a stop after a step, as an interruption does."""

    name = "stop_after"

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, run: Run, report: StepReport) -> None:
        if run.step == self.step:
            run.consensus.vote("stop", 2)


def train_run(
    config: RunConfig,
    stop_after: int | None = None,
    beside: Sequence[Callback] = (),
    console: Console | None = None,
) -> Run:
    """Train as `moebius train` does, without a terminal and without signals."""
    check_folder(config)
    quiet = console or Console(file=open(os.devnull, "w"))  # noqa: SIM115
    callbacks = [
        StopAfter(stop_after),
        *beside,
        *(c for c in callbacks_of(config, quiet) if not isinstance(c, InterruptCallback)),
    ]
    run = Run(config, open_corpora(config.data), callbacks)
    with lock_folder(run.folder) if is_main() else nullcontext():
        resume(run)
        if is_main():
            claim_folder(config)
        train(run)
    return run


def saved_state(run: Run) -> dict[str, Tensor]:
    """What a checkpoint of the run would hold: parameters, buffers, the optimizer's state."""
    return whole_tensors(run.layout.parts())


def logged(folder: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock or the layout."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(MACHINE)} for line in lines
    ]


def write_config(tree: dict[str, Any], path: Path) -> Path:
    """A run file of a config tree."""
    plain = json.loads(json.dumps(tree))
    path.write_text(yaml.safe_dump(plain))
    return path


def moebius(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "moebius.trainer", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line a failed command printed to stderr; no traceback."""
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]

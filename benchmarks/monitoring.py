"""What watching a run costs: the quickstart with everything that reports, and without.

    .venv/bin/python benchmarks/monitoring.py

Two runs in one process take turns, each for one interval of reports, in pairs whose order changes.
One has all callbacks; the other those without which a run would not be safe: the guard, evaluation
and checkpoints, of which none is due. Pictures are drawn in every interval, five times as often as
by default. The overhead is the median over pairs of the one time over the other, less 1. The pairs
of the same run against itself say how far that is from chance.
Writes benchmarks/results/monitoring-<machine>.json.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from machine import ROOT, parser, prepare, write_result
from rich.console import Console
from rounds import show

from moebius.data.corpus import open_corpora
from moebius.data.prepare import prepare as prepare_data
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.callbacks.guard import GuardCallback
from moebius.trainer.commands.preparing import workshop
from moebius.trainer.commands.train import callbacks_of
from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.loop import advance
from moebius.trainer.run import Run

NEVER = "100000"
INTERVAL = 20


def config_of(folder: Path, name: str, quick: bool) -> RunConfig:
    """The quickstart, of which nothing ends and nothing is evaluated or saved."""
    steps = {"log.interval": "2" if quick else str(INTERVAL), "train.num_steps": NEVER}
    often = {"log.picture_interval": steps["log.interval"]}
    never = {"evaluation.interval": NEVER, "checkpoint.interval": NEVER}
    never |= {"evaluation.num_batches": "1"}
    small = {"train.batch_size": "2", "data.sequence_length": "32"} if quick else {}
    place = {"run_dir": str(folder / name), "data.dir": str(folder / "data")}
    words = [f"{key}={value}" for key, value in (steps | often | never | small | place).items()]
    return load_config(str(ROOT / "configs/quickstart.yaml"), words)


def start(config: RunConfig, callbacks: list[Callback], stack: ExitStack) -> Run:
    """A run that has begun."""
    Path(config.run_dir).mkdir(parents=True)
    (Path(config.run_dir) / "config.yaml").write_text("")
    run = Run(config, open_corpora(config.data), callbacks)
    stack.callback(run.stream.close)
    for callback in run.callbacks:
        stack.callback(callback.close)
        callback.on_start(run)
    return run


def interval_of(run: Run) -> Callable[[], float]:
    """Does the steps of an interval, the last of which is reported; seconds."""

    def steps() -> float:
        began = time.perf_counter()
        for _ in range(run.config.log.interval):
            advance(run)
        return time.perf_counter() - began

    return steps


def pairs(one: Callable[[], float], other: Callable[[], float], count: int) -> list[float]:
    """The time of one over that of the other, so many times; each comes first in every other."""
    ratios = []
    for number in range(count):
        if number % 2:
            second = other()
            ratios.append(one() / second)
        else:
            first = one()
            ratios.append(first / other())
    return ratios


def summary(ratios: list[float]) -> dict[str, Any]:
    """Median and extremes, less 1."""
    found = {"overhead": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {name: round(value - 1, 5) for name, value in found.items()} | {"pairs": len(ratios)}


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__).parse_args()
    settings = prepare()
    count = 2 if arguments.quick else 8
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        configs = {key: config_of(folder, key, arguments.quick) for key in ("all", "plain", "same")}
        console = Console(file=stack.enter_context(open(os.devnull, "w")))
        with workshop(console) as tools:
            prepare_data(configs["all"].data, configs["all"].model.vocab_size, tools)
        watched = start(configs["all"], callbacks_of(configs["all"], console), stack)
        guards = {key: [GuardCallback(configs[key].recovery)] for key in ("plain", "same")}
        plain = start(configs["plain"], list(guards["plain"]), stack)
        same = start(configs["same"], list(guards["same"]), stack)
        runs = {key: interval_of(r) for key, r in zip(configs, (watched, plain, same), strict=True)}
        for steps in runs.values():
            steps()
        watching = summary(pairs(runs["all"], runs["plain"], count))
        chance = summary(pairs(runs["same"], runs["plain"], count))
    rows = [["all that reports", *watching.values()], ["nothing more", *chance.values()]]
    show("time of an interval over that without reports, less 1", ("", *watching), rows)
    result = {"settings": settings, "interval": 2 if arguments.quick else INTERVAL}
    write_result("monitoring", result | {"watching": watching, "chance": chance}, arguments.out)


if __name__ == "__main__":
    main()

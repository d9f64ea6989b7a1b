"""moebius status: how a run stands: its state, step, time left, last checkpoint, latest events."""

import argparse
import json
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebius.trainer.commands.arguments import whole
from moebius.trainer.commands.checkpoints import duration
from moebius.trainer.overview import Overview, look


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius status RUN [--events N] [--json]`."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--events", type=whole(0), default=3, metavar="N", help="latest events; default: 3"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON instead of a table")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print one screen, or one line."""
    found = look(arguments.run, arguments.events)
    if arguments.json:
        console.file.write(json.dumps(asdict(found)) + "\n")
        return 0
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows(found):
        table.add_row(name, Text(text))  # brackets in events are no markup
    console.print(table)
    return 0


def rows(found: Overview) -> list[tuple[str, str]]:
    """What is printed, by name; only what is known."""
    lines = [("state", f"{found.state}{': ' if found.reason else ''}{found.reason}")]
    total = "" if found.num_steps is None else f" of {found.num_steps:,}"
    lines.append(("step", f"{found.step:,}{total}"))
    if found.seconds_left is not None:
        lines.append(("time left", str(timedelta(seconds=round(found.seconds_left)))))
    if found.checkpoint is not None:
        written, tokens = found.checkpoint["written"], found.checkpoint["tokens"]
        age = "" if written is None else f", {duration(time.time() - written)} ago"
        text = f"step {found.checkpoint['step']:,}, {tokens:,} tokens{age}"
        lines.append(("checkpoint", text))
    if found.attempts:
        lines.append(("attempts", str(found.attempts)))
    shares = [f"{name} {share:.0%}" for name, share in found.goodput.items() if share >= 0.005]
    if shares:
        lines.append(("time", ", ".join(shares)))
    for job in found.jobs:
        parts = [job["job"], job["state"].lower() or "unknown to SLURM"]
        parts += [f"on {job['nodes']}"] if job["nodes"] else []
        parts += [f"requeued {job['restarts']} times"] if job["restarts"] != "0" else []
        lines.append(("job", ", ".join(parts)))
    for event in found.events:
        lines.append((str(event.get("event")), f"step {event.get('step')}: {event.get('text')}"))
    return lines

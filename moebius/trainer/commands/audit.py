"""moebius audit: prove from the logs of runs that no sample was lost or repeated."""

import argparse
from pathlib import Path

from rich.console import Console

from moebius.data.audit import compare, read_audit
from moebius.errors import DataError
from moebius.trainer.callbacks.audit import AUDIT_FOLDER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius audit RUN [OTHER]`."""
    parser.add_argument("run", type=Path, help="run folder, trained with log.audit=true")
    parser.add_argument(
        "other", type=Path, nargs="?", help="another one, which must have had the same samples"
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Check each log in itself, then both against each other; fails with the first difference."""
    logs = {}
    for folder in filter(None, (arguments.run, arguments.other)):
        rows = logs[folder] = read_audit(folder / AUDIT_FOLDER)
        epochs = len({tuple(row) for row in rows[:, 1:3].tolist()})
        span = f"positions {rows[0, 0]} to {rows[-1, 0]}" if len(rows) else "no positions"
        _say(console, f"{folder}: {len(rows):,} samples, {span}, in {epochs} epochs: each once")
    if arguments.other is not None:
        common, differs = compare(logs[arguments.run], logs[arguments.other])
        if differs >= 0:
            raise DataError(
                f"audit: position {differs} is another sample in '{arguments.other}' than in "
                f"'{arguments.run}'"
            )
        _say(console, f"{common:,} positions in both, the same samples")
    return 0


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

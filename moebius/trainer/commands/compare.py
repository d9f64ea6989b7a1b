"""moebius compare: at which step, in what and in which layer two runs first differ."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from moebius.trainer.callbacks.sinks import finite
from moebius.trainer.commands.arguments import non_negative
from moebius.trainer.comparison import Comparison, Difference, compare, layer_of, read_course

ROWS = 12
"""of a table; the rest is counted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius compare RUN OTHER [--rtol X] [--json]`."""
    parser.add_argument("run", type=Path, help="run folder, or its metrics.jsonl")
    parser.add_argument("other", type=Path, help="another one")
    parser.add_argument(
        "--rtol",
        type=non_negative,
        default=1e-6,
        metavar="X",
        help="relative difference up to which numbers are alike; 0: bit for bit; default: 1e-6",
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON instead of a text")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print where they part; exit code 0 where they do not, 1 where they do."""
    courses = read_course(arguments.run), read_course(arguments.other)
    found = compare(*courses, arguments.rtol)
    if arguments.json:
        console.file.write(json.dumps(tree(found)) + "\n")
    else:
        show(found, arguments, console)
    return int(found.step is not None)


def tree(found: Comparison) -> dict[str, Any]:
    """As JSON has it: null for what is not finite."""
    origin = found.origin
    layer = None if origin is None else layer_of(origin.tensor.name)
    began = None if origin is None else asdict(origin) | {"layer": layer}
    plain: dict[str, Any] = _plain(asdict(found) | {"origin": began})
    return plain


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _plain(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return finite(node) if isinstance(node, float) else node


def show(found: Comparison, arguments: argparse.Namespace, console: Console) -> None:
    """Print it as text."""
    folders = arguments.run, arguments.other
    _say(
        console,
        f"{found.steps:,} steps in both; alike is what differs by at most {arguments.rtol:g}",
    )
    if found.step is None:
        _say(console, "no difference")
    else:
        _show_step(found, found.step, console)
    for folder, names in zip(folders, found.missing, strict=True):
        if names:
            _say(console, f"only in {folder}: {', '.join(names)}")
    untraced = [str(folder) for folder, n in zip(folders, found.traced, strict=True) if not n]
    if untraced:
        _say(console, f"no trace in {' and '.join(untraced)}: log.trace=true names layers")


def _show_step(found: Comparison, step: int, console: Console) -> None:
    """The first step that differs, and the largest difference of all."""
    only = ", and only evaluations differ, in all steps" if found.evaluation_only else ""
    _say(console, f"the first difference is at step {step}{only}")
    origin = found.origin
    if origin is not None:
        name = origin.tensor.name
        _say(console, f"{origin.reason}; {origin.edge} in {layer_of(name)}: {name}")
    kinds = (found.metrics, found.gradients, found.weights)
    rows = [_row(difference) for differences in kinds for difference in differences[:ROWS]]
    rows.insert(0, ("", "", "first run", "second run", "relative difference"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # no table of rich, which would cut names where the terminal is narrow
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        _say(console, f"  {'  '.join(cells).rstrip()}")
    for kind, differences in zip(("metrics", "gradients", "weights"), kinds, strict=True):
        if differences[ROWS:]:
            most = max(differences, key=lambda difference: difference.relative)
            _say(console, f"and {len(differences) - ROWS} more {kind}; the largest: {_words(most)}")
    if found.largest is not None:
        at, most = found.largest
        _say(console, f"the largest difference is at step {at}: {_words(most)}")


def _row(difference: Difference) -> tuple[str, ...]:
    first, second = _number(difference.first), _number(difference.second)
    kind = "" if difference.kind == "metric" else difference.kind
    return difference.name, kind, first, second, f"{difference.relative:.3g}"


def _words(difference: Difference) -> str:
    name, kind, first, second, relative = _row(difference)
    return f"{name}{' ' if kind else ''}{kind} {first} and {second} ({relative})"


def _number(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else "not finite"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

"""moebius preflight: look at the nodes of a job before it trains."""

import argparse
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from moebius.errors import LaunchError, MoebiusError
from moebius.trainer.commands.arguments import positive, share
from moebius.trainer.config_file import load_config
from moebius.trainer.preflight.check import check
from moebius.trainer.preflight.limits import Limits
from moebius.trainer.preflight.report import FILE_NAME, Report, write_silence
from moebius.trainer.preflight.roll import roll_call

TABLE_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius preflight CONFIG [path.to.option=value ...]`, started like the training."""
    limits = Limits()
    parser.add_argument("config", help="run file, as for moebius train")
    parser.add_argument("overrides", nargs="*", help="options of the file: parallel.tp=2")

    def add(name: str, parse: object, default: float, metavar: str, text: str) -> None:
        parser.add_argument(
            name,
            type=parse,  # type: ignore[arg-type]
            default=default,
            metavar=metavar,
            help=f"{text}; default: {default:g}",
        )

    add("--slow-device", share, limits.slow_device, "SHARE", "least share of the median FLOP/s")
    add("--slow-link", share, limits.slow_link, "SHARE", "least share of an axis' median bandwidth")
    add("--skew", positive, limits.skew, "SECONDS", "that clocks may differ without a warning")
    add("--save", positive, limits.save, "SECONDS", "that a checkpoint may take without a warning")
    add("--wait", positive, limits.wait, "SECONDS", "that a part of the check may take")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Exit code 0 where nothing stops the job, 7 otherwise."""
    limits = Limits(**{name: getattr(arguments, name) for name in Limits.model_fields})
    load = partial(load_config, arguments.config, arguments.overrides)

    def blame(nodes: list[str], line: str) -> None:
        with suppress(MoebiusError, OSError):
            write_silence(Path(load().run_dir), nodes, line)

    with roll_call(limits.wait, blame) as roll:
        report = check(load, limits, roll)
        if report is None:
            return roll.outcome()
        code = _show(report, Path(load().run_dir), console)
        roll.conclude(code)
        return code


def _show(report: Report, folder: Path, console: Console) -> int:
    """Write and print what has been found; the exit code."""
    unwritten = report.write(folder)
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)  # a pipe has no width that a table must fit into
    console.print(report.table())

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    for finding in report.findings:
        say(f"{finding.kind}: {finding.check}: {finding.line}")
    if unwritten:
        say(f"warning: {unwritten}")
    count = len(report.facts)
    verdict = "failed" if report.errors else "passed"
    where = "" if unwritten else f", see {folder / FILE_NAME}"
    say(f"preflight {verdict}: {count} processes in {report.seconds:.1f} s{where}")
    if not report.errors:
        return 0
    more = f" (errors in all: {len(report.errors)})" if len(report.errors) > 1 else ""
    # Not by the command line: a launcher ends all processes as soon as one of them has ended.
    line = LaunchError(f"preflight: {report.errors[0].line}{more}")
    print(f"error: {line}", file=sys.stderr, flush=True)
    return line.exit_code

"""moebius describe: the Program of a config as a table, its parameters and its cost."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moebius.errors import LayoutError
from moebius.files import write_whole
from moebius.model.decoder import Decoder
from moebius.parallel.batch import row_ranges
from moebius.parallel.explain import ring_lines
from moebius.parallel.ring.advice import Job, Machine, Price, gigabytes, prices, recommend
from moebius.parallel.ring.executor import joined, plan_ring
from moebius.parallel.ring.picture import characters, svg
from moebius.parallel.ring.slices import cut_ring
from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.program_table import program_table, summary

TABLE_WIDTH = 100
PLAN_WIDTH = 88
"""characters of a timeline"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius describe CONFIG [path.to.option=value ...]`."""
    parser.add_argument("config", help="run file, for example configs/moepp_mor.yaml")
    parser.add_argument("overrides", nargs="*", help="options of the file: model.hidden_size=512")
    parser.add_argument(
        "--processes", type=int, help="price layouts of so many for a looped block; default: rp"
    )
    parser.add_argument(
        "--memory", type=float, default=80.0, help="GB that a process has; default: 80"
    )
    parser.add_argument(
        "--flops-per-byte",
        type=float,
        default=2000.0,
        help="FLOPs of a process in the time in which it sends a byte; default: 2000",
    )
    parser.add_argument("--timeline", metavar="FILE", help="draw the plan of a ring as SVG")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print visits in order of execution; nothing is allocated, so any size can be described."""
    config = load_config(arguments.config, arguments.overrides)
    with torch.device("meta"):
        decoder = Decoder(config.model)
    job = _job(config, decoder, arguments)
    length = config.data.sequence_length
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)  # a pipe has no width that a table must fit into
    console.print(program_table(decoder, length))
    for line in summary(decoder, length):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if job is not None:
        _print_layouts(config, decoder, job, arguments, console)
    return 0


def _job(config: RunConfig, decoder: Decoder, arguments: argparse.Namespace) -> Job | None:
    """What is priced; raises LayoutError where it cannot be."""
    if arguments.timeline and config.parallel.rp == 1:
        raise LayoutError("--timeline: parallel.rp is 1, so there is no ring", "set parallel.rp=2")
    size = config.parallel.rp if arguments.processes is None else arguments.processes
    if size < 2 and arguments.processes is not None:
        raise LayoutError(f"--processes: {size}; allowed: 2 and more", "leave it out")
    if size < 2:
        return None
    length = config.data.sequence_length
    try:
        cut_ring(decoder, size, length)
    except ValueError as error:
        raise LayoutError(f"--processes: {size}, but {error}", "try fewer") from None
    rows = config.train.micro_batch_size or config.train.batch_size
    number = len(row_ranges(config.train.batch_size, rows, 0, 1))
    return Job(size, number, rows, length, config.train.recompute)


def _print_layouts(
    config: RunConfig,
    decoder: Decoder,
    job: Job,
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    """The plan of a ring, and what so many processes cost in other layouts."""
    parallel = config.parallel
    machine = Machine(arguments.flops_per_byte, 1e9 * arguments.memory)
    lines: list[str] = []
    if parallel.rp > 1:
        ring = cut_ring(decoder, parallel.rp, job.row_length, parallel.ring.costs)
        number = joined(ring, parallel.ring, job.num_micro_batches)
        timeline = plan_ring(ring, parallel.ring, number)
        lines += [*ring_lines(ring), *characters(timeline, PLAN_WIDTH)]
        if arguments.timeline:
            write_whole(Path(arguments.timeline), svg(timeline))
    found = prices(decoder, job, machine, parallel.ring)
    best, reasons = recommend(found, job, machine)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(price_table(found, job))
    recommended = f"recommended: parallel {best.options}; {'; '.join(reasons)}"
    console.print(recommended, highlight=False, markup=False, soft_wrap=True)


def price_table(found: Sequence[Price], job: Job) -> Table:
    """A row per layout; times as parts of the shortest."""
    table = Table(
        title=f"{job.num_ranks} processes, {job.num_micro_batches} x {job.rows} rows, as computed"
    )
    for column in ("parallel", "state", "activations", "sent per step", "waits", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    fastest = min(price.time for price in found)
    for price in found:
        table.add_row(
            price.options,
            gigabytes(price.state_bytes),
            gigabytes(price.activation_bytes),
            gigabytes(price.sent_bytes),
            f"{price.bubble:.1%}",
            f"{price.time / fastest:.2f}",
        )
    return table

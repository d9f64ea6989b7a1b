"""moebius plan: memory, communication and speed of a layout on machines that need not be there."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from functools import partial

from rich.console import Console
from rich.table import Table

from moebius.errors import ConfigError, LayoutError
from moebius.parallel.planner.device import GIGA, DeviceProfile, device_profile
from moebius.parallel.planner.estimate import ROOM, Plan, make_plan
from moebius.parallel.planner.search import search, why_it_loses
from moebius.parallel.planner.simulate import Job
from moebius.trainer.commands.train import check_processes
from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.planning import check_plannable, job_of, layout_problems

AXES = ("dp_replicate", "tp", "cp", "pp", "rp", "ep", "etp")
"""that options of a layout name where they are longer than 1"""
SHOWN_LOSERS = 12
"""layouts that lose, in the table of a search"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius plan CONFIG --gpus N [--device NAME] [--search] [path.to.option=value ...]`."""
    parser.add_argument("config", help="run file, for example configs/published/moepp_7b.yaml")
    parser.add_argument("overrides", nargs="*", help="options of the file, as parallel.ep=8")
    parser.add_argument(
        "--gpus", type=int, help="devices, a process each; default: one node of them"
    )
    parser.add_argument(
        "--device",
        default="h100",
        help="a100, h100, h200, b200, cpu, or a file of moebius calibrate; default: h100",
    )
    parser.add_argument(
        "--search", action="store_true", help="rank the legal layouts of so many devices"
    )
    parser.add_argument("--json", action="store_true", help="print numbers for programs")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Plan and print; returns 0 where it fits, else the exit code of LayoutError."""
    config = load_config(arguments.config, arguments.overrides)
    device = device_profile(arguments.device)
    gpus = arguments.gpus if arguments.gpus is not None else device.devices_per_node
    if gpus < 1:
        raise ConfigError(f"--gpus: {gpus}; allowed: 1 or more")
    check_plannable(config)
    if arguments.search:
        return _search(config, device, gpus, console)
    check_processes(config, gpus)
    began = time.perf_counter()
    plan = make_plan(job_of(config, gpus, device.kind), device)
    if arguments.json:
        console.print_json(json.dumps(numbers(plan)))
        return 0 if plan.fits else LayoutError.exit_code
    show(plan, console)
    _say(console, f"planned in {time.perf_counter() - began:.1f} s")
    return 0 if plan.fits else LayoutError.exit_code


def show(plan: Plan, console: Console) -> None:
    """Tables of memory and communication, the step, and what was assumed."""
    job, device = plan.job, plan.device
    _say(
        console,
        f"{plan.num_parameters / 1e6:,.1f} M parameters on {job.world_size} x {device.name}, "
        f"{job.rows * job.row_length:,} tokens in a step: {options_of(job)}",
    )
    memory = _table("memory of the fullest process", "GB")
    for name, size in memory_rows(plan):
        memory.add_row(name, f"{size / GIGA:,.2f}")
    console.print(memory)
    if plan.exchanges:
        console.print(_exchange_table(plan))
    step = _table("step", "")
    for name, text in _step_rows(plan):
        step.add_row(name, text)
    console.print(step)
    for line in plan.assumptions():
        _say(console, f"assumed: {line}")
    room = ROOM * device.memory / GIGA
    verdict = "fits into" if plan.fits else "does NOT fit into"
    _say(console, f"{plan.total_bytes / GIGA:,.2f} GB {verdict} the {room:,.1f} GB of a device")


def memory_rows(plan: Plan) -> list[tuple[str, int]]:
    """Bytes by kind; they add up to the last."""
    memory = plan.memory
    rest = "scratch of the update" if plan.is_in_update else "activations"
    buffers = "tokens on the ring and other buffers" if plan.job.parallel.rp > 1 else "buffers"
    return [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        (rest, memory.activations - memory.exchanged),
        (f"{buffers} of communication", memory.exchanged),
        ("headroom for uneven experts", plan.total_bytes - memory.total),
        ("all", plan.total_bytes),
    ]


def _exchange_table(plan: Plan) -> Table:
    table = Table(title="sent by a process in a step", title_justify="left")
    for column in ("axis", "operation", "processes", "calls", "MB", "link", "ms", ""):
        justify = "left" if column in ("axis", "operation", "link", "") else "right"
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for e in plan.exchanges:
        table.add_row(
            e.axis,
            e.operation,
            str(e.size),
            f"{e.calls:,}",
            f"{e.sent / 1e6:,.2f}",
            "network" if e.across_nodes else "node",
            f"{1000 * e.seconds:,.2f}",
            "hidden" if e.is_hidden else "",
        )
    return table


def _step_rows(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("FLOPs of the model", f"{plan.flops.model:.3g}"),
        ("FLOPs computed again", f"{plan.flops.again:.3g}"),
        ("computing", f"{plan.compute_seconds:.4g} s"),
        ("waiting for other stages", f"{plan.idle_seconds:.4g} s ({plan.idle_share:.1%} idle)"),
        ("communication that shows", f"{plan.exchange_seconds:.4g} s"),
        ("update of weights", f"{plan.update_seconds:.4g} s"),
        ("step", f"{plan.step_seconds:.4g} s"),
        ("MFU", f"{plan.mfu:.1%}"),
        ("tokens per day", f"{plan.tokens_per_day:.3g}"),
        ("checkpoint", f"{plan.checkpoint_bytes / GIGA:,.2f} GB, {plan.save_seconds:.3g} s"),
        (
            "checkpoint every (Young-Daly)",
            f"{plan.save_interval / 60:,.0f} min: checkpoint.interval="
            f"{max(1, round(plan.save_interval / plan.step_seconds))}",
        ),
    ]


def numbers(plan: Plan) -> dict[str, object]:
    """All of a plan."""
    return {
        "device": plan.device.name,
        "gpus": plan.job.world_size,
        "layout": options_of(plan.job),
        "parameters": plan.num_parameters,
        "rank": plan.usage.rank,
        "memory_bytes": dict(memory_rows(plan)),
        "fits": plan.fits,
        "exchanges": [asdict(exchange) for exchange in plan.exchanges],
        "flops": plan.flops.model,
        "flops_again": plan.flops.again,
        "idle_share": plan.idle_share,
        "compute_seconds": plan.compute_seconds,
        "idle_seconds": plan.idle_seconds,
        "exchange_seconds": plan.exchange_seconds,
        "update_seconds": plan.update_seconds,
        "step_seconds": plan.step_seconds,
        "mfu": plan.mfu,
        "tokens_per_day": plan.tokens_per_day,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "save_seconds": plan.save_seconds,
        "save_interval_seconds": plan.save_interval,
        "assumptions": list(plan.assumptions()),
    }


def _search(config: RunConfig, device: DeviceProfile, gpus: int, console: Console) -> int:
    began = time.perf_counter()
    more = partial(layout_problems, config)
    found = search(job_of(config, gpus, device.kind), device, more)
    table = Table(title=f"layouts of {gpus} x {device.name}, simulated", title_justify="left")
    for column in ("", "options", "GB", "step s", "MFU", "idle"):
        table.add_column(column, justify="left" if column in ("", "options") else "right")
    for number, candidate in enumerate(found.ranked, start=1):
        plan = candidate.plan
        assert plan is not None
        table.add_row(
            str(number),
            options_of(candidate.job),
            f"{plan.total_bytes / GIGA:,.1f}",
            f"{plan.step_seconds:.4g}",
            f"{plan.mfu:.1%}",
            f"{plan.idle_share:.1%}",
        )
    if found.ranked:
        console.print(table)
    _say(console, "why others lose (prices of those that were not simulated are rough):")
    best = found.ranked[0] if found.ranked else found.others[0]
    for candidate in found.others[:SHOWN_LOSERS]:
        reason = why_it_loses(candidate, best, device)
        _say(console, f"  {options_of(candidate.job)}: {reason}")
    for reason, count in sorted(found.refused.items(), key=lambda item: -item[1])[:SHOWN_LOSERS]:
        _say(console, f"  refused, {count} times: {reason}")
    _say(console, f"searched in {time.perf_counter() - began:.1f} s")
    if not found.ranked:
        _say(console, f"no layout of {gpus} x {device.name} fits")
        return LayoutError.exit_code
    return 0


def options_of(job: Job) -> str:
    """A layout as options of the command line."""
    config = job.parallel
    axes = {axis: getattr(config, axis) for axis in AXES}
    words = [f"parallel.{axis}={size}" for axis, size in axes.items() if size > 1]
    words.append(f"parallel.data={config.data}")
    words.append(f"train.micro_batch_size={job.micro_batch_size}")
    return " ".join([*words, f"train.recompute={job.recompute}"])


def _table(title: str, unit: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", justify="left")
    table.add_column(unit, justify="right")
    return table


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

"""moebius train: prepare the corpus, train, say what to do next."""

import argparse
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.distributed_c10d import Store

from moebius.data.prepare import prepare
from moebius.data.quarantine import find_bad_shards
from moebius.data.stream import TrainStream
from moebius.errors import LayoutError
from moebius.parallel.batch import row_ranges
from moebius.parallel.explain import explain
from moebius.parallel.mesh import Axes
from moebius.parallel.schedule import plan
from moebius.parallel.world import (
    check_alike,
    from_main,
    is_main,
    joined,
    main_first,
    rank,
    world_size,
)
from moebius.trainer.callbacks.audit import AuditCallback
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.callbacks.checkpointing import CheckpointCallback
from moebius.trainer.callbacks.console import ConsoleCallback
from moebius.trainer.callbacks.evaluation import EvaluationCallback
from moebius.trainer.callbacks.events import EventLog
from moebius.trainer.callbacks.goodput import GoodputCallback
from moebius.trainer.callbacks.guard import GuardCallback
from moebius.trainer.callbacks.interrupt import FOR_GOOD, InterruptCallback, reason
from moebius.trainer.callbacks.metrics import MetricsCallback
from moebius.trainer.callbacks.pictures import PicturesCallback
from moebius.trainer.callbacks.profiler import ProfilerCallback
from moebius.trainer.callbacks.routing_recorder import RoutingRecorder
from moebius.trainer.callbacks.sinks import JsonlSink, TensorBoardSink
from moebius.trainer.callbacks.trace import TraceCallback
from moebius.trainer.callbacks.wandb import WandbSink, import_wandb
from moebius.trainer.commands.arguments import whole
from moebius.trainer.commands.preparing import workshop
from moebius.trainer.config import RunConfig, settings
from moebius.trainer.config_file import load_config
from moebius.trainer.cpu import prepare_cpu
from moebius.trainer.folder import check_folder, claim_folder, lock_folder
from moebius.trainer.loop import train
from moebius.trainer.machine import select_device
from moebius.trainer.planning import planned_bytes
from moebius.trainer.recovery.faults import FaultInjector
from moebius.trainer.resume import resume
from moebius.trainer.run import Run
from moebius.trainer.standing import Standing, failures_noted, write_standing
from moebius.trainer.watch.profile import check_memory, check_ranks
from moebius.trainer.watch.progress import Progress
from moebius.trainer.watch.session import watched

STOPPED = 75
"""exit code of a run that was stopped and saved: EX_TEMPFAIL of sysexits.h, try again"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius train CONFIG [path.to.option=value ...]`."""
    parser.add_argument("config", help="run file, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="options of the file, as optim.lr=3e-4")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on with a run_dir of another config; the weights must still fit",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print nothing but errors; logs are written as ever"
    )
    parser.add_argument(
        "--stopped-exit-code",
        type=whole(0, 255),
        default=STOPPED,
        metavar="N",
        help=f"when it was stopped and has saved; default: {STOPPED}. Launchers that start again "
        "what has failed need 0",
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Train to the last step (exit code 0), or until it is stopped and saved (75)."""
    config = load_config(arguments.config, arguments.overrides)
    with failures_noted(Path(config.run_dir)):
        return _join(config, arguments, console)


def _join(config: RunConfig, arguments: argparse.Namespace, console: Console) -> int:
    """Connect the processes, and train."""
    check_processes(config, world_size())
    if config.log.wandb is not None:
        import_wandb()
    device = select_device(config.train.device)
    check_memory(config.profile, device)
    prepared: list[str] = []
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        prepared += prepare_cpu(config.cpu, config.train.precision)
    with (
        watched(config.watchdog, Path(config.run_dir) / "watchdog") as progress,
        joined(device, config.parallel.timeout) as store,
    ):
        injector = FaultInjector(config.faults, config.run_dir, progress) if config.faults else None
        check_alike("settings", settings(config), store)
        return _train(config, arguments, console, store, progress, injector, prepared)


def check_processes(config: RunConfig, count: int) -> None:
    """Raise LayoutError where so many processes cannot hold the layout or its pipeline, or lack one
    that is to be profiled."""
    check_ranks(config.profile, count)
    sizes, rows = Axes.of(config.parallel, count).dense, config.train.batch_size
    dp = sizes["dp_replicate"] * sizes["dp_shard"]
    if dp > rows:
        raise LayoutError(
            f"train.batch_size: {rows}, but there are {dp} data-parallel processes",
            "start fewer, or raise train.batch_size",
        )
    if config.parallel.pp == 1:
        return
    shares = row_ranges(rows, config.train.micro_batch_size or rows, 0, dp)
    pipeline = config.parallel.pipeline
    try:
        plan(pipeline.schedule, config.parallel.pp, pipeline.stages_per_rank, len(shares))
    except ValueError as error:
        raise LayoutError(
            f"parallel.pipeline: {error}",
            "change train.batch_size or train.micro_batch_size, or the schedule",
        ) from None


def _train(
    config: RunConfig,
    arguments: argparse.Namespace,
    console: Console,
    store: Store | None,
    progress: Progress,
    injector: FaultInjector | None,
    prepared: Sequence[str],
) -> int:
    """What each process does; one of them writes and prints."""
    console = console if is_main() and not arguments.quiet else Console(quiet=True)
    if not arguments.allow_changes:
        check_folder(config)
    say = partial(_print, console)
    with progress.section("prepare"), workshop(console) as tools:
        corpora = main_first(lambda: prepare(config.data, config.model.vocab_size, tools), store)
    check_alike("corpus", {"data": corpora.fingerprint}, store)
    quarantined = {}
    if config.data.bad_shards == "quarantine":
        with progress.section("prepare"):
            quarantined = from_main("quarantine", lambda: find_bad_shards(corpora, say), store)
    planned = None
    if config.log.plan:
        with progress.section("prepare"):
            kind = select_device(config.train.device).type
            planned = from_main("plan", lambda: planned_bytes(config, world_size(), kind), store)
        if planned is None:
            say("log.plan: the simulation was killed, there is no planned memory")
    callbacks = callbacks_of(config, console, planned)
    training = Run(config, corpora, callbacks, quarantined, progress)
    if injector is not None:
        injector.attach(training)
    if quarantined and isinstance(training.stream, TrainStream):
        count = sum(reader.count_substituted() for reader in training.stream.readers)
        total = sum(training.stream.num_samples)
        say(f"quarantined: others stand in for {count:,} of {total:,} training samples")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    rows = config.train.batch_size
    layout = explain(training.layout, processes, rows, config.train.micro_batch_size or rows)
    for line in (*prepared, training.kernel_names, *layout):
        say(line)
    # Only now: a run that could not be built leaves no trace in the folder.
    with lock_folder(training.folder) if is_main() else nullcontext():
        before = resume(training, arguments.allow_changes)
        if before is not None and before.train.batch_size != rows:
            say(
                f"train.batch_size: {before.train.batch_size} -> {rows} after step "
                f"{training.step}; schedules count steps"
            )
        if is_main():
            claim_folder(config)
            write_standing(training.folder, standing(training, ended=False))
        try:
            train(training)
        finally:
            training.stream.close()
        if is_main():
            write_standing(training.folder, standing(training, ended=True))
    for line in farewell(training, shlex.join([arguments.config, *arguments.overrides])):
        say(line)
    complete = training.step == config.train.num_steps
    return 0 if complete else int(arguments.stopped_exit_code)


def standing(run: Run, ended: bool) -> Standing:
    """How a run stands before and after its training."""
    step, last = run.step, run.config.train.num_steps
    if not ended:
        return Standing("running", True, step=step, num_steps=last)
    if step == last:
        return Standing("complete", False, step=step, num_steps=last)
    code = run.agreed["stop"]
    return Standing("stopped", code not in FOR_GOOD, reason(code), step, last)


def callbacks_of(config: RunConfig, console: Console, planned: int | None = None) -> list[Callback]:
    """What surrounds the training on this process; `planned` are the bytes that it should need."""
    callbacks: list[Callback] = [
        InterruptCallback(),
        GuardCallback(config.recovery),
        MetricsCallback(planned),
        EvaluationCallback(),
        CheckpointCallback(),
    ]
    if is_main():
        callbacks += [
            ConsoleCallback(console),
            EventLog(),
            GoodputCallback(),
            JsonlSink(),
            TensorBoardSink(),
            PicturesCallback(),
            RoutingRecorder(),
        ]
    if config.log.wandb is not None:
        callbacks.append(WandbSink(config.log.wandb))
    if config.log.audit:
        callbacks.append(AuditCallback())
    if config.log.trace:
        callbacks.append(TraceCallback())
    if config.profile is not None and config.profile.chooses(rank()):
        callbacks.append(ProfilerCallback(config.profile, console))
    return callbacks


def farewell(run: Run, words: str) -> Iterator[str]:
    """Lines that say what has been done and what comes next; `words` started the run."""
    folder, last = run.folder, run.config.train.num_steps
    yield f"curves:   tensorboard --logdir {folder / 'tensorboard'}"
    if run.step < last:
        yield f"stopped at step {run.step} of {last}: {reason(run.agreed['stop'])}"
    else:
        yield f"generate: moebius generate {folder} --prompt 'def '"
        yield f"evaluate: moebius evaluate {folder}"
    yield (f"resume:   moebius train {words}   (continues after step {run.step} from {folder})")


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

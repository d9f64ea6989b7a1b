"""moebius checkpoints: list, verify, prune or average the checkpoints of a run."""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from moebius.errors import CheckpointError, ConfigError
from moebius.model.decoder import Decoder
from moebius.trainer.checkpoint.average import average, check_alike
from moebius.trainer.checkpoint.commit import CommitRecord
from moebius.trainer.checkpoint.loader import (
    Checkpoint,
    Refused,
    files_of,
    newest_sound,
    open_checkpoint,
    verify,
)
from moebius.trainer.checkpoint.plan import check_index
from moebius.trainer.checkpoint.retention import outdated
from moebius.trainer.checkpoint.saver import validation_losses
from moebius.trainer.checkpoint.storage import DAMAGED, LocalStorage, Storage
from moebius.trainer.checkpoint.tensors import model_shapes
from moebius.trainer.commands.arguments import whole
from moebius.trainer.config import CheckpointConfig, RunConfig
from moebius.trainer.folder import CONFIG_NAME, claim_folder, lock_folder
from moebius.trainer.recovery.crashes import crashed
from moebius.trainer.restore import open_folder

RULES = ("keep", "keep_every", "keep_best")
"""options of the config that say which checkpoints stay"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius checkpoints list|verify|prune|average RUN ...`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, title: str, function: Callable[..., int]) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=title, description=title)
        found.add_argument("run", type=Path, help="run folder")
        found.set_defaults(function=function)
        return found

    listed = action("list", "what there is, oldest first; no weights are read", _list)
    listed.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    verified = action("verify", "read every byte and compare it with what was committed", _verify)
    verified.add_argument("--step", type=whole(0), help="only this one", metavar="N")
    pruned = action("prune", "delete outdated checkpoints and what is none", _prune)
    pruned.add_argument(
        "--keep", type=whole(1), help="newest ones that stay; default: the run's", metavar="N"
    )
    pruned.add_argument(
        "--keep-every",
        type=whole(1),
        help="those of steps that this divides stay, too; default: the run's",
        metavar="N",
    )
    pruned.add_argument(
        "--keep-best",
        type=whole(0),
        help="so many with the lowest validation loss stay, too; default: the run's",
        metavar="N",
    )
    pruned.add_argument("--dry-run", action="store_true", help="only say what would go")
    averaged = action("average", "a new run that begins with the mean of weights", _average)
    averaged.add_argument("out", type=Path, help="folder of the new run")
    which = averaged.add_mutually_exclusive_group(required=True)
    which.add_argument("--steps", type=whole(0), nargs="+", help="checkpoints", metavar="N")
    which.add_argument("--last", type=whole(2), help="so many newest checkpoints", metavar="N")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Do what the action says."""
    action: Callable[[argparse.Namespace, Callable[[str], None], Console], int]
    action = arguments.function
    return action(arguments, lambda line: console.out(line, highlight=False), console)


def _list(arguments: argparse.Namespace, say: Callable[[str], None], console: Console) -> int:
    config, storage = open_folder(arguments.run)
    rows = [described(storage, step) for step in storage.steps()]
    starts = {row["step"]: crashed(arguments.run, row["step"]) for row in rows}
    starts = {step: count for step, count in starts.items() if count}
    remains = storage.remains()
    if arguments.json:
        lines = [{"kind": "checkpoint", **row} for row in rows]
        lines += [{"kind": "remains", "name": name, "state": _kind(name)} for name in remains]
        lines += [{"kind": "starts", "step": s, "count": count} for s, count in starts.items()]
        for line in lines:
            say(json.dumps(line))
        return 0
    if rows:
        say(storage.location)
        console.print(_table(rows))
    else:
        say(f"'{arguments.run}' has no checkpoint yet")
    for row in rows:
        if row["reason"]:
            say(f"step {row['step']}: unreadable: {row['reason']}")
    for name in remains:
        say(f"{_kind(name)}: {name}")
    for step, count in starts.items():
        say(
            f"{count} {'start' if count == 1 else 'starts'} from step {step} crashed at the same "
            f"step; after {config.checkpoint.max_crashes} an older one is used"
        )
    return 0


def described(storage: Storage, step: int) -> dict[str, Any]:
    """A checkpoint by its record and its index; where one is damaged, `reason` says how."""
    row: dict[str, Any] = {"step": step, "written": storage.written(step)}
    try:
        record = open_checkpoint(storage, step).record
    except CheckpointError as error:
        return row | {"state": "unreadable", "reason": _reason(storage, step, error)}
    loss = record.evaluation
    return row | {
        "state": "readable",
        "reason": None,
        "tokens": record.tokens,
        # JSON has no word for numbers that are not finite.
        "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
        "processes": record.processes,
        "bytes": _size(record),
        "files": len(record.files),
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """Without lines and dates, so that numbers of large runs fit into 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("step", "tokens", "loss", "processes", "size", "files", "age", "state"):
        table.add_column(column, justify="right", no_wrap=True)
    now = time.time()
    for row in rows:
        numbers = [""] * 5
        if row["reason"] is None:
            loss = row["validation_loss"]
            numbers = [
                f"{row['tokens']:,}",
                "" if loss is None else f"{loss:.4f}",
                str(row["processes"]),
                decimal(row["bytes"]),
                str(row["files"]),
            ]
        age = "" if row["written"] is None else duration(now - row["written"])
        table.add_row(str(row["step"]), *numbers, age, row["state"])
    return table


def duration(seconds: float) -> str:
    """Roughly, in the unit that says most."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < size * limit:
            return f"{max(seconds, 0) // size:.0f} {unit}"
    return f"{seconds // 86400:.0f} d"


def _kind(name: str) -> str:
    """Of something that is no checkpoint."""
    if name.endswith(DAMAGED):
        return "set aside"
    return "unfinished" if name.endswith(".tmp") else "unfinished or set aside"


def _reason(storage: Storage, step: int, error: CheckpointError) -> str:
    """What an error says of a checkpoint, without its name."""
    return str(error).removeprefix(f"checkpoint '{storage.name(step)}': ")


def _size(record: CommitRecord) -> int:
    return sum(entry.size for entry in record.files.values())


def _verify(arguments: argparse.Namespace, say: Callable[[str], None], _console: Console) -> int:
    _, storage = open_folder(arguments.run)
    there = storage.steps()
    if not there:
        raise CheckpointError(f"'{arguments.run}' has no checkpoint yet")
    steps = there if arguments.step is None else [arguments.step]
    check_steps("--step", steps, there)
    damaged = []
    for step in steps:
        try:
            record = sound(storage, step).record
        except CheckpointError as error:
            if step not in storage.steps():
                say(f"step {step}: deleted meanwhile, by the run")
                continue
            damaged.append(step)
            say(f"step {step}: {_reason(storage, step, error)}")
        else:
            say(f"step {step}: sound ({len(record.files)} files, {decimal(_size(record))})")
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(steps)} checkpoints in '{storage.location}' damaged: "
            f"{_words(damaged)}",
            "restore their files or delete them; a run that is continued passes over them",
        )
    return 0


def sound(storage: Storage, step: int, kinds: Sequence[str] | None = None) -> Checkpoint:
    """A checkpoint of which all files, or those of some kinds, are verified.

    Raises CheckpointError for the first that is damaged.
    """
    found = open_checkpoint(storage, step)
    verify(found, sorted(found.record.files) if kinds is None else files_of(found.record, kinds))
    return found


def check_steps(option: str, steps: Sequence[int], there: Sequence[int]) -> None:
    """Raise CheckpointError where some steps have no checkpoint."""
    missing = [step for step in steps if step not in there]
    if missing:
        raise CheckpointError(
            f"{option}: {_words(missing)}; there are checkpoints of {_words(there) or 'no step'}"
        )


def _words(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _prune(arguments: argparse.Namespace, say: Callable[[str], None], _console: Console) -> int:
    config, storage = open_folder(arguments.run)
    given = {name: getattr(arguments, name) for name in RULES}
    rules = config.checkpoint.model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )
    with lock_folder(arguments.run):
        steps = storage.steps()
        good = [s for s in steps if crashed(arguments.run, s) < config.checkpoint.max_crashes]
        gone, refused = going(storage, steps, good or steps, rules)
        for step, reason in refused:
            say(f"step {step}: stays, but does not count: {reason}")
        verb = "would be deleted" if arguments.dry_run else "deleted"
        # First, for a checkpoint that is being removed takes the name of an unfinished one.
        for name in storage.remains() if arguments.dry_run else storage.remove_remains():
            say(f"{name} ({_kind(name)}): {verb}")
        for step in gone:
            row = described(storage, step)
            if not arguments.dry_run:
                storage.remove(step)
            say(f"step {step} ({row['reason'] or decimal(row['bytes'])}): {verb}")
    say(f"kept: {_words([step for step in steps if step not in gone]) or 'nothing'}")
    return 0


def going(
    storage: Storage, steps: Sequence[int], usable: Sequence[int], rules: CheckpointConfig
) -> tuple[list[int], Refused]:
    """Steps whose checkpoints are outdated, and damaged ones, which do not count.

    The newest sound one of those that are `usable` is never outdated, nor are damaged ones that are
    newer. Raises CheckpointError where there are some, and none is sound.
    """
    found, refused = newest_sound(storage, usable)
    if found is None:
        return [], refused
    counted = [step for step in steps if step not in dict(refused)]
    losses = validation_losses(storage, counted) if rules.keep_best else {}
    gone = outdated(counted, losses, rules.keep, rules.keep_every, rules.keep_best)
    return [step for step in gone if step != found.record.step], refused


def _average(arguments: argparse.Namespace, say: Callable[[str], None], _console: Console) -> int:
    config, storage = open_folder(arguments.run)
    steps = _chosen(arguments, storage.steps())
    checkpoints = [sound(storage, step, ("model",)) for step in steps[:-1]]
    checkpoints.append(sound(storage, steps[-1]))
    with torch.device("meta"):
        decoder = Decoder(config.model)
    check_index(checkpoints[-1].index, model_shapes(decoder), ("model",))
    check_alike(checkpoints)
    names = {f"model/{name}" for name, _ in decoder.named_parameters(remove_duplicate=False)}
    moved = moved_config(config, arguments.out)
    with new_folder(arguments.out), lock_folder(arguments.out):
        target = LocalStorage(arguments.out / "checkpoints")
        average(checkpoints, names, _record(checkpoints[-1], moved), target)
        claim_folder(moved)
    say(f"averaged steps {_words(steps)} of '{arguments.run}' to '{arguments.out}'")
    say(f"evaluate: moebius evaluate {arguments.out}")
    again = f"moebius train {arguments.out / CONFIG_NAME}"
    say(f"train:    {again}   (continues after step {steps[-1]})")
    return 0


def _chosen(arguments: argparse.Namespace, there: Sequence[int]) -> list[int]:
    """Steps to be averaged, lowest first."""
    if arguments.last is not None:
        if len(there) < arguments.last:
            raise CheckpointError(
                f"--last: {arguments.last}, but there are {len(there)} checkpoints: "
                f"{_words(there) or 'none'}"
            )
        return list(there[-arguments.last :])
    steps = sorted(set(arguments.steps))
    check_steps("--steps", steps, there)
    if len(steps) < 2:
        raise ConfigError(
            f"--steps: {_words(arguments.steps)}; allowed: two or more different ones of "
            f"{_words(there)}"
        )
    return steps


def moved_config(config: RunConfig, folder: Path) -> RunConfig:
    """That of the same run in another folder, which has its checkpoints, too."""
    places = {
        "run_dir": str(folder),
        "checkpoint": config.checkpoint.model_copy(update={"dir": None}),
    }
    return config.model_copy(update=places)


def _record(newest: Checkpoint, config: RunConfig) -> CommitRecord:
    """That of the mean: nobody has evaluated it."""
    tree = config.model_dump(mode="json")
    places = {name: tree[name] for name in ("run_dir", "checkpoint")}
    return newest.record.model_copy(
        update={"config": newest.record.config | places, "evaluation": None}
    )


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Make a folder, which is deleted where what follows fails.

    Raises CheckpointError where it exists.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise CheckpointError(f"'{path}' exists", "choose another folder or delete it") from None
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise

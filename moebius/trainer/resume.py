"""Going on from a checkpoint: at the start of a process, and where a run goes back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from moebius.errors import CheckpointError
from moebius.parallel.together import from_first, patiently, together
from moebius.parallel.world import agree, is_main, world_size
from moebius.trainer.checkpoint.loader import Checkpoint, Refused, fill, newest_sound
from moebius.trainer.checkpoint.plan import KINDS, check_index
from moebius.trainer.checkpoint.tensors import model_shapes, optimizer_shapes
from moebius.trainer.config import RunConfig, depends_on_micro_batch
from moebius.trainer.folder import check_mixture, check_same_run, differences
from moebius.trainer.optim import muon_roles
from moebius.trainer.recovery.crashes import crashed

if TYPE_CHECKING:
    from moebius.trainer.run import Run


def resume(run: Run, allow_changes: bool = False) -> RunConfig | None:
    """Go on from the newest sound checkpoint, whose config is given; a folder without one starts
    from the beginning. A collective call.

    A checkpoint is passed over that is damaged, or from which the run has crashed too often. With
    `allow_changes` its config may differ. Raises CheckpointError where none of several is left.
    """
    with run.progress.section("load"):
        steps = together(run.storage.steps, CheckpointError)
        newest = steps[-1] if steps else -1
        lowest, highest = -agree(-newest), agree(newest)
        if lowest != highest:
            raise CheckpointError(
                f"run_dir: processes see different checkpoints in '{run.folder}', the newest of "
                f"step {lowest} and of step {highest}",
                "run_dir has to be one folder for all nodes",
            )
        poisoned = from_first([(step, _poison(run, step)) for step in steps])
        found = load(
            run,
            [step for step, reason in poisoned if not reason],
            [(step, reason) for step, reason in poisoned if reason],
            allow_changes,
        )
    changes = differences(run.config, found) if found is not None else []
    if changes:  # which were allowed
        run.tell("changed", "; ".join(changes))
    return found


def _poison(run: Run, step: int) -> str:
    """Why a checkpoint is not to be used although it may be sound; empty where it is."""
    count = crashed(run.folder, step)
    if count < run.config.checkpoint.max_crashes:
        return ""
    return (
        f"checkpoint '{run.storage.name(step)}': {count} starts from it have crashed at the same "
        "step (checkpoint.max_crashes)"
    )


def load(
    run: Run, steps: list[int], refused: Refused, allow_changes: bool = False
) -> RunConfig | None:
    """Load the newest sound checkpoint of some steps, see `resume`.

    Newer ones that were passed over, `refused` among them, no longer count: the run will come to
    their steps again.
    """
    if refused and not steps:
        raise CheckpointError(
            f"no checkpoint is left; {refused[-1][1]}",
            "find out why, then raise checkpoint.max_crashes to use it again",
        )
    checkpoint, passed = newest_sound(run.storage, steps, run.progress.mark)
    if checkpoint is None:
        return None
    found = check(run, checkpoint, allow_changes)
    _take(run, checkpoint)
    for step, reason in [*refused, *passed]:
        if step > run.step:
            together(partial(_set_aside, run, step), CheckpointError)
            run.tell("walked back", f"{reason}; going on from step {run.step} instead")
    return found


def _take(run: Run, checkpoint: Checkpoint) -> None:
    """Take up all that a checkpoint holds; a collective call."""
    record, parts = checkpoint.record, run.layout.parts()
    patiently(
        lambda: fill(checkpoint, parts, lambda: run.announce("load", "read")),
        CheckpointError,
        run.progress.mark,
    )
    run.layout.engine.take_over(parts)
    run.step = record.step
    run.skipped, run.rewound = list(record.skipped), list(record.rewound)
    run.stream.load(record.position, record.stream)
    for callback in run.callbacks:
        callback.load_state_dict(record.callbacks.get(callback.name, {}))


def _set_aside(run: Run, step: int) -> None:
    if is_main():
        run.storage.set_aside(step)


def check(run: Run, checkpoint: Checkpoint, allow_changes: bool) -> RunConfig:
    """The config of a checkpoint. Raises CheckpointError where it is not one of this run."""
    record, name = checkpoint.record, checkpoint.name
    try:
        found = RunConfig.model_validate(record.config)
    except ValueError as error:
        raise CheckpointError(f"checkpoint '{name}': its config is damaged") from error
    if not allow_changes:
        check_same_run(run.config, found, name)
        check_mixture(run.config, found, record.tokens)
        if record.corpus != run.corpus:
            raise CheckpointError(
                f"checkpoint '{name}' was not trained on the corpus '{run.config.data.dir}'",
                "name the data.dir it was trained on, another run_dir, or --allow-changes",
            )
    if record.processes != world_size() and depends_on_micro_batch(run.config.model):
        raise CheckpointError(
            f"checkpoint '{name}' was trained by {record.processes} processes, and a scope "
            f"of the model is micro_batch; there are {world_size()}",
            "start as many",
        )
    if record.step and record.teacher != run.teacher_weights:
        raise CheckpointError(
            f"checkpoint '{name}' was distilled from other weights than those of "
            "distillation.teacher",
            "name the teacher and the step it was trained with, or another run_dir",
        )
    of_muon = muon_roles(run.config.optim)
    wanted = model_shapes(run.blueprint) | optimizer_shapes(run.blueprint, of_muon)
    check_index(checkpoint.index, wanted, KINDS)
    return found

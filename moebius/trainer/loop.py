"""The training loop."""

from moebius.trainer.callbacks.base import StepReport
from moebius.trainer.optim import set_lr
from moebius.trainer.recovery.repeat import compare_repeated, due
from moebius.trainer.recovery.rewind import Rewind
from moebius.trainer.run import Run
from moebius.trainer.schedules import lr_ratio


def train(run: Run) -> None:
    """Step until the run is complete or all processes have agreed to stop.

    Where a callback asks for it, the run goes back to a checkpoint and on from there.
    """
    while True:
        try:
            return _train(run)
        except Rewind as fault:
            run.rewind(fault)


def _train(run: Run) -> None:
    try:
        with run.progress.section("step"):
            for callback in run.callbacks:
                callback.on_start(run)
            run.agree()
            while run.step < run.config.train.num_steps and not run.agreed["stop"]:
                advance(run)
            for callback in run.callbacks:
                callback.on_end(run)
    except Rewind:
        run.saver.settle()  # the run may want to go back to what is being written
        raise
    finally:
        run.saver.abandon()
        for callback in reversed(run.callbacks):
            callback.close()


def advance(run: Run) -> None:
    """One step, and all that callbacks do around it."""
    for callback in run.callbacks:
        callback.on_step_start(run)
    report = train_step(run)
    run.step += 1
    for callback in run.callbacks:
        callback.on_step_end(run, report)
    run.agree()


def train_step(run: Run) -> StepReport:
    """One optimizer step on the next batch of the stream."""
    config = run.config
    size = config.train.batch_size
    sample_ids = range(run.stream.position, run.stream.position + size)
    ranges = run.layout.row_ranges(size, config.train.micro_batch_size or size)
    with run.progress.section("data"):
        taken = run.stream.take(ranges)
    run.progress.mark("forward", run.step)
    micro_batches = [batch.to(run.device) for batch in taken]
    num_labels = size * config.data.sequence_length
    if due(config.recovery.repeat_interval, run.step):
        compare_repeated(run, micro_batches, num_labels)
    result = run.layout.accumulate_gradients(
        micro_batches, num_labels, run.step_context, run.teacher
    )
    lr = config.optim.lr * lr_ratio(config.optim.schedule, run.step, config.train.num_steps)
    set_lr(run.layout.engine.optimizer, lr)
    run.progress.mark("optimizer")
    loss = result.losses["loss"]
    unsound = ~(loss.isfinite() & (loss <= run.loss_limit))
    # Copies of a loss may differ in their last bit; what is done about it must not.
    sound = run.layout.mesh.world.all_reduce(unsound.float()) == 0
    grad_norm = run.layout.engine.step(config.optim.clip_norm, sound)
    applied = sound & grad_norm.isfinite()
    run.decoder.update_routers(result.ledger, run.step, applied)
    return StepReport(result.losses, grad_norm, applied, lr, result.ledger, sample_ids, taken)

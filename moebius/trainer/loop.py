"""The training loop."""

from moebius.parallel.world import agree
from moebius.trainer.callbacks.base import StepReport
from moebius.trainer.optim import set_lr
from moebius.trainer.run import Run
from moebius.trainer.schedules import lr_ratio


def train(run: Run) -> None:
    """Step until the run is complete or a stop was asked for."""
    try:
        for callback in run.callbacks:
            callback.on_start(run)
        run.stop_signal = agree(run.asked_to_stop or 0) or None
        while run.step < run.config.train.num_steps and run.stop_signal is None:
            for callback in run.callbacks:
                callback.on_step_start(run)
            report = train_step(run)
            run.step += 1
            for callback in run.callbacks:
                callback.on_step_end(run, report)
            run.stop_signal = agree(run.asked_to_stop or 0) or None
        for callback in run.callbacks:
            callback.on_end(run)
    finally:
        for callback in reversed(run.callbacks):
            callback.close()


def train_step(run: Run) -> StepReport:
    """One optimizer step on the next batch of the stream."""
    config = run.config
    size = config.train.batch_size
    sample_ids = range(run.stream.position, run.stream.position + size)
    ranges = run.layout.row_ranges(size, config.train.micro_batch_size or size)
    taken = run.stream.take(ranges)
    micro_batches = [batch.to(run.device) for batch in taken]
    num_labels = size * config.data.sequence_length
    result = run.layout.accumulate_gradients(
        micro_batches, num_labels, run.step_context, run.teacher
    )
    lr = config.optim.lr * lr_ratio(config.optim.schedule, run.step, config.train.num_steps)
    set_lr(run.layout.engine.optimizer, lr)
    grad_norm = run.layout.engine.step(config.optim.clip_norm)
    run.decoder.update_routers(result.ledger, run.step)
    read = [sample for batch in taken for sample in batch.sample_ids_B.tolist()]
    return StepReport(result.losses, grad_norm, lr, result.ledger, sample_ids, read)

"""The training loop."""

from moebius.trainer.callbacks.base import StepReport
from moebius.trainer.optim import clip_gradients, set_lr
from moebius.trainer.run import Run
from moebius.trainer.schedules import lr_ratio


def train(run: Run) -> None:
    """Step until the run is complete or a stop was asked for."""
    try:
        for callback in run.callbacks:
            callback.on_start(run)
        while run.step < run.config.train.num_steps and run.stop_signal is None:
            for callback in run.callbacks:
                callback.on_step_start(run)
            report = train_step(run)
            run.step += 1
            for callback in run.callbacks:
                callback.on_step_end(run, report)
        for callback in run.callbacks:
            callback.on_end(run)
    finally:
        for callback in reversed(run.callbacks):
            callback.close()


def train_step(run: Run) -> StepReport:
    """One optimizer step on the next batch of the stream."""
    config = run.config
    batch = next(run.stream).to(run.device)
    micro_batches = batch.split(config.train.micro_batch_size or config.train.batch_size)
    result = run.executor.accumulate_gradients(micro_batches, run.step_context, run.teacher)
    grad_norm = clip_gradients(run.decoder, config.optim.clip_norm)
    lr = config.optim.lr * lr_ratio(config.optim.schedule, run.step, config.train.num_steps)
    set_lr(run.optimizer, lr)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.decoder.update_routers(result.ledger, run.step)
    return StepReport(result.losses, grad_norm, lr, result.ledger, batch.sample_ids_B)

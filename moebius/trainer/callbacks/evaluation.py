"""Evaluates during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius.data.build import corpus_weights
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.evaluation import evaluate_corpora

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class EvaluationCallback(Callback):
    """Publishes the validation loss before the first step, every interval and at the end."""

    name = "evaluation"
    priority = 30

    def on_start(self, run: Run) -> None:
        """The loss of the untrained model: about ln(vocabulary), or something is wrong."""
        if run.step == 0:
            self._evaluate(run)

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Evaluate where it is due."""
        last = run.step == run.config.train.num_steps
        if last or run.step % run.config.evaluation.interval == 0:
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        config = run.config
        with run.progress.section("evaluate"):
            metrics = evaluate_corpora(
                run.layout,
                run.validation,
                corpus_weights(run.stream.turns, config.data, run.stream.position),
                config.train.batch_size,
                config.evaluation.num_batches,
                run.token_bytes_V,
                run.device,
                run.step,
                config.train.seed,
                run.progress.mark,
                run.kernels,
            )
        run.evaluated = (run.step, metrics["eval/loss"])
        run.publish(metrics)

"""Publishes the numbers of a training step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from moebius.model.cost import planned_work, training_flops
from moebius.parallel.comm import Traffic
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.machine import AUTOCAST, matmul_flops_per_second
from moebius.trainer.metrics import executed_rows, ffn_flops_per_token, routing_metrics

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class MetricsCallback(Callback):
    """Loss, routing and speed every `log.interval` steps; in other steps nothing is read back.

    The clock runs only between the start and the end of steps: evaluation and checkpoints do not
    count as training time.
    """

    name = "metrics"
    priority = 20

    def __init__(self) -> None:
        self.peak = 0.0
        self.seconds = 0.0
        self.steps = 0
        self.began = 0.0

    def on_start(self, run: Run) -> None:
        """Measure the machine."""
        self._measure(run, seconds=0.3)

    def on_step_start(self, run: Run) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Stop the clock, after the device caught up if this step is to be reported."""
        config = run.config
        due = run.step == 1 or run.step % config.log.interval == 0
        metrics = {}
        if due or run.step == config.train.num_steps:
            metrics = {
                **{f"train/{name}": float(loss) for name, loss in report.losses.items()},
                "train/grad_norm": float(report.grad_norm),
                "train/lr": report.lr,
                "train/tokens": float(run.stream.position * config.data.sequence_length),
            }
        self.seconds += time.perf_counter() - self.began
        self.steps += 1
        if metrics:
            routing = routing_metrics(run.blueprint, report.ledger)
            traffic = communication(run.layout.mesh.traffic.take(), self.steps)
            speed = self._speed(run, report)
            run.publish(metrics | routing | traffic | speed | mixture_metrics(run))
            self.seconds, self.steps, run.stream.waited = 0.0, 0, 0.0

    def _speed(self, run: Run, report: StepReport) -> dict[str, float]:
        """MFU counts executed FLOPs: chosen FFN experts and selected tokens, not possible ones."""
        self._measure(run, seconds=0.05)
        rows, length = run.config.train.batch_size, run.config.data.sequence_length
        steps_per_second = self.steps / self.seconds
        work = report.ledger.work
        executed = training_flops(run.blueprint, work, executed_rows(report.ledger))
        planned = planned_work(run.blueprint, rows, length, run.step - 1)
        nominal = training_flops(run.blueprint, planned)
        peak = float(run.layout.mesh.world.all_reduce(torch.tensor(self.peak, dtype=torch.float64)))
        return {
            "speed/ffn_flops_per_token": ffn_flops_per_token(
                run.blueprint, report.ledger, rows * length
            ),
            "speed/tokens_per_second": rows * length * steps_per_second,
            "speed/step_seconds": 1 / steps_per_second,
            "speed/data_wait": run.stream.waited / self.seconds,
            "speed/mfu": executed * steps_per_second / peak,
            "speed/mfu_nominal": nominal * steps_per_second / peak,
        }

    def _measure(self, run: Run, seconds: float) -> None:
        """Keep the best rate seen: measured once, another process could halve it for good."""
        dtype = AUTOCAST[run.config.train.precision] or torch.float32
        self.peak = max(self.peak, matmul_flops_per_second(run.device, dtype, seconds))


def mixture_metrics(run: Run) -> dict[str, float]:
    """Of each corpus of a mixture, its present weight and its share of all tokens so far."""
    turns = run.stream.turns
    if turns is None:
        return {}
    position, names = run.stream.position, run.config.data.corpora
    weights, counts = turns.weights(position), turns.counts(position)
    metrics = {}
    for number, name in enumerate(names):
        metrics[f"data/{name}/weight"] = float(weights[number])
        metrics[f"data/{name}/share"] = float(counts[number]) / max(position, 1)
    return metrics


def communication(traffic: Traffic, steps: int) -> dict[str, float]:
    """Calls and bytes per step of the process that reports, by axis of the mesh; what FSDP2 and
    DeepSpeed do by themselves is not counted."""
    counts = {}
    for (axis, operation), sent in traffic.sent.items():
        counts[f"communication/{axis}/{operation}_bytes"] = sent / steps
        counts[f"communication/{axis}/{operation}_calls"] = traffic.calls[axis, operation] / steps
    return counts

"""Publishes the numbers of a training step."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moebius.data.batch import Batch
from moebius.model.cost import planned_work, training_flops
from moebius.model.ledger import Ledger
from moebius.parallel.comm import Traffic
from moebius.parallel.together import gathered
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.machine import AUTOCAST, matmul_flops_per_second
from moebius.trainer.metrics import (
    executed_rows,
    fetched,
    ffn_flops_per_token,
    routing_metrics,
)
from moebius.trainer.watch.phases import PhaseClock

if TYPE_CHECKING:
    from moebius.trainer.run import Run

LEAST_SECONDS = 0.01
"""a step of less is not worth a report"""


@dataclass(frozen=True)
class Share:
    """What a process knows of itself alone."""

    busy: float
    """seconds of a step in which it waited for no other one"""
    peak: float
    """FLOPs per second that its device can do"""
    memory: int
    """most bytes that it has had"""
    labels: int
    """tokens that it has read to be predicted; others may have read the same"""
    text: int
    """bytes of their text"""
    documents: int
    """or parts of them in the rows that it has read"""
    seen: int
    """tokens that each of these may look at, itself included, added up"""
    weights: float
    """its part of the square of the weights' norm"""


class MetricsCallback(Callback):
    """Loss, routing and speed every `log.interval` steps; in other steps nothing is read back.

    The clock runs only between the start and the end of steps: evaluation and checkpoints do not
    count as training time.
    """

    name = "metrics"
    priority = 20

    def __init__(self, planned: int | None = None) -> None:
        self.planned = planned
        """bytes that the planner foresees, where it was asked"""
        self.peak = 0.0
        self.seconds = 0.0
        self.steps = 0
        self.began = 0.0
        self.waited = 0.0
        self.phases = PhaseClock()
        self.busy = 0.0
        """seconds in steps without those in which other processes were waited for"""
        self.slow: list[int] = []
        """ranks that were late in the last report"""

    def on_start(self, run: Run) -> None:
        """Measure the machine, and count from here."""
        self.seconds, self.busy, self.steps = 0.0, 0.0, 0
        self.phases.take()
        if self.phases.mark not in run.progress.listeners:
            run.progress.listeners.append(self.phases.mark)
        self._measure(run, seconds=0.3)

    def on_step_start(self, run: Run) -> None:
        """Start the clock."""
        self.began = time.perf_counter()
        self.waited = run.layout.mesh.traffic.waited

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Stop the clock, after the device caught up if this step is to be reported."""
        ledger = None
        if run.reports:
            float(report.grad_norm)  # waits for the device, which a ledger without numbers does not
            ledger = fetched(report.ledger)
        self.phases.stop()
        passed = time.perf_counter() - self.began
        self.seconds += passed
        self.busy += passed - (run.layout.mesh.traffic.waited - self.waited)
        self.steps += 1
        if ledger is not None:
            self._report(run, report, ledger)
            self.seconds, self.busy, self.steps, run.stream.waited = 0.0, 0.0, 0, 0.0

    def _report(self, run: Run, report: StepReport, ledger: Ledger) -> None:
        """Publish; a collective call, one for all that processes know of themselves alone."""
        traffic = run.layout.mesh.traffic.take()
        shares = gathered(self._own(run, report))
        run.publish(
            training_metrics(run, report, shares)
            | routing_metrics(run.blueprint, ledger)
            | communication(traffic, self.steps)
            | self._speed(run, ledger, sum(share.peak for share in shares))
            | self._compare(run, [share.busy for share in shares])
            | self._memory(shares)
            | packing_metrics(run, shares)
            | mixture_metrics(run)
        )

    def _own(self, run: Run, report: StepReport) -> Share:
        self._measure(run, seconds=0.01)
        return Share(
            busy=self.busy / self.steps,
            peak=self.peak,
            memory=peak_memory(run.device),
            labels=sum(batch.num_tokens for batch in report.read),
            text=sum(int(run.token_bytes_V[batch.labels_BS].sum()) for batch in report.read),
            documents=sum(num_documents(batch) for batch in report.read),
            seen=sum(int(batch.positions_BS.sum()) + batch.num_tokens for batch in report.read),
            weights=float(run.layout.engine.weight_square()),
        )

    def _memory(self, shares: Sequence[Share]) -> dict[str, float]:
        metrics = {"memory/peak_gigabytes": max(share.memory for share in shares) / 1e9}
        if self.planned is not None:
            metrics["memory/planned_gigabytes"] = self.planned / 1e9
        return metrics

    def _speed(self, run: Run, ledger: Ledger, peak: float) -> dict[str, float]:
        """MFU counts executed FLOPs: chosen FFN experts and selected tokens, not possible ones.

        `peak` is that of all devices.
        """
        rows, length = run.config.train.batch_size, run.config.data.sequence_length
        steps_per_second = self.steps / self.seconds
        executed = training_flops(run.blueprint, ledger.work, executed_rows(ledger))
        planned = planned_work(run.blueprint, rows, length, run.step - 1)
        phases = {f"speed/{n}_seconds": s / self.steps for n, s in self.phases.take().items()}
        nominal = training_flops(run.blueprint, planned)
        return {
            "speed/ffn_flops_per_token": ffn_flops_per_token(run.blueprint, ledger, rows * length),
            "speed/tokens_per_second": rows * length * steps_per_second,
            "speed/step_seconds": 1 / steps_per_second,
            "speed/data_wait": run.stream.waited / self.seconds,
            "speed/communication_wait": (self.seconds - self.busy) / self.seconds,
            **phases,
            "speed/mfu": executed * steps_per_second / peak,
            "speed/mfu_nominal": nominal * steps_per_second / peak,
        }

    def _compare(self, run: Run, seconds: Sequence[float]) -> dict[str, float]:
        """Compare how long processes work, and tell of those that do longer.

        The time of a step is the same for all: who is fast waits. What FSDP2 and DeepSpeed wait for
        by themselves, and a device for others, is not known and counts as work.
        """
        before, self.slow = self.slow, stragglers(seconds, run.config.recovery.straggler_ratio)
        for number in set(before) & set(self.slow):  # once may be chance
            ratio = seconds[number] / statistics.median(seconds)
            run.tell(
                "straggler",
                f"rank {number} works {seconds[number]:.3g} s per step, {ratio:.1f} times the "
                "median of all",
            )
        slowest = max(range(len(seconds)), key=lambda number: seconds[number])
        ratio = seconds[slowest] / max(statistics.median(seconds), 1e-9)
        return {"speed/slowest_rank": float(slowest), "speed/slowest_over_median": ratio}

    def _measure(self, run: Run, seconds: float) -> None:
        """Keep the best rate seen: measured once, another process could halve it for good."""
        dtype = AUTOCAST[run.config.train.precision] or torch.float32
        self.peak = max(self.peak, matmul_flops_per_second(run.device, dtype, seconds))


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had so far: allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def training_metrics(run: Run, report: StepReport, shares: Sequence[Share]) -> dict[str, float]:
    """Losses, the optimizer's numbers and how far the run is."""
    metrics = {f"train/{name}": float(loss) for name, loss in report.losses.items()}
    labels, text = sum(share.labels for share in shares), sum(share.text for share in shares)
    metrics |= {
        "train/bits_per_byte": metrics["train/loss"] / math.log(2) * labels / max(text, 1),
        "train/grad_norm": float(report.grad_norm),
        "train/param_norm": math.sqrt(sum(share.weights for share in shares)),
        "train/lr": report.lr,
        "train/tokens": float(run.stream.position * run.config.data.sequence_length),
    }
    samples = run.stream.num_samples
    if samples is not None and len(samples) == 1:
        metrics["train/epoch"] = run.stream.position / samples[0]
    return metrics


def stragglers(seconds: Sequence[float], ratio: float) -> list[int]:
    """Ranks whose time is so many times the median; those that nobody would notice are none."""
    limit = max(ratio * statistics.median(seconds), LEAST_SECONDS)
    return [number for number, value in enumerate(seconds) if value > limit]


def num_documents(batch: Batch) -> int:
    """Documents in the rows of a batch, or parts of them."""
    return int((batch.segment_ids_BS[:, -1] - batch.segment_ids_BS[:, 0] + 1).sum())


def packing_metrics(run: Run, shares: Sequence[Share]) -> dict[str, float]:
    """How documents lie in rows: these have no padding, what packing costs is the sight of those
    that are cut."""
    tokens = sum(share.labels for share in shares)
    documents = sum(share.documents for share in shares)
    return {
        "data/documents_per_row": documents * run.config.data.sequence_length / tokens,
        "data/context_tokens": sum(share.seen for share in shares) / tokens,
    }


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

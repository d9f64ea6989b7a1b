"""Watches the numbers of a run: leaves steps out that would spoil it, or goes back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.parallel.world import agree
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.recovery.config import RecoveryConfig
from moebius.trainer.recovery.rewind import Rewind
from moebius.trainer.recovery.spikes import SpikeDetector

if TYPE_CHECKING:
    from moebius.trainer.run import Run


@dataclass(frozen=True)
class Seen:
    """A step whose numbers are on their way from the device."""

    step: int
    numbers: Tensor
    """loss, gradient norm, whether it was applied"""
    ready: torch.cuda.Event | None


class GuardCallback(Callback):
    """Judges each step by its loss and gradient norm, see `RecoveryConfig`.

    A step is judged when the next one has been queued, so that the device need not be waited for;
    before a save all are. Whether a step is applied is decided on the device.
    """

    name = "guard"
    priority = 5

    def __init__(self, config: RecoveryConfig) -> None:
        self.config = config
        self.spikes = SpikeDetector(config.spike)
        self.in_row = 0
        """steps that have changed nothing, up to the last one judged"""
        self.seen: deque[Seen] = deque()
        self.fault = ""
        self.limit = float("inf")
        """of the coming step; the loss of the one before it is never known in time"""

    def on_start(self, run: Run) -> None:
        """Forget what came after the checkpoint."""
        self.seen.clear()
        self.fault = ""
        run.loss_limit = self.limit

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Judge the steps before; this one, too, where a checkpoint is due."""
        values = (report.losses["loss"], report.grad_norm, report.applied)
        numbers = torch.stack([value.detach().double() for value in values])
        ready = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.seen.append(Seen(run.step, numbers, ready))
        self._judge(run, keep=1)
        if self.config.spike.action == "skip":
            self.limit = run.loss_limit = self.spikes.limit
        if run.step % run.config.checkpoint.interval == 0:
            self._judge(run, keep=0)
        run.consensus.vote("rewind", int(bool(self.fault)))

    def on_agreed(self, run: Run, agreed: Mapping[str, int]) -> None:
        """Go back where that was decided."""
        if agreed["rewind"]:
            raise Rewind(self.fault or "another process saw a fault")

    def on_end(self, run: Run) -> None:
        """Judge what is left."""
        self._judge(run, keep=0)
        if agree(int(bool(self.fault))):
            raise Rewind(self.fault or "another process saw a fault")

    def _judge(self, run: Run, keep: int) -> None:
        while len(self.seen) > keep and not self.fault:
            seen = self.seen.popleft()
            if seen.ready is not None:
                seen.ready.synchronize()
            loss, norm, applied = seen.numbers.tolist()
            self._judge_step(run, seen.step, loss, norm, bool(applied))

    def _judge_step(self, run: Run, step: int, loss: float, norm: float, applied: bool) -> None:
        config = self.config
        what = f"step {step}: the loss is {loss:.6g}, the gradient norm {norm:.6g}"
        finite = loss - loss == 0 and norm - norm == 0
        spike = finite and self.spikes.add(loss)
        if spike:
            what += ", a spike"
        if not applied:
            self.in_row += 1
            if not run.layout.engine.skips:
                self.fault = f"{what}, and this engine cannot leave a step out"
            elif self.in_row > config.max_skipped:
                self.fault = f"{what}, and {self.in_row - 1} steps before were left out already"
            else:
                run.tell("skipped", f"{what}; it changes nothing")
            return
        self.in_row = 0
        if spike and config.spike.action == "rewind":
            self.fault = what
        elif spike:
            run.tell("spike", what)

    def state_dict(self) -> dict[str, Any]:
        """The losses that spikes are told from, and how many steps were left out in a row."""
        limit = self.limit if math.isfinite(self.limit) else None
        return {"losses": list(self.spikes.losses), "in_row": self.in_row, "limit": limit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved state."""
        self.spikes.load(state.get("losses", ()))
        self.in_row = state.get("in_row", 0)
        limit = state.get("limit")
        self.limit = float("inf") if limit is None or self.config.spike.action != "skip" else limit

"""The interface of callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moebius.data.batch import Batch
from moebius.model.ledger import Ledger

if TYPE_CHECKING:
    from moebius.trainer.run import Run


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step left behind; tensors are still on the device."""

    losses: dict[str, Tensor]
    """see `StepResult.losses`"""
    grad_norm: Tensor
    applied: Tensor
    """bool: whether the step has changed the model; see `RecoveryConfig.max_skipped`"""
    lr: float
    ledger: Ledger
    sample_ids: range
    """of the batch"""
    read: list[Batch]
    """what this process read of these, on the host"""


class Callback:
    """Hooks into a run; the base class does nothing.

    Of several callbacks the one with the lower `priority` runs first, at every hook. `name` keys
    the state in checkpoints.
    """

    name = "callback"
    priority = 0

    def on_start(self, run: Run) -> None:
        """Before the first step of this process, after a checkpoint was loaded; again where the run
        has gone back to one."""

    def on_step_start(self, run: Run) -> None:
        """Before a batch is drawn."""

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """After the optimizer step; `run.step` counts it already."""

    def on_agreed(self, run: Run, agreed: Mapping[str, int]) -> None:
        """After all processes have agreed on what is next, see `Run.QUESTIONS`: all that this does
        is done by all of them."""

    def on_event(self, run: Run, kind: str, text: str) -> None:
        """Something out of the ordinary happened, see `Run.tell`."""

    def on_saved(self, run: Run, step: int) -> None:
        """The checkpoint of a step is complete."""

    def on_metrics(self, run: Run, metrics: dict[str, float]) -> None:
        """A callback published numbers for the present step, see `Run.publish`."""

    def on_picture(self, run: Run, name: str, image_HWC: Tensor) -> None:
        """A callback drew the present step, uint8 `[height, width, 3]`, see `Run.show`."""

    def on_text(self, run: Run, name: str, markdown: str) -> None:
        """A callback has something to read of the present step, see `Run.show_text`."""

    def on_end(self, run: Run) -> None:
        """After the last step, or after the step in which a stop was asked for."""

    def close(self) -> None:
        """Release what `on_start` took; called however the run ended, in reverse order."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved state."""

"""Where published numbers are kept: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, TextIO

from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from moebius.files import write_whole
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.tags import LAYOUT

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class JsonlSink(Callback):
    """One line of JSON per report, numbers at full precision."""

    name = "jsonl"
    priority = 10

    def __init__(self) -> None:
        self.file: TextIO | None = None

    def on_start(self, run: Run) -> None:
        """Open the log without the lines of steps that are about to be done again."""
        path = run.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= run.step] if run.step else []
            write_whole(path, "".join(f"{line}\n" for line in kept))
        self.file = path.open("a")

    def on_metrics(self, run: Run, metrics: dict[str, float]) -> None:
        """Append a line, visible to readers at once."""
        if self.file is not None:
            # JSON has no word for numbers that are not finite.
            plain = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
            self.file.write(json.dumps({"step": run.step, **plain}) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def _step_of(line: str) -> int:
    """Step of a line; one that was cut off by a crash counts as to be done again."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62


class TensorBoardSink(Callback):
    """Scalars for TensorBoard; a resumed run hides what it is about to do again."""

    name = "tensorboard"
    priority = 10

    def __init__(self) -> None:
        self.writer: SummaryWriter | None = None

    def on_start(self, run: Run) -> None:
        """Open an event file; a resumed run adds another one to the folder."""
        purge = run.step + 1 if run.step else 0
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        if run.step == 0:
            text = (run.folder / "config.yaml").read_text()
            self.writer.add_text("run/config", f"```yaml\n{text}\n```", 0)
            self.writer.add_custom_scalars(LAYOUT)

    def on_metrics(self, run: Run, metrics: dict[str, float]) -> None:
        """Write scalars at the optimizer step."""
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, run.step)
            self.writer.flush()

    def on_picture(self, run: Run, name: str, image_HWC: Tensor) -> None:
        """Write an image at the optimizer step."""
        if self.writer is not None:
            self.writer.add_image(name, image_HWC, run.step, dataformats="HWC")

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()

"""Where published numbers are kept: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from moebius.files import write_whole
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.config import RunConfig
from moebius.trainer.program_table import program_markdown
from moebius.trainer.tags import FINAL, LAYOUT

if TYPE_CHECKING:
    from moebius.trainer.run import Run

METRICS = "metrics.jsonl"


class JsonlSink(Callback):
    """One line of JSON per report, numbers at full precision."""

    name = "jsonl"
    priority = 10

    def __init__(self) -> None:
        self.file: TextIO | None = None

    def on_start(self, run: Run) -> None:
        """Open the log without the lines of steps that are about to be done again."""
        self.file = open_log(run.folder / METRICS, run.step)

    def on_metrics(self, run: Run, metrics: dict[str, float]) -> None:
        """Append a line, visible to readers at once."""
        if self.file is not None:
            write_line(self.file, run.step, {n: finite(v) for n, v in metrics.items()})

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def open_log(path: Path, step: int) -> TextIO:
    """Open a log of a run that goes on after a step, without the lines of later ones."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step] if step else []
        write_whole(path, "".join(f"{line}\n" for line in kept))
    return path.open("a")


def write_line(file: TextIO, step: int, values: Mapping[str, Any]) -> None:
    """Append what belongs to a step as a line of JSON, visible to readers at once."""
    file.write(json.dumps({"step": step, **values}) + "\n")
    file.flush()


def finite(value: float) -> float | None:
    """A number as JSON has it: there is no word for those that are not finite."""
    return value if math.isfinite(value) else None


def _step_of(line: str) -> int:
    """Step of a line; one that was cut off by a crash counts as to be done again."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62


def options_of(config: RunConfig) -> dict[str, str | float]:
    """What a run file says, by the path of the option."""
    found: dict[str, str | float] = {}
    rest: list[tuple[str, Any]] = [("", config.model_dump(mode="json", exclude_unset=True))]
    while rest:
        path, value = rest.pop()
        if isinstance(value, dict):
            rest += [(f"{path}.{name}" if path else name, node) for name, node in value.items()]
        else:
            is_plain = isinstance(value, str | float | int) and not isinstance(value, bool)
            found[path] = value if is_plain else json.dumps(value)
    return dict(sorted(found.items()))


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
            length = run.config.data.sequence_length
            self.writer.add_text("run/program", program_markdown(run.blueprint, length), 0)
            self.writer.add_custom_scalars(LAYOUT)
        for summary in hparams(options_of(run.config), dict.fromkeys(FINAL))[:2]:
            self.writer._get_file_writer().add_summary(summary, run.step)

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

    def on_text(self, run: Run, name: str, markdown: str) -> None:
        """Write a text at the optimizer step."""
        if self.writer is not None:
            self.writer.add_text(name, markdown, run.step)

    def on_end(self, run: Run) -> None:
        """Say that the options have led to what the curves end with."""
        if self.writer is not None and run.step == run.config.train.num_steps:
            self.writer._get_file_writer().add_summary(hparams({}, {})[2], run.step)

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()

"""Writes down what every parameter and its gradient came to, for `moebius compare`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor

from moebius.model.decoder import Decoder
from moebius.parallel.part import Box, Part
from moebius.parallel.stage import last_parts, layer_parts, part_of
from moebius.parallel.together import gathered
from moebius.parallel.world import is_main
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.callbacks.sinks import finite, open_log, write_line
from moebius.trainer.checkpoint.plan import file_name, listing, plan

if TYPE_CHECKING:
    from moebius.trainer.run import Run

TRACE = "trace.jsonl"


class TraceCallback(Callback):
    """One line of JSON per step: losses and gradient norm; `gradients`, the norm of each
    parameter's before clipping (not with DeepSpeed); `weights`, of each parameter and buffer after
    the step the norm and the projection. Names are in the order of a forward pass.

    All are those of whole tensors, in every layout. The first line of a run has its initial
    weights, as those of step 0.
    """

    name = "trace"
    priority = 15

    def __init__(self) -> None:
        self.file: TextIO | None = None
        self.names: list[str] = []
        self.own: dict[str, set[Box]] = {}
        """what this process counts: of what several hold alike one does"""
        self.signs = Signs()

    def on_start(self, run: Run) -> None:
        """Open the log without the lines of steps that are about to be done again."""
        self.names = forward_order(run.blueprint)
        index = plan(gathered(listing(model_parts(run))))
        own_file = file_name("model", run.layout.mesh.rank)
        self.own = {
            name: {stored.box for stored in entry.stored if stored.file == own_file}
            for name, entry in index.items()
        }
        run.layout.engine.squares = {}
        if is_main():
            self.file = open_log(run.folder / TRACE, run.step)
        if run.step == 0:
            self._write(run, {})

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Write the line of the step."""
        losses = {f"train/{name}": float(loss) for name, loss in report.losses.items()}
        self._write(run, losses | {"train/grad_norm": float(report.grad_norm)})

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()

    def _write(self, run: Run, scalars: dict[str, float]) -> None:
        """Write a line; a collective call."""
        gradients, norms, projections = self._sums(run).tolist()
        if self.file is None:
            return
        values: dict[str, Any] = {name: finite(value) for name, value in scalars.items()}
        if run.layout.engine.squares:
            trained = {name for name, _ in run.blueprint.named_parameters()}
            named = zip(self.names, gradients, strict=True)
            values["gradients"] = {name: finite(v**0.5) for name, v in named if name in trained}
        values["weights"] = {
            name: [finite(square**0.5), finite(projection)]
            for name, square, projection in zip(self.names, norms, projections, strict=True)
        }
        write_line(self.file, run.step, values)

    def _sums(self, run: Run) -> Tensor:
        """`[3, N]` over all processes: squared norms of gradients and of weights, projections."""
        mesh = run.layout.mesh
        sums_3N = torch.zeros(3, len(self.names), dtype=torch.float64, device=mesh.device_type)
        squares, parts = run.layout.engine.squares or {}, model_parts(run)
        for number, name in enumerate(self.names):
            if name in squares:
                sums_3N[0, number] = squares[name]
            part = parts.get(f"model/{name}")
            for chunk in part.chunks if part is not None else ():
                if part is not None and chunk.box in self.own[f"model/{name}"]:
                    values = chunk.tensor if part.dtype.is_floating_point else chunk.tensor.double()
                    norm = torch.linalg.vector_norm(values, dtype=torch.float64)
                    sums_3N[1, number] += norm.square()
                    sums_3N[2, number] += self.signs.project(values, chunk.box, part.shape)
        return mesh.world.all_reduce(sums_3N)


class Signs:
    """Projections of tensors on a direction of signs: unlike a norm, they change with a change of a
    single element to first order.

    The sign of an element is the product of one for each of its indices, each of which is drawn.
    """

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, int, torch.device], Tensor] = {}

    def project(self, values: Tensor, box: Box, shape: tuple[int, ...]) -> Tensor:
        """The share of a box of a whole tensor, a double."""
        for dim in reversed(range(len(shape))):
            start, size = box.offsets[dim], box.sizes[dim]
            signs = self._signs(shape[dim], dim, values.device)[start : start + size]
            values = (values * signs).sum(-1, dtype=torch.float64)  # products with signs are exact
        return values.double()

    def _signs(self, size: int, dim: int, device: torch.device) -> Tensor:
        key = (size, dim, device)
        if key not in self.drawn:
            raw = random.Random(dim).randbytes(-(-size // 8))  # the same wherever Python runs
            bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))[:size]
            self.drawn[key] = torch.from_numpy(bits * np.float32(2) - 1).to(device)
        return self.drawn[key]


def model_parts(run: Run) -> dict[str, Part]:
    """What this process holds of parameters and buffers; a collective call."""
    parts = run.layout.parts()
    return {name: part for name, part in parts.items() if name.startswith("model/")}


def forward_order(decoder: Decoder) -> list[str]:
    """Names of parameters and saved buffers as a forward pass first meets them."""
    parts = ["embedding"]
    for unit in decoder.program.units:
        if unit.segment is not None:
            parts.append(f"depth_routers.{unit.segment.number}")
        for visit in unit.visits:  # what a layer shares with others stands before it
            parts += sorted(layer_parts(decoder, [visit.layer]), reverse=True)
    parts += sorted(last_parts(decoder), reverse=True)
    place = {part: number for number, part in reversed([*enumerate(parts)])}
    return sorted(decoder.state_dict(), key=lambda name: place[part_of(name)])

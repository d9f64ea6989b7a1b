"""Where two runs part: the first step at which they differ, in what, and in which layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebius.errors import CheckpointError
from moebius.parallel.stage import part_of
from moebius.trainer.callbacks.sinks import METRICS
from moebius.trainer.callbacks.trace import TRACE

MACHINE = ("speed/", "communication/", "goodput/", "memory/", "health/", "tokens/")
"""metrics of time, machines, interruptions and of what a process reads: they differ between equal
runs, and are left out"""
EVALUATION = "eval/"
Weight = tuple[float, float]
"""norm and projection"""


@dataclass(frozen=True)
class Difference:
    """A number that two runs do not have alike."""

    name: str
    """of a metric, or of a parameter or buffer"""
    kind: str
    """metric; gradient, its norm; norm or projection of a weight"""
    first: float
    second: float
    relative: float
    """to the larger of both; to the norm where it is a projection; inf where one is not finite"""


@dataclass(frozen=True)
class Course:
    """What a run has written down."""

    path: Path
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """by step; not those of the machine; nan where it was not finite"""
    traced: dict[int, tuple[Path, int]] = field(default_factory=dict)
    """where in which file the line of a step begins that has gradients and weights"""

    def tensors(self, step: int) -> tuple[dict[str, float], dict[str, Weight]]:
        """Norms of gradients, and norms and projections of weights, after a step."""
        path, start = self.traced[step]
        with path.open("rb") as file:
            file.seek(start)
            line = json.loads(file.readline())
        try:
            gradients = {name: _number(v) for name, v in line.get("gradients", {}).items()}
            weights = {n: (_number(a), _number(b)) for n, (a, b) in line["weights"].items()}
        except (AttributeError, TypeError, ValueError):
            raise CheckpointError(f"'{path}': the line of step {step} is damaged") from None
        return gradients, weights


@dataclass(frozen=True)
class Origin:
    """Where a difference seems to have begun."""

    reason: str
    edge: str
    """first or last, in the order of a forward pass, of the tensors that differ"""
    tensor: Difference
    """the one that stands there"""


@dataclass(frozen=True)
class Comparison:
    """What two runs have alike and what not."""

    steps: int
    """that both have"""
    traced: tuple[int, int]
    """steps with gradients and weights of each"""
    step: int | None = None
    """the first with a difference; None: there is none"""
    metrics: tuple[Difference, ...] = ()
    """at that step"""
    gradients: tuple[Difference, ...] = ()
    """at that step, in the order of a forward pass"""
    weights: tuple[Difference, ...] = ()
    """after that step, in the order of a forward pass"""
    largest: tuple[int, Difference] | None = None
    """of all steps, and at which: of the metrics, or of the weights where these are alike"""
    evaluation_only: bool = False
    """whether nothing but evaluations differs, at any step"""
    missing: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """metrics that only the first, and only the second run has"""

    @property
    def origin(self) -> Origin | None:
        """What the first step that differs says of where it began, if it was traced."""
        losses = [d for d in self.metrics if d.name.startswith("train/") and "loss" in d.name]
        if losses and (self.weights or self.gradients):
            reason = "losses differ: other samples, the forward pass, or weights changed before it"
            return Origin(reason, "first", (self.weights or self.gradients)[0])
        if self.gradients:
            reason = "gradients differ, and no loss: the backward pass, which runs from the head"
            return Origin(reason, "last", self.gradients[-1])
        if self.weights and self.step == 0:
            return Origin("the initial weights differ", "first", self.weights[0])
        if self.weights:
            reason = "weights differ, and no loss and no gradient: the optimizer, or memory"
            return Origin(reason, "first", self.weights[0])
        return None


def read_course(path: Path) -> Course:
    """Read a run folder, or one of its logs.

    Raises CheckpointError where there is none or it is damaged; a last line that a kill has cut off
    is left out.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in (path / METRICS, path / TRACE) if file.is_file()]
        if not files:
            raise CheckpointError(f"'{path}' has no {METRICS}", "name the folder of a run")
    elif not path.is_file():
        raise CheckpointError(f"'{path}' does not exist", "name the folder of a run")
    course = Course(path)
    for file in files:
        _read(file, course)
    if not course.metrics:
        raise CheckpointError(f"'{path}' has no step yet")
    return course


def compare(first: Course, second: Course, tolerance: float) -> Comparison:
    """Compare all that both have; numbers are alike up to a relative tolerance.

    Raises CheckpointError where they have no step in common.
    """
    steps = sorted(first.metrics.keys() & second.metrics.keys())
    if not steps:
        spans = [f"'{c.path}' has {min(c.metrics)} to {max(c.metrics)}" for c in (first, second)]
        raise CheckpointError(f"compare: no step in common: {', '.join(spans)}")
    there: dict[str, Any] = {}
    largest: dict[bool, tuple[int, Difference]] = {}
    """by whether it is of a metric"""
    evaluation_only = True
    for step in steps:
        metrics = _differences(first.metrics[step], second.metrics[step], "metric", tolerance)
        gradients, weights = _tensors(first, second, step, tolerance)
        if not (metrics or gradients or weights):
            continue
        there = there or {
            "step": step,
            "metrics": metrics,
            "gradients": gradients,
            "weights": weights,
        }
        training = [d for d in metrics if not d.name.startswith(EVALUATION)]
        evaluation_only = evaluation_only and not (training or gradients or weights)
        for difference in (*metrics, *weights):
            known = largest.get(difference.kind == "metric")
            if known is None or difference.relative > known[1].relative:
                largest[difference.kind == "metric"] = (step, difference)
    names = [{name for own in c.metrics.values() for name in own} for c in (first, second)]
    return Comparison(
        steps=len(steps),
        traced=(len(first.traced), len(second.traced)),
        **there,
        largest=largest.get(True, largest.get(False)),
        evaluation_only=bool(there) and evaluation_only,
        missing=(tuple(sorted(names[0] - names[1])), tuple(sorted(names[1] - names[0]))),
    )


def layer_of(name: str) -> str:
    """The layer of a parameter or buffer, or what else of the model it belongs to."""
    kind, _, number = part_of(name).partition(".")
    return f"layer {number}" if kind == "layers" else part_of(name)


def _differences(
    first: Mapping[str, float], second: Mapping[str, float], kind: str, tolerance: float
) -> tuple[Difference, ...]:
    """Of the numbers that both have those that differ, in the order of the first."""
    pairs = [(name, first[name], second[name]) for name in first if name in second]
    found = [Difference(name, kind, a, b, relative(a, b)) for name, a, b in pairs]
    return tuple(d for d in found if d.relative > tolerance)


def _tensors(
    first: Course, second: Course, step: int, tolerance: float
) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    """Gradients and weights that differ after a step; none where one run has not traced it."""
    if step not in first.traced or step not in second.traced:
        return (), ()
    (gradients, weights), (others, other_weights) = first.tensors(step), second.tensors(step)
    pairs = [(n, weights[n], other_weights[n]) for n in weights if n in other_weights]
    most = [_of_weights(name, own, other) for name, own, other in pairs]
    return (
        _differences(gradients, others, "gradient", tolerance),
        tuple(d for d in most if d.relative > tolerance),
    )


def _of_weights(name: str, first: Weight, second: Weight) -> Difference:
    """The larger of the differences of norm and projection."""
    norms = relative(first[0], second[0])
    projections = relative(first[1], second[1], max(first[0], second[0]))
    if norms >= projections:
        return Difference(name, "norm", first[0], second[0], norms)
    return Difference(name, "projection", first[1], second[1], projections)


def relative(first: float, second: float, scale: float | None = None) -> float:
    """How far two numbers differ, relative to the larger or to `scale`; inf where only one is
    finite, 0 where both are not a number."""
    if first == second or (math.isnan(first) and math.isnan(second)):
        return 0.0
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.inf
    scale = max(abs(first), abs(second)) if scale is None else scale
    return abs(first - second) / scale if scale > 0 else math.inf


def _number(value: Any) -> float:
    """Of a log: null stands for what was not finite."""
    return math.nan if value is None else float(value)


def _read(path: Path, course: Course) -> None:
    start, damaged = 0, 0
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if damaged:
                raise CheckpointError(f"'{path}': line {damaged} is damaged")
            try:
                line = json.loads(text)
                step = line.pop("step")
                if not isinstance(step, int):
                    raise TypeError
                values = {
                    name: _number(value)
                    for name, value in line.items()
                    if not (name.startswith(MACHINE) or isinstance(value, dict))
                }
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                damaged = number  # the last one may be, where the run was killed
                continue
            if values or "weights" in line:
                course.metrics.setdefault(step, {}).update(values)
            if "weights" in line:
                course.traced[step] = (path, start)
            start += len(text)

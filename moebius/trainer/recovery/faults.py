"""Faults on purpose, for tests of what a run does about real ones."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from moebius.config import ConfigNode
from moebius.errors import ConfigError
from moebius.parallel.world import rank
from moebius.trainer.checkpoint.storage import folder_name

if TYPE_CHECKING:
    from moebius.trainer.run import Run
    from moebius.trainer.watch.progress import Progress

VARIABLE = "MOEBIUS_FAULTS"
LOUD = 30.0
"""factor on the logits of a spike"""
Phase = Literal[
    "start",
    "load",
    "read",
    "data",
    "forward",
    "backward",
    "optimizer",
    "evaluate",
    "stage",
    "write",
    "commit",
    "retain",
]


HOOKED = ("forward", "backward")
"""phases that faults happen in the middle of, and not where they begin"""


class Fault(ConfigNode):
    """Something bad that happens to a process at some point of the training."""

    kind: Literal[
        "kill",
        "stop",
        "terminate",
        "exception",
        "nan",
        "spike",
        "flip",
        "slow",
        "full_disk",
        "corrupt",
    ]
    """kill: SIGKILL; stop: SIGSTOP; terminate: SIGTERM; nan: a gradient; spike: the loss; flip: one
    bit of a gradient; slow: sleep; corrupt: a byte of the newest checkpoint"""
    rank: NonNegativeInt = 0
    """of the process"""
    step: NonNegativeInt | None = None
    """steps done before it; null: any"""
    sample: NonNegativeInt | None = None
    """position of a sample in the batch at which it happens; null: any"""
    phase: Phase = "forward"
    """of a step, of an evaluation, of loading or of saving"""
    times: PositiveInt = 1
    """how often it happens at most, over all starts of the run"""
    seconds: NonNegativeFloat = 1.0
    """of slow"""


class FaultInjector:
    """Lets faults happen in this process. Raises ConfigError outside of tests."""

    def __init__(self, faults: tuple[Fault, ...], run_dir: str, progress: Progress) -> None:
        if os.environ.get(VARIABLE) != "1":
            raise ConfigError(
                f"faults: {len(faults)} of them, for tests only",
                f"remove them, or set {VARIABLE}=1",
            )
        self.folder = Path(run_dir) / "faults"
        self.faults = {number: fault for number, fault in enumerate(faults) if fault.rank == rank()}
        self.run: Run | None = None
        progress.listeners.append(self._hear)

    def attach(self, run: Run) -> None:
        """See inside of steps, too."""
        self.run = run
        phases = {fault.phase for fault in self.faults.values()}
        kinds = {fault.kind for fault in self.faults.values()}
        if "forward" in phases:
            for module in run.decoder.modules():
                module.register_forward_pre_hook(self._before_forward)
        if "spike" in kinds:
            run.decoder.norm.register_forward_hook(self._after_norm)
        if "backward" in phases or kinds & {"nan", "flip"}:
            parameter = next(p for p in run.decoder.parameters() if p.requires_grad and p.numel())
            parameter.register_hook(self._gradient)

    def _hear(self, section: str, phase: str) -> None:
        if phase not in HOOKED:
            self._reached(section, phase)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            self._reached("step", "forward")

    def _after_norm(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        loud = torch.is_grad_enabled() and self._due("spike")
        return output * LOUD if loud else output

    def _gradient(self, gradient: Tensor) -> Tensor:
        self._reached("step", "backward")
        for number, fault in self.faults.items():
            if fault.kind == "flip" and self._matches(fault) and self._first(number, fault):
                gradient = gradient.clone()
                gradient.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return gradient * float("nan") if self._due("nan") else gradient

    def _due(self, kind: str) -> bool:
        """Whether numbers are to be wrong, which they are whenever the step is made."""
        return any(f.kind == kind and self._matches(f) for f in self.faults.values())

    def _matches(self, fault: Fault) -> bool:
        if self.run is None:
            return fault.step in (None, 0) and fault.sample is None
        if fault.step is not None and fault.step != self.run.step:
            return False
        if fault.sample is None:
            return True
        end = self.run.stream.position
        return end - self.run.config.train.batch_size <= fault.sample < end

    def _reached(self, section: str, phase: str) -> None:
        here = phase if phase in get_args(Phase) else section
        for number, fault in self.faults.items():
            if (
                fault.kind in ("nan", "spike", "flip")
                or fault.phase != here
                or not self._matches(fault)
            ):
                continue
            if self._first(number, fault):
                self._happen(fault)

    def _first(self, number: int, fault: Fault) -> bool:
        """Whether it has not happened often enough, which is then noted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for time_ in range(fault.times):
            try:
                (self.folder / f"{number}-{time_}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def _happen(self, fault: Fault) -> None:
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "exception":
            raise RuntimeError("an injected fault")
        elif fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "full_disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            self._corrupt()

    def _corrupt(self) -> None:
        assert self.run is not None
        step = self.run.storage.steps()[-1]
        path = Path(self.run.storage.location) / folder_name(step) / "model-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

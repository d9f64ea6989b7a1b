"""Silent corruption: a device that gives two answers to the same question is broken."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from moebius.model.executor import TokenBatch
from moebius.parallel.together import gathered

if TYPE_CHECKING:
    from moebius.trainer.run import Run


def due(interval: int | None, step: int) -> bool:
    """Whether the step after so many others is one to be checked."""
    return interval is not None and step % interval == 0


def compare_repeated(run: Run, micro_batches: Sequence[TokenBatch], num_labels: int) -> None:
    """Compute gradients twice, and tell which processes got other ones the second time; a
    collective call, which leaves no gradients.

    One micro-batch is enough where all layers are in one process; pipelines need all of them.
    """
    chosen = micro_batches if run.layout.mesh.depth.size > 1 else micro_batches[:1]
    first, second = (fingerprint(run, chosen, num_labels) for _ in range(2))
    different = [number for number, same in enumerate(gathered(first == second)) if not same]
    if different:
        ranks = ", ".join(map(str, different))
        run.tell(
            "corruption",
            f"step {run.step + 1}: rank {ranks} computed other gradients when the same micro-batch "
            "was computed again; check the device",
        )


def fingerprint(run: Run, micro_batches: Sequence[TokenBatch], num_labels: int) -> str:
    """Hash of the loss and of all gradients of this process, bit for bit."""
    result = run.layout.executor.accumulate_gradients(
        micro_batches, run.step_context, run.teacher, num_labels
    )
    digest = hashlib.sha256()
    values = [result.losses["loss"]]
    for parameter in run.decoder.parameters():
        if parameter.grad is not None:
            values.append(parameter.grad)
            parameter.grad = None
    for value in values:
        if isinstance(value, DTensor):
            value = value.to_local()
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(raw.numpy().data if raw.numel() else b"")
    return digest.hexdigest()

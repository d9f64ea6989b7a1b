"""Loss on held-out text."""

import math
from collections.abc import Iterable

import torch

from moebius.data.batch import Batch
from moebius.model.context import Ledger
from moebius.model.executor import LocalExecutor
from moebius.model.recursion.router import Mode


@torch.no_grad()
def evaluate(
    executor: LocalExecutor, batches: Iterable[Batch], bytes_per_token: float, device: torch.device
) -> dict[str, float]:
    """Mean cross-entropy in nats per token, and in bits per byte of text.

    A model that routes over depth is evaluated twice: `eval/loss` selects causally (threshold), as
    generation does; `eval/topk_loss` selects as in training, looking ahead, as published results
    do. `bytes_per_token` is that of the whole split.
    """
    modes: dict[str, Mode] = {"": "threshold"}
    if len(executor.decoder.depth_routers):
        modes["topk_"] = "topk"
    sums = dict.fromkeys(modes, 0.0)
    num_tokens = 0
    for batch in batches:
        on_device = batch.to(device)
        num_tokens += batch.num_tokens
        for prefix, mode in modes.items():
            sums[prefix] += float(executor.loss_sum(on_device, mode, Ledger()))
    metrics = {}
    for prefix, total in sums.items():
        loss = total / num_tokens
        metrics[f"eval/{prefix}loss"] = loss
        metrics[f"eval/{prefix}bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return metrics

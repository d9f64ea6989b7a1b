"""Loss on held-out text."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from moebius.data.batch import Batch
from moebius.model.context import Mode, StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger


@torch.no_grad()
def evaluate(
    executor: LocalExecutor,
    batches: Iterable[Batch],
    token_bytes_V: Tensor,
    device: torch.device,
    step: int,
    seed: int,
) -> dict[str, float]:
    """Mean cross-entropy in nats per token, and in bits per byte of the text that was predicted.

    A model that routes over depth is evaluated twice: `eval/loss` selects causally (threshold), as
    generation does; `eval/topk_loss` selects as in training, looking ahead, as published results
    do. `step` and `seed` are the run's: what is scheduled or random in routing follows them.
    `token_bytes` is the length of each id's text, see `data.tokenizer.token_bytes`.
    """
    modes: dict[str, Mode] = {"": "threshold"}
    if len(executor.decoder.depth_routers):
        modes["topk_"] = "topk"
    sums = dict.fromkeys(modes, 0.0)
    num_tokens = num_bytes = 0
    for batch in batches:
        on_device = batch.to(device)
        num_tokens += batch.num_tokens
        num_bytes += int(token_bytes_V[batch.labels_BS].sum())
        for prefix, mode in modes.items():
            sums[prefix] += float(
                executor.loss_sum(on_device, StepContext(mode, Ledger(), step, seed))
            )
    metrics = {}
    for prefix, total in sums.items():
        metrics[f"eval/{prefix}loss"] = total / num_tokens
        metrics[f"eval/{prefix}bits_per_byte"] = total / math.log(2) / num_bytes
    return metrics

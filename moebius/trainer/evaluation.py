"""Loss on held-out text."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from moebius.data.batch import Batch
from moebius.data.corpus import SplitReader
from moebius.data.stream import validation_batches
from moebius.kernels.registry import PLAIN, Kernels
from moebius.model.context import Mode, StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.model.recursion.config import ExpertChoiceConfig
from moebius.parallel.layout import Layout


def evaluate_corpora(
    executor: LocalExecutor | Layout,
    readers: Mapping[str, SplitReader],
    weights: Mapping[str, float],
    batch_size: int,
    num_batches: int,
    token_bytes_V: Tensor,
    device: torch.device,
    step: int,
    seed: int,
    alive: Callable[[], None] = lambda: None,
    kernels: Kernels = PLAIN,
) -> dict[str, float]:
    """What `evaluate` finds on the beginning of the held-out text of each corpus.

    Of a mixture there are `eval/<corpus>/loss` etc. too; `eval/loss` etc. are their means by the
    `weights`, which add to 1. `alive` is called before each batch.
    """
    metrics: dict[str, float] = {}
    for name, reader in readers.items():
        batches = validation_batches(reader, batch_size, num_batches)
        found = evaluate(executor, batches, token_bytes_V, device, step, seed, alive, kernels)
        if len(readers) == 1:
            return found
        for key, value in found.items():
            metrics[key] = metrics.get(key, 0.0) + weights[name] * value
            metrics[key.replace("eval/", f"eval/{name}/")] = value
    return metrics


def evaluate(
    executor: LocalExecutor | Layout,
    batches: Iterable[Batch],
    token_bytes_V: Tensor,
    device: torch.device,
    step: int,
    seed: int,
    alive: Callable[[], None] = lambda: None,
    kernels: Kernels = PLAIN,
) -> dict[str, float]:
    """Mean cross-entropy in nats per token, and in bits per byte of the text that was predicted.

    A model whose passes choose their tokens is evaluated twice: `eval/loss` selects causally
    (threshold), as generation does; `eval/topk_loss` selects as in training, looking ahead, as
    published results do. Early exits of a model have `eval/exit_<n>_loss`. `step` and `seed` are
    the run's: what is scheduled or random in routing follows them. `token_bytes` is the length of
    each id's text, see `data.tokenizer.token_bytes`.
    """
    model = executor.decoder.config
    modes: dict[str, Mode] = {"": "threshold"}
    if isinstance(model.depth.router, ExpertChoiceConfig):
        modes["topk_"] = "topk"
    last = len(executor.program.visits)
    config = model.exits
    early = tuple(n for n in config.after if n < last) if config else ()
    sums: dict[str, float] = {}
    num_tokens = num_bytes = 0
    for batch in batches:
        alive()
        on_device = batch.to(device)
        num_tokens += batch.num_tokens
        num_bytes += int(token_bytes_V[batch.labels_BS].sum())
        for prefix, mode in modes.items():
            context = StepContext(mode, Ledger(), step, seed, kernels=kernels)
            exits = (*early, last) if mode == "threshold" else (last,)
            for number, found in executor.loss_sums(on_device, context, exits).items():
                name = prefix if number == last else f"exit_{number}_"
                sums[name] = sums.get(name, 0.0) + float(found)
    metrics = {}
    for name, total in sums.items():
        metrics[f"eval/{name}loss"] = total / num_tokens
        metrics[f"eval/{name}bits_per_byte"] = total / math.log(2) / num_bytes
    return metrics

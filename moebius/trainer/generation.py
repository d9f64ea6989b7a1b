"""Sampling text from a model, one token at a time."""

import numpy as np
import torch
from torch import Tensor

from moebius.data.batch import make_batch
from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor


@torch.no_grad()
def generate_ids(
    executor: LocalExecutor,
    prompt_ids: list[int],
    *,
    eod_id: int,
    max_new_tokens: int,
    context_length: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: torch.device,
    step: StepContext,
) -> list[int]:
    """New ids after a prompt, up to an end of document (which is not returned).

    Every token runs the whole context of at most `context_length` tokens again; depth is selected
    causally. Temperature 0 takes the most probable token. `step` is the context of a pass with mode
    `threshold`.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [eod_id, *prompt_ids]  # a document begins with the end of the one before
    new: list[int] = []
    for _ in range(max_new_tokens):
        window = np.asarray([[*ids[-context_length:], eod_id]], dtype=np.int64)
        batch = make_batch(window, eod_id).to(device)
        logits_BV = executor.next_token_logits(batch, step)
        token = sample(logits_BV[0].float().cpu(), temperature, top_k, generator)
        if token == eod_id:
            break
        ids.append(token)
        new.append(token)
    return new


def sample(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One id from the `top_k` >= 1 most probable ones; `temperature` >= 0."""
    if temperature == 0:
        return int(logits_V.argmax())
    values, ids = logits_V.topk(min(top_k, logits_V.numel()))
    chosen = torch.multinomial((values / temperature).softmax(dim=0), 1, generator=generator)
    return int(ids[chosen])

"""Generation as its definition: every token runs its whole context again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebius.model.context import StepContext, TokenContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger

Choose = Callable[[Tensor, int, int], int]
"""(logits `[V]`, number of the prompt, number of the new token) -> token id"""


@dataclass(frozen=True)
class Limits:
    """When a sequence ends, and how much of it a token sees."""

    max_new_tokens: int
    context_length: int
    """at least 2"""
    stop_id: int | None = None
    """an id that ends a sequence and is not part of it"""

    def window_start(self, length: int) -> int:
        """The first token that the one after `length` tokens sees.

        Where the context is full, its older half is forgotten; positions start again from 0.
        """
        excess, step = length - self.context_length, (self.context_length + 1) // 2
        return -(-excess // step) * step if excess > 0 else 0


@torch.no_grad()
def generate_plain(
    executor: LocalExecutor,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    limits: Limits,
    step: StepContext,
) -> list[list[int]]:
    """New ids after each prompt, which is one document; `step` has mode `threshold`."""
    return [
        _continue(executor, list(prompt), number, choose, limits, step)
        for number, prompt in enumerate(prompts)
    ]


def _continue(
    executor: LocalExecutor,
    ids: list[int],
    number: int,
    choose: Choose,
    limits: Limits,
    step: StepContext,
) -> list[int]:
    device = executor.decoder.embedding.weight.device
    new: list[int] = []
    while len(new) < limits.max_new_tokens:
        window = ids[limits.window_start(len(ids)) :]
        logits_BSV = document_logits(executor, torch.tensor([window], device=device), step)
        token = choose(logits_BSV[0, -1], number, len(new))
        if token == limits.stop_id:
            break
        ids.append(token)
        new.append(token)
    return new


def document_logits(
    executor: LocalExecutor, ids_BS: Tensor, step: StepContext, slots_B: Tensor | None = None
) -> Tensor:
    """Logits `[B, 1, V]` after rows of one document each; with a cache they go to its slots."""
    decoder, step = executor.decoder, replace(step, ledger=Ledger())
    document_BS = torch.zeros_like(ids_BS)
    position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
    tokens = TokenContext.of_rows(
        document_BS, *decoder.rope(position_BS), document_BS[:, 0], slots_B=slots_B
    )
    last = len(executor.program.visits)
    with executor.autocast(ids_BS.device):
        stream_BSD = executor.streams(decoder.embed(ids_BS), tokens, step, (last,))[last]
        return decoder.logits(decoder.norm(stream_BSD[:, -1:]))

"""What a model is trained on: cross-entropy at one or several exits, and distillation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebius.kernels.cross_entropy import Teacher, linear_cross_entropy
from moebius.kernels.random import uniform
from moebius.kernels.registry import PLAIN, Kernels
from moebius.model.config import ExitsConfig
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.program import Program

if TYPE_CHECKING:
    from moebius.model.executor import LocalExecutor, TokenBatch


@dataclass(frozen=True)
class TeacherModel:
    """A trained model of the same vocabulary whose predictions are to be learned."""

    executor: LocalExecutor
    coefficient: float
    """weight of the forward KL divergence beside the cross-entropy"""
    temperature: float
    step: int = 0
    """optimizer steps it was trained for: what is scheduled in it stays as it was then"""
    seed: int = 0

    @torch.no_grad()
    def predict(self, batch: TokenBatch, kernels: Kernels = PLAIN) -> Teacher:
        """Its final hidden states and head; it selects causally and is not trained."""
        own = StepContext("threshold", Ledger(), self.step, self.seed, kernels=kernels)
        with self.executor.autocast(batch.tokens_BS.device):
            hidden_TD = self.executor.hidden(batch, own).flatten(0, 1)
        return Teacher(hidden_TD, self.executor.decoder.head_weight.detach(), self.temperature)


def drawn_exits(config: ExitsConfig | None, program: Program, step: StepContext) -> tuple[int, ...]:
    """After how many visits a head reads in a forward pass of training, ascending.

    All exits, or one drawn for the step or the micro-batch (SortedNet, arXiv 2309.00255: each
    sub-model is the beginning of the next larger one). A draw is a function of seed, step and
    micro-batch, so that every process makes the same.
    """
    last = len(program.visits)
    if config is None:
        return (last,)
    every = (*config.after, last)
    if config.draw == "all":
        return every
    number = step.micro_batch if config.draw == "micro_batch" else 0
    digest = hashlib.sha256(f"{step.seed}/{step.step}/exits".encode()).digest()
    draw = uniform(int.from_bytes(digest[:8], "big"), torch.tensor([number]), 1)
    return (every[int(float(draw) * len(every))],)


def exit_losses(
    decoder: Decoder,
    labels_T: Tensor,
    hidden: Mapping[int, Tensor],
    kernels: Kernels,
    lesson: Teacher | None = None,
    coefficient: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is differentiated, a sum over labels, and the sums to report by name. `hidden` has the
    labelled tokens' states at each exit, `[T, D]`.

    `sum_i a_i CE_i` with a = 1 at the last exit (Sorted LLaMA; early exits of Relaxed Recursive
    Transformers), and `a_i * KL(last || exit i)` with self-distillation, the last exit's
    predictions detached. A lesson adds `coefficient` times the KL from it at the last exit.
    """
    config, exits = decoder.config.exits, sorted(hidden)
    weights = _exit_weights(config, len(exits))
    weight_VD, vocabulary = decoder.head_weight, decoder.vocabulary
    *early, final = (hidden[number] for number in exits)
    of_lesson = None if lesson is None else [coefficient * weights[-1]]
    cross_entropy = partial(
        linear_cross_entropy, vocabulary=vocabulary, row_losses=kernels.row_losses
    )
    last = cross_entropy([final], weight_VD, labels_T, weights[-1:], of_lesson, lesson)
    sums = {"loss": last.ce_X[0]}
    if lesson is not None:
        sums["distillation_loss"] = last.kl_X[0]
    if not early or config is None:
        return last.total, sums
    itself, kl_weights = None, None
    if config.self_distillation:
        itself = Teacher(final.detach(), weight_VD.detach())
        kl_weights = [config.self_distillation * weight for weight in weights[:-1]]
    others = cross_entropy(early, weight_VD, labels_T, weights[:-1], kl_weights, itself)
    for number, loss in zip(exits[:-1], others.ce_X, strict=True):
        sums[f"exit_{number}_loss"] = loss
    return last.total + others.total, sums


def _exit_weights(config: ExitsConfig | None, count: int) -> Sequence[float]:
    """a_i of all exits that ran."""
    if config is None or count == 1:
        return [1.0] * count
    weights = [config.coefficient] * (count - 1) + [1.0]
    total = sum(weights) if config.normalize else 1.0
    return [weight / total for weight in weights]

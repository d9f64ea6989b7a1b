"""Small models and batches for the model tests."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moebius.kernels.cross_entropy import linear_cross_entropy
from moebius.model.config import ModelConfig
from moebius.model.context import Mode, StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.parameters import initialize
from tests.conftest import model_tree


def build(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> LocalExecutor:
    """An executor over the tests' model with some fields of its config changed."""
    decoder = Decoder(ModelConfig.model_validate(model_tree(**changes)))
    initialize(decoder, seed)
    return LocalExecutor(decoder.to(dtype))


def batch_of(tokens_BS: Tensor, segment_ids_BS: Tensor | None = None) -> TokenBatch:
    """A batch of whole-row documents, or with given document numbers."""
    rows, length = tokens_BS.shape
    positions = torch.arange(length).expand(rows, -1)
    if segment_ids_BS is None:
        segment_ids_BS = torch.zeros_like(tokens_BS)
    return SimpleNamespace(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        segment_ids_BS=segment_ids_BS,
        positions_BS=positions,
        sample_ids_B=torch.arange(rows),
    )


def random_batch(rows: int, length: int, seed: int = 0, vocab_size: int = 512) -> TokenBatch:
    """Random token ids, one document per row."""
    generator = torch.Generator().manual_seed(seed)
    return batch_of(torch.randint(0, vocab_size, (rows, length), generator=generator))


def rows_of(batch: TokenBatch, start: int, end: int) -> TokenBatch:
    """Some rows of a batch."""
    return SimpleNamespace(**{name: rows[start:end] for name, rows in vars(batch).items()})


def hidden(executor: LocalExecutor, batch: TokenBatch, mode: Mode = "topk") -> Tensor:
    """Final hidden states, statistics discarded."""
    return executor.hidden(batch, StepContext(mode, Ledger()))


def loss_sum(executor: LocalExecutor, batch: TokenBatch, step: StepContext) -> Tensor:
    """Cross-entropy summed over the labels of a batch."""
    hidden_TD = executor.hidden(batch, step).flatten(0, 1)
    weight_VD, labels_T = executor.decoder.head_weight, batch.labels_BS.flatten()
    return linear_cross_entropy([hidden_TD], weight_VD, labels_T, [1.0]).total


def scale_parameters(executor: LocalExecutor, name_part: str, factor: float) -> None:
    """Make some parameters larger, so that what they do is not lost in rounding."""
    with torch.no_grad():
        for name, parameter in executor.decoder.named_parameters():
            if name_part in name:
                parameter.mul_(factor)

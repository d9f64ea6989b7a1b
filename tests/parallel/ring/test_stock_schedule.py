"""Another executor as a second definition: torch's interleaved pipeline over shared modules."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from moebius.model.carry import Carry
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor
from moebius.model.program import Visit
from tests.model.helpers import rows_of
from tests.parity.forks import run_forked
from tests.parity.layouts import LENGTH, decoder_of, documents
from tests.parity.models import VOCABULARY, WIDTH, ring_name
from tests.parity.rings import arrays, context, local_gradients, ring_gradients

pytestmark = pytest.mark.usefixtures("warm")
NUM_RANKS, PASSES, ROWS = 2, 3, 4
NAME = ring_name("dense", PASSES, is_routed=False)
TOLERANCE = 1e-6


class Slice(nn.Module):
    """Some visits as a module: ids or a stream to a stream or, at the end, a sum of losses."""

    def __init__(self, decoder: Decoder, visits: tuple[Visit, ...], number: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.visits = visits
        self.is_first = number == 0
        self.is_last = number == NUM_RANKS * PASSES - 1

    def forward(self, x: Tensor, row_B: Tensor) -> Tensor:
        """`row` numbers the micro-batch's rows among the documents."""
        batch, local = documents(ROWS), LocalExecutor(self.decoder)
        start, end = int(row_B[0]), int(row_B[-1]) + 1
        tokens = local.tokens(rows_of(batch, start, end))
        if self.is_first:
            x = self.decoder.embed(x)
        x, _ = local.visit(x, Carry(), tokens, self.visits, context())
        return F.linear(self.decoder.norm(x), self.decoder.head_weight) if self.is_last else x


def stock_gradients() -> dict[str, Any]:
    """By torch's schedule; the modules behind the stages of a process are the same ones."""
    decoder = decoder_of(NAME, torch.float32)
    rank, batch = dist.get_rank(), documents(ROWS)
    first, *middle, last = decoder.program.visits
    per_slice = len(middle) // (NUM_RANKS * PASSES)
    num_stages = NUM_RANKS * PASSES
    stages = []
    for number in range(rank, num_stages, NUM_RANKS):
        visits = tuple(middle[number * per_slice : (number + 1) * per_slice])
        visits = ((first,) if number == 0 else ()) + visits
        visits += (last,) if number == num_stages - 1 else ()
        module = Slice(decoder, visits, number)
        stream = torch.empty(1, LENGTH, WIDTH, device="meta", requires_grad=True)
        logits = torch.empty(1, LENGTH, VOCABULARY, device="meta", requires_grad=True)
        stage = PipelineStage(
            module,
            number,
            num_stages,
            torch.device("cpu"),
            input_args=(batch.tokens_BS[:1].to("meta") if module.is_first else stream,),
            output_args=(logits if module.is_last else stream,),
        )
        stages.append(stage)
    labels = batch.labels_BS.numel()

    def loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        logits_TV, labels_T = logits_BSV.flatten(0, 1), labels_BS.flatten()
        return F.cross_entropy(logits_TV, labels_T, reduction="sum") / labels

    # By default a shared gradient would be divided once for each of its stages.
    schedule = ScheduleInterleaved1F1B(stages, ROWS, loss_fn=loss, scale_grads=False)
    inputs = (batch.tokens_BS,) if rank == 0 else ()
    target = batch.labels_BS if rank == NUM_RANKS - 1 else None
    schedule.step(*inputs, target=target, row_B=torch.arange(ROWS))
    for parameter in decoder.parameters():  # tied over all stages, as everything is here whole
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    return arrays({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})


def test_a_stock_schedule_gives_the_same_gradients() -> None:
    expected = local_gradients(NAME, ROWS)
    ((of_ring,), _) = run_forked(NUM_RANKS, ring_gradients, NAME, {"rp": NUM_RANKS}, [{}], ROWS)
    for stock in run_forked(NUM_RANKS, stock_gradients):
        assert stock.keys() | {"loss"} == expected.keys() == of_ring.keys()
        for key, value in stock.items():
            assert np.abs(value - expected[key]).max() <= TOLERANCE, key
            assert np.abs(value - of_ring[key]).max() <= TOLERANCE, key

"""What a program costs: floating-point operations of the forward pass, counted exactly.

Counted are matrix products (2 per multiply-add): projections, attention scores over the full
square of present tokens, experts, routers, head. Training costs three times the forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moebius.model.block import Block
from moebius.model.config import MoEConfig
from moebius.model.decoder import Decoder
from moebius.model.moe.layer import MoE
from moebius.model.program import Site, Visit, kept_tokens

BACKWARD_PER_FORWARD = 2
"""each product of the forward pass costs two in the backward pass"""


@dataclass(frozen=True)
class VisitCost:
    """Cost of one visit to a layer for `num_rows` rows of `length` present tokens each."""

    visit: Visit
    capacity: float
    length: int
    flops: int


def visit_costs(
    decoder: Decoder,
    num_rows: int,
    sequence_length: int,
    ffn_rows: Mapping[Site, float] | None = None,
) -> list[VisitCost]:
    """Forward FLOPs of every visit, routed as in training (`topk`).

    `ffn_rows` gives the FFN assignments counted at each MoE site (executed cost); without it as
    many of the K assignments as possible count as made to FFN experts (nominal cost).
    """
    costs = []
    for segment in decoder.program.segments:
        for capacity, visits in zip(segment.capacities, segment.passes, strict=True):
            length = sequence_length
            if segment.router is not None:
                length = kept_tokens(capacity, sequence_length)
            for visit in visits:
                block = decoder.layers[visit.layer]
                assert isinstance(block, Block)
                rows = None if ffn_rows is None else ffn_rows.get(visit.site)
                flops = block_flops(block, visit, num_rows, length, rows)
                costs.append(VisitCost(visit, capacity, length, flops))
    return costs


def block_flops(
    block: Block, visit: Visit, num_rows: int, length: int, ffn_rows: float | None = None
) -> int:
    """Forward FLOPs of one visit to a block."""
    num_tokens = num_rows * length
    attention = block.attention.flops(num_rows, length)
    if not isinstance(block.ffn, MoE):
        return attention + block.ffn.flops(num_tokens)
    if ffn_rows is None:
        moe = block.ffn.config
        ffn_rows = num_tokens * min(moe.router.selector.top_k, moe.count("ffn"))
    # The carry is empty before the first visit: every block of a decoder has the same kind of FFN.
    return attention + block.ffn.flops(num_tokens, round(ffn_rows), visit.index > 0)


def balanced_ffn_rows(decoder: Decoder, num_rows: int, sequence_length: int) -> dict[Site, float]:
    """FFN assignments at each MoE site where the balance loss is at its minimum.

    Their share is `tau*E / (tau*E + Z)` for E FFN and Z zero-computation experts; without a balance
    loss all experts count as equally loaded.
    """
    moe = decoder.config.ffn
    if not isinstance(moe, MoEConfig):
        return {}
    ffn_load = moe.count("ffn") * (moe.balance.tau if moe.balance else 1.0)
    share = ffn_load / (ffn_load + moe.num_experts - moe.count("ffn"))
    per_token = moe.router.selector.top_k * share
    costs = visit_costs(decoder, num_rows, sequence_length)
    return {cost.visit.site: num_rows * cost.length * per_token for cost in costs}


def depth_router_flops(decoder: Decoder, num_rows: int, sequence_length: int) -> int:
    """Forward FLOPs of the depth routers: a score for each token of the depth before."""
    total = 0
    for segment in decoder.program.segments:
        if segment.router is None:
            continue
        candidates = sequence_length
        for capacity in segment.capacities:
            total += 2 * num_rows * candidates * decoder.config.hidden_size
            candidates = kept_tokens(capacity, sequence_length)
    return total


def forward_flops(
    decoder: Decoder,
    num_rows: int,
    sequence_length: int,
    ffn_rows: Mapping[Site, float] | None = None,
) -> int:
    """Forward FLOPs of `num_rows` full rows: executed with `ffn_rows`, else nominal."""
    return (
        sum(cost.flops for cost in visit_costs(decoder, num_rows, sequence_length, ffn_rows))
        + depth_router_flops(decoder, num_rows, sequence_length)
        + decoder.head_flops(num_rows * sequence_length)
    )


def training_flops(
    decoder: Decoder,
    num_rows: int,
    sequence_length: int,
    ffn_rows: Mapping[Site, float] | None = None,
) -> int:
    """FLOPs of forward and backward together."""
    forward = forward_flops(decoder, num_rows, sequence_length, ffn_rows)
    return forward * (1 + BACKWARD_PER_FORWARD)

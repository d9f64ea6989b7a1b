"""What a program costs: floating-point operations of the forward pass, counted exactly.

Counted are matrix products (2 per multiply-add): projections, attention scores over the full
square of present tokens, experts, routers, head. Training counts as three times the forward pass.
Where a product needs fewer gradients (frozen scorers, scores that nothing uses, first states of
recurrent units) that is too much, by about one per cent at most.
"""

from dataclasses import dataclass

from moebius.model.block import Block
from moebius.model.decoder import Decoder
from moebius.model.ffn import SwiGLU
from moebius.model.mixture_attention import MixtureAttention
from moebius.model.moe.layer import Executed, MoE
from moebius.model.moe.losses import SwitchLoss
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
    executed: Executed | None = None,
) -> list[VisitCost]:
    """Forward FLOPs of every visit, routed over depth as in training (`topk`).

    `executed` gives the assignments that each expert computed at each site (executed cost); without
    it every token has its K costliest experts (nominal cost).
    """
    costs = []
    seen: set[str] = set()
    for segment in decoder.program.segments:
        for capacity, visits in zip(segment.capacities, segment.passes, strict=True):
            length = sequence_length
            if segment.router is not None:
                length = kept_tokens(capacity, sequence_length)
            for visit in visits:
                flops = _block_flops(decoder, visit, num_rows, length, seen, executed)
                costs.append(VisitCost(visit, capacity, length, flops))
                block = decoder.layers[visit.layer]
                assert isinstance(block, Block)
                seen |= {"attention"} if isinstance(block.attention, MixtureAttention) else set()
                seen |= {"ffn"} if isinstance(block.ffn, MoE) else set()
    return costs


def _block_flops(
    decoder: Decoder,
    visit: Visit,
    num_rows: int,
    length: int,
    seen: set[str],
    executed: Executed | None,
) -> int:
    """Forward FLOPs of one visit; `seen` are the sublayers that had a router before it."""
    block = decoder.layers[visit.layer]
    assert isinstance(block, Block)
    num_tokens = num_rows * length
    if isinstance(block.attention, MixtureAttention):
        attention = block.attention.flops(num_rows, length, visit, "attention" in seen, executed)
    else:
        attention = block.attention.flops(num_rows, length)
    if isinstance(block.ffn, SwiGLU):
        return attention + block.ffn.flops(num_tokens)
    return attention + block.ffn.flops(num_tokens, visit, "ffn" in seen, decoder.shared, executed)


def balanced_rows(decoder: Decoder, num_rows: int, sequence_length: int) -> Executed:
    """Assignments of each expert at each FFN site where the balance loss is at its minimum.

    Loads are as 1 to tau for computing and zero-computation experts; without a balance loss all
    experts count as equally loaded. Attention experts count as equally loaded.
    """
    rows: dict[Site, list[float]] = {}
    for cost in visit_costs(decoder, num_rows, sequence_length):
        block = decoder.layers[cost.visit.layer]
        assert isinstance(block, Block)
        num_tokens = num_rows * cost.length
        if isinstance(block.attention, MixtureAttention):
            config = block.attention.config
            share = config.num_assignments / config.num_experts
            rows[cost.visit.site("attention")] = [num_tokens * share] * config.num_experts
        if isinstance(block.ffn, MoE):
            moe = block.ffn.config
            taus = [loss.tau for loss in moe.router.losses if isinstance(loss, SwitchLoss)]
            load_N = 1 / moe.pool.load_weights(taus[0] if taus else 1.0)
            load_N = load_N * (num_tokens * moe.num_assignments / load_N.sum())
            for iteration in range(1, moe.iterations + 1):
                rows[cost.visit.site("ffn", iteration)] = load_N.tolist()
    return rows


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
    executed: Executed | None = None,
) -> int:
    """Forward FLOPs of `num_rows` full rows: executed ones with `executed`, else nominal."""
    return (
        sum(cost.flops for cost in visit_costs(decoder, num_rows, sequence_length, executed))
        + depth_router_flops(decoder, num_rows, sequence_length)
        + decoder.head_flops(num_rows * sequence_length)
    )


def training_flops(
    decoder: Decoder,
    num_rows: int,
    sequence_length: int,
    executed: Executed | None = None,
) -> int:
    """FLOPs of forward and backward together."""
    forward = forward_flops(decoder, num_rows, sequence_length, executed)
    return forward * (1 + BACKWARD_PER_FORWARD)

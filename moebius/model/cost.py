"""What a program costs: floating-point operations of the forward pass, counted exactly.

Counted are matrix products (2 per multiply-add): projections, attention scores over all pairs of
slots, experts, routers, head. Training counts as three times the forward pass. Where a product
needs fewer gradients (frozen or detached scorers, scores that nothing uses, first states of
recurrent units) that is too much, by about one per cent at most. The heads of distillation and a
teacher are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from moebius.model.bdh import BDHLayer
from moebius.model.block import Block
from moebius.model.decoder import Decoder
from moebius.model.extent import Extent, Work
from moebius.model.ffn import SwiGLU
from moebius.model.mixture_attention import MixtureAttention
from moebius.model.moe.layer import Executed, MoE
from moebius.model.moe.losses import SwitchLoss
from moebius.model.program import FINAL_STEP, Program, Site, Visit, kept_tokens
from moebius.model.recursion.config import ExpertChoiceConfig
from moebius.model.recursion.routing import DepthRouting

BACKWARD_PER_FORWARD = 2
"""each product of the forward pass costs two in the backward pass"""


@dataclass(frozen=True)
class VisitCost:
    """Forward FLOPs of the visits to a layer at one place of the program."""

    visit: Visit
    extent: Extent
    attention: int
    ffn: int
    """a layer without a feed-forward has 0"""

    @property
    def flops(self) -> int:
        """Both sublayers."""
        return self.attention + self.ffn


def planned_work(
    decoder: Decoder,
    num_rows: int,
    sequence_length: int,
    step: int = FINAL_STEP,
    program: Program | None = None,
) -> Work:
    """The work on full rows at an optimizer step, by default after all schedules have ended.

    Routed over depth as in training (`topk`), a row of one document; where tokens choose their
    depth, as if all depths were chosen as often and alike in all rows. Where an exit is drawn, the
    last one.
    """
    exits = decoder.config.exits
    heads = 1 + len(exits.after) if exits is not None and exits.draw == "all" else 1
    work = Work(head_tokens=heads * num_rows * sequence_length)
    for segment in (program or decoder.program).segments:
        candidates = sequence_length
        for share, visits in zip(segment.shares(step), segment.passes, strict=True):
            length = sequence_length
            if segment.router is not None:
                work.add_candidates(segment.site(visits[0].depth), num_rows * candidates)
                multiple = 1
                if isinstance(segment.router, ExpertChoiceConfig):
                    multiple = segment.router.multiple_of
                candidates = length = kept_tokens(share, sequence_length, multiple)
            for visit in visits:
                work.add_visit(visit, Extent.of(num_rows, length, sequence_length))
    return work


def visit_costs(decoder: Decoder, work: Work, executed: Executed | None = None) -> list[VisitCost]:
    """Forward FLOPs of every visit, in order of execution.

    `executed` gives the assignments that each expert computed at each site (executed cost); without
    it every token has its K costliest experts (nominal cost).
    """
    costs = []
    seen: set[str] = set()
    for visit, extent in work.visits.items():
        layer = decoder.layers[visit.layer]
        if isinstance(layer, BDHLayer):
            costs.append(VisitCost(visit, extent, layer.flops(extent), 0))
            continue
        block = cast(Block, layer)
        attention = _attention_flops(block, visit, extent, seen, executed)
        ffn = _ffn_flops(decoder, block, visit, extent, seen, executed)
        costs.append(VisitCost(visit, extent, attention, ffn))
        seen |= {"attention"} if isinstance(block.attention, MixtureAttention) else set()
        seen |= {"ffn"} if isinstance(block.ffn, MoE) else set()
    return costs


def _attention_flops(
    block: Block, visit: Visit, extent: Extent, seen: set[str], executed: Executed | None
) -> int:
    """`seen` are the sublayers that had a router before the visit."""
    if isinstance(block.attention, MixtureAttention):
        return block.attention.flops(extent, visit, "attention" in seen, executed)
    return block.attention.flops(extent, visit)


def _ffn_flops(
    decoder: Decoder,
    block: Block,
    visit: Visit,
    extent: Extent,
    seen: set[str],
    executed: Executed | None,
) -> int:
    if isinstance(block.ffn, SwiGLU):
        return block.ffn.flops(extent.tokens)
    return block.ffn.flops(extent.tokens, visit, "ffn" in seen, decoder.shared, executed)


def balanced_rows(decoder: Decoder, work: Work) -> Executed:
    """Assignments of each expert at each FFN site where the balance loss is at its minimum.

    Loads are as 1 to tau for computing and zero-computation experts; without a balance loss all
    experts count as equally loaded. Attention experts count as equally loaded.
    """
    rows: dict[Site, list[float]] = {}
    for visit, extent in work.visits.items():
        block = decoder.layers[visit.layer]
        if not isinstance(block, Block):
            continue
        if isinstance(block.attention, MixtureAttention):
            config = block.attention.config
            share = config.num_assignments / config.num_experts
            rows[visit.site("attention")] = [extent.tokens * share] * config.num_experts
        if isinstance(block.ffn, MoE):
            moe = block.ffn.config
            taus = [loss.tau for loss in moe.router.losses if isinstance(loss, SwitchLoss)]
            load_N = 1 / moe.pool.load_weights(taus[0] if taus else 1.0)
            load_N = load_N * (extent.tokens * moe.num_assignments / load_N.sum())
            for iteration in range(1, moe.iterations + 1):
                rows[visit.site("ffn", iteration)] = load_N.tolist()
    return rows


def depth_router_flops(decoder: Decoder, work: Work) -> int:
    """Forward FLOPs of the depth routers."""
    routings = {
        site: routing
        for routing in cast(Iterator[DepthRouting], decoder.depth_routers)
        for site in routing.sites
    }
    return sum(routings[site].flops(slots, site.depth) for site, slots in work.candidates.items())


def forward_flops(decoder: Decoder, work: Work, executed: Executed | None = None) -> int:
    """Forward FLOPs of some work: executed ones with `executed`, else nominal."""
    return (
        sum(cost.flops for cost in visit_costs(decoder, work, executed))
        + depth_router_flops(decoder, work)
        + decoder.head_flops(work.head_tokens)
    )


def training_flops(decoder: Decoder, work: Work, executed: Executed | None = None) -> int:
    """FLOPs of forward and backward together."""
    return forward_flops(decoder, work, executed) * (1 + BACKWARD_PER_FORWARD)

"""The Program of a model as a table: visits in order of execution, and what they cost."""

from collections.abc import Iterator

from rich.table import Table

from moebius.model.block import Block
from moebius.model.config import ModelConfig
from moebius.model.cost import (
    BACKWARD_PER_FORWARD,
    balanced_rows,
    forward_flops,
    planned_work,
    visit_costs,
)
from moebius.model.decoder import Decoder
from moebius.model.mixture_attention import MixtureAttention
from moebius.model.moe.layer import MoE
from moebius.model.recursion.config import ExpertChoiceConfig, TokenChoiceConfig

COLUMNS = ("visit", "layer", "depth", "share", "tokens", "experts", "parameters", "MFLOP/tok")


def program_rows(decoder: Decoder, sequence_length: int) -> Iterator[tuple[str, ...]]:
    """One row per visit; FLOPs are those of a forward pass, per token that enters the visit."""
    seen: set[str] = set()
    for cost in visit_costs(decoder, planned_work(decoder, 1, sequence_length)):
        layer, tokens = cost.visit.layer, cost.extent.tokens
        size = sum(p.numel() for p in decoder.layers[layer].parameters())
        yield (
            str(cost.visit.index),
            layer,
            str(cost.visit.depth),
            f"{tokens / sequence_length:.3f}",
            f"{tokens:,}",
            _experts(decoder, layer),
            "shared" if layer in seen else f"{size:,}",
            f"{cost.flops / tokens / 1e6:,.2f}",
        )
        seen.add(layer)


def program_table(decoder: Decoder, sequence_length: int) -> Table:
    """The rows for a terminal."""
    table = Table(title=f"Program at sequence length {sequence_length:,}")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in program_rows(decoder, sequence_length):
        table.add_row(*row)
    return table


def program_markdown(decoder: Decoder, sequence_length: int) -> str:
    """The rows and the summary for a page."""
    rows = [COLUMNS, ("--:",) * len(COLUMNS), *program_rows(decoder, sequence_length)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([table, *summary(decoder, sequence_length)])


def summary(decoder: Decoder, sequence_length: int) -> list[str]:
    """Totals of parameters and FLOPs."""
    total = sum(p.numel() for p in decoder.parameters())
    outside = decoder.embedding.weight.numel()
    if decoder.head is not None:
        outside += decoder.head.weight.numel()
    work = planned_work(decoder, 1, sequence_length)
    nominal = forward_flops(decoder, work) / sequence_length
    ffn = sum(cost.ffn for cost in visit_costs(decoder, work)) / sequence_length
    lines = [
        f"parameters: {total:,} ({total - outside:,} without embedding and head)",
        f"forward FLOPs per token: {nominal:,.0f} ({ffn:,.0f} in feed-forwards), "
        f"with backward {nominal * (1 + BACKWARD_PER_FORWARD):,.0f}",
    ]
    lines += _depth_lines(decoder.config)
    if decoder.shared:
        size = sum(p.numel() for p in decoder.shared.parameters())
        lines.append(f"used by several layers: {', '.join(decoder.shared)} ({size:,} parameters)")
    rows = balanced_rows(decoder, work)
    learned = [r.selector for r in decoder.config.routers.values() if r.selector.asks_router]
    if rows and all(selector.fixed_k for selector in learned) and learned:
        balanced = forward_flops(decoder, work, rows) / sequence_length
        ffn = sum(cost.ffn for cost in visit_costs(decoder, work, rows)) / sequence_length
        lines.append(
            "the FLOPs above give every token its costliest experts; at balance of the load: "
            f"{balanced:,.0f} ({ffn:,.0f} in feed-forwards)"
        )
    return lines


def _depth_lines(model: ModelConfig) -> list[str]:
    """What the table does not show of the depth."""
    depth, lines = model.depth, []
    if isinstance(depth.router, ExpertChoiceConfig):
        lines.append("each pass of the loop chooses its tokens; shares are those after all warm-up")
    elif isinstance(depth.router, TokenChoiceConfig):
        lines.append("each token chooses its passes; shares are those of a balanced choice")
    if depth.kv != "per_depth":
        lines.append(f"passes of a layer share keys and values: {depth.kv}")
    if depth.adapter is not None:
        lines.append(f"passes of a layer differ by an adapter: {depth.adapter.kind}")
    if model.exits is not None:
        after = ", ".join(str(number) for number in model.exits.after)
        lines.append(f"early exits after so many visits: {after}")
    return lines


def _experts(decoder: Decoder, layer: str) -> str:
    """Experts per token of computing + zero-computation ones, for each routed sublayer."""
    block = decoder.layers[layer]
    if not isinstance(block, Block):
        return ""
    parts = []
    if isinstance(block.attention, MixtureAttention):
        config = block.attention.config
        parts.append(f"attn {config.num_assignments} of {config.num_experts}")
    if isinstance(block.ffn, MoE):
        moe = block.ffn.config
        free = moe.num_experts - moe.pool.num_computing
        parts.append(f"{moe.num_assignments} of {moe.pool.num_computing}" + f"+{free}" * (free > 0))
    return ", ".join(parts) or "dense"

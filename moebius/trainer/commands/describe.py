"""moebius describe: the Program of a config as a table, its parameters and its cost."""

import argparse

import torch
from rich.console import Console
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
from moebius.trainer.config_file import load_config

TABLE_WIDTH = 100
COLUMNS = ("visit", "layer", "depth", "share", "tokens", "experts", "parameters", "MFLOP/tok")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius describe CONFIG [path.to.option=value ...]`."""
    parser.add_argument("config", help="run file, for example configs/moepp_mor.yaml")
    parser.add_argument("overrides", nargs="*", help="options of the file: model.hidden_size=512")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print visits in order of execution; nothing is allocated, so any size can be described."""
    config = load_config(arguments.config, arguments.overrides)
    with torch.device("meta"):
        decoder = Decoder(config.model)
    length = config.data.sequence_length
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)  # a pipe has no width that a table must fit into
    console.print(program_table(decoder, length))
    for line in summary(decoder, length):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def program_table(decoder: Decoder, sequence_length: int) -> Table:
    """One row per visit; FLOPs are those of a forward pass, per token that enters the visit."""
    table = Table(title=f"Program at sequence length {sequence_length:,}")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    seen: set[str] = set()
    for cost in visit_costs(decoder, planned_work(decoder, 1, sequence_length)):
        layer, tokens = cost.visit.layer, cost.extent.tokens
        size = sum(p.numel() for p in decoder.layers[layer].parameters())
        table.add_row(
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
    return table


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

"""moebius describe: the Program of a config as a table, its parameters and its cost."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from moebius.model.block import Block
from moebius.model.config import ModelConfig, MoEConfig
from moebius.model.cost import forward_flops, training_flops, visit_costs
from moebius.model.decoder import Decoder
from moebius.trainer.config_file import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius describe CONFIG [path.to.option=value ...]`."""
    parser.add_argument("config", help="run file, for example configs/moepp_mor.yaml")
    parser.add_argument("overrides", nargs="*", help="options of the file, as model.hidden_size=512")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print visits in order of execution; nothing is allocated, so any size can be described."""
    config = load_config(arguments.config, arguments.overrides)
    with torch.device("meta"):
        decoder = Decoder(config.model)
    length = config.data.sequence_length
    console.print(program_table(decoder, length))
    for line in summary_lines(decoder, length):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def program_table(decoder: Decoder, sequence_length: int) -> Table:
    """One row per visit; a layer's parameters are counted where it is first used."""
    table = Table(title=f"Program at sequence length {sequence_length:,}")
    for column in ("visit", "layer", "depth", "capacity", "tokens", "ffn", "parameters", "MFLOP/token"):
        table.add_column(column, justify="left" if column == "ffn" else "right")
    seen: set[str] = set()
    for cost in visit_costs(decoder, 1, sequence_length):
        block = decoder.layers[cost.visit.layer]
        assert isinstance(block, Block)
        first = cost.visit.layer not in seen
        seen.add(cost.visit.layer)
        table.add_row(
            str(cost.visit.index),
            cost.visit.layer,
            str(cost.visit.depth),
            f"{cost.capacity:.3f}",
            f"{cost.length:,}",
            ffn_label(decoder.config),
            f"{sum(p.numel() for p in block.parameters()):,}" if first else "shared",
            f"{cost.flops / cost.length / 1e6:.2f}",
        )
    return table


def ffn_label(config: ModelConfig) -> str:
    """What the second sublayer of every block is, in a few characters."""
    if not isinstance(config.ffn, MoEConfig):
        return f"dense {config.ffn.intermediate_size}"
    pool = " + ".join(f"{spec.count} {spec.kind}" for spec in config.ffn.experts)
    return f"top-{config.ffn.router.selector.top_k} of {pool}"


def summary_lines(decoder: Decoder, sequence_length: int) -> list[str]:
    """Totals of parameters and FLOPs."""
    total = sum(p.numel() for p in decoder.parameters())
    outside = sum(p.numel() for p in decoder.embedding.parameters())
    if decoder.head is not None:
        outside += sum(p.numel() for p in decoder.head.parameters())
    forward = forward_flops(decoder, 1, sequence_length) / sequence_length
    training = training_flops(decoder, 1, sequence_length) / sequence_length
    lines = [
        f"parameters           {total:,} ({total - outside:,} without embedding and head)",
        f"forward FLOPs/token  {forward:,.0f} (every assignment to an FFN expert)",
        f"training FLOPs/token {training:,.0f}",
    ]
    ffn = decoder.config.ffn
    if isinstance(ffn, MoEConfig) and ffn.balance is not None and ffn.num_experts > ffn.count("ffn"):
        share = balanced_ffn_share(ffn)
        rows = {cost.visit: cost.length * ffn.router.selector.top_k * share
                for cost in visit_costs(decoder, 1, sequence_length)}
        from moebius.model.context import Site
        by_site = {Site(f"layers.{v.layer}", v.depth): r for v, r in rows.items()}
        expected = forward_flops(decoder, 1, sequence_length, by_site) / sequence_length
        lines.append(
            f"at balance           {expected:,.0f} forward FLOPs/token, "
            f"{share:.1%} of assignments to FFN experts"
        )
    return lines


def balanced_ffn_share(ffn: MoEConfig) -> float:
    """Share of FFN assignments that minimises the balance loss: `tau E / (tau E + Z)`."""
    assert ffn.balance is not None
    load = ffn.balance.tau * ffn.count("ffn")
    return load / (load + ffn.num_experts - ffn.count("ffn"))

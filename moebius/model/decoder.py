"""The decoder: everything that has parameters, arranged by a Program. It does not run itself."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.kernels.rope import rope_tables
from moebius.model.block import Block
from moebius.model.config import ModelConfig, MoEConfig
from moebius.model.parameters import Linear, ParameterModule, ParameterSpec, RMSNorm, Role
from moebius.model.program import Program, Site, build_program
from moebius.model.recursion.router import DepthRouter


class Embedding(ParameterModule):
    """A row per token id."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.declare("weight", (vocab_size, hidden_size), ParameterSpec(Role.EMBED, std=std))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Look ids up, `[B, S, D]`."""
        return F.embedding(tokens_BS, self.weight)


class Decoder(ParameterModule):
    """Embedding, unique layers, depth routers, final norm and head of one model.

    Parameter names hold unique-layer names and global expert ids, never visits: a layer that is
    used N_r times is stored once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.program: Program = build_program(config.depth)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, config.init_std)
        predecessors = _predecessor_experts(config, self.program)
        self.layers = nn.ModuleDict(
            {name: Block(config, predecessors[name]) for name in self.program.layers}
        )
        # One list, because at most one segment of a program is routed (`depth_router_rules`).
        self.depth_routers = nn.ModuleList(
            DepthRouter(config, segment.router, capacity, Site("depth", number + 1))
            for segment in self.program.segments
            if segment.router is not None
            for number, capacity in enumerate(segment.capacities)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head: Linear | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, Role.HEAD, config.init_std)

    def rope(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of these positions."""
        attention = self.config.attention
        return rope_tables(positions_BS, attention.head_dim, attention.rope_theta)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Scores over the vocabulary, `[B, S, V]`."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(hidden_BSD, weight)

    def loss_sum(self, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """Sum of the cross-entropy over all labels, in nats and fp32."""
        logits_TV = self.logits(hidden_BSD).flatten(0, 1)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        return F.cross_entropy(logits_TV, labels_BS.flatten(), reduction="sum")

    def head_flops(self, num_tokens: int) -> int:
        """Forward FLOPs of the output head, tied or not."""
        return 2 * num_tokens * math.prod(self.embedding.weight.shape)


def _predecessor_experts(config: ModelConfig, program: Program) -> dict[str, int | None]:
    """For each unique layer, the size of the MoE pool that comes before it in any of its visits."""
    num_experts = config.ffn.num_experts if isinstance(config.ffn, MoEConfig) else None
    return {
        layer: num_experts
        if any(v.index > 0 and v.layer == layer for v in program.visits)
        else None
        for layer in program.layers
    }

"""The decoder: everything that has parameters, arranged by a Program. It does not run itself."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.kernels.registry import PLAIN, Kernels
from moebius.kernels.rope import rope_tables
from moebius.kernels.vocabulary import Vocabulary, locate
from moebius.model.bdh import BDHLayer
from moebius.model.block import Block
from moebius.model.config import BDHConfig, MixtureAttentionConfig, ModelConfig
from moebius.model.ledger import Ledger
from moebius.model.moe.config import MoEConfig
from moebius.model.moe.experts import ExpertPool
from moebius.model.moe.router import Router
from moebius.model.moe.scorers import ROUTER_GRU, GRUScorerConfig, RouterGRU
from moebius.model.parameters import Linear, ParameterModule, ParameterSpec, RMSNorm, Role
from moebius.model.program import LayerPlace, Program, Segment, build_program
from moebius.model.recursion.config import TokenChoiceConfig
from moebius.model.recursion.expert_choice import ExpertChoice
from moebius.model.recursion.routing import DepthRouting
from moebius.model.recursion.token_choice import TokenChoice
from moebius.model.region import WHOLE, Region


class Embedding(ParameterModule):
    """A row per token id."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.declare("weight", (vocab_size, hidden_size), ParameterSpec(Role.EMBED, std=std))
        self.vocabulary: Vocabulary | None = None
        self.region: Region = WHOLE

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Look ids up, `[B, S, D]`; an id that lives elsewhere has zeros here."""
        if self.vocabulary is None:
            return F.embedding(tokens_BS, self.weight)
        row_BS, is_here_BS = locate(tokens_BS, self.vocabulary, len(self.weight))
        here_BSD = F.embedding(row_BS, self.weight) * is_here_BS.unsqueeze(-1)
        return self.region.leave(here_BSD)


class Decoder(ParameterModule):
    """Embedding, unique layers, what several layers use, depth routers, final norm and head.

    Parameter names hold unique-layer names and global expert ids, never visits: a layer that is
    used N_r times is stored once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.program: Program = build_program(config.depth)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, config.init_std)
        places = layer_places(config, self.program)
        pools = pool_names(config, places)
        self.layers = nn.ModuleDict(
            {name: _layer(config, place, pools[name]) for name, place in places.items()}
        )
        self.shared = _shared_modules(config, places, pools)
        self.depth_routers = nn.ModuleList(
            _depth_routing(config, segment) for segment in self.program.segments if segment.router
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head_region: Region = WHOLE
        self.vocabulary: Vocabulary | None = None
        """which rows of embedding and head are here; None: all"""
        self.head: Linear | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, Role.HEAD, config.init_std)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """The residual stream in front of the first layer, `[B, S, D]`."""
        x_BSD: Tensor = self.embedding(tokens_BS)
        if isinstance(self.config.attention, BDHConfig):
            return F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=self.config.norm_eps)
        return x_BSD

    def rope(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of these positions."""
        attention = self.config.attention
        return rope_tables(positions_BS, attention.head_dim, attention.rope_theta)

    def head_input(self, x_BSD: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        """What the head reads of the stream."""
        return self.head_region.enter(self.norm(x_BSD, kernels))

    @property
    def head_weight(self) -> Tensor:
        """The output head, `[V, D]`, tied or not."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Scores over the vocabulary, `[B, S, V]`."""
        return F.linear(hidden_BSD, self.head_weight)

    @torch.no_grad()
    def update_routers(self, ledger: Ledger, step: int, applied: Tensor | None = None) -> None:
        """Let every router learn from the statistics of a whole step, see `Router.update`.

        Nothing is learnt where the bool `applied` is false; the host need not know.
        """
        routers = [module for module in self.modules() if isinstance(module, Router)]
        buffers = [buffer for router in routers for buffer in router.buffers()]
        before = [buffer.clone() for buffer in buffers] if applied is not None else []
        for router in routers:
            router.update(ledger, step)
        if applied is not None:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(applied, buffer, old))

    def head_flops(self, num_tokens: int) -> int:
        """Forward FLOPs of the output head, tied or not."""
        return 2 * num_tokens * math.prod(self.embedding.weight.shape)


def _layer(config: ModelConfig, place: LayerPlace, pool_name: str) -> nn.Module:
    if isinstance(config.attention, BDHConfig):
        return BDHLayer(config, config.attention)
    return Block(config, place, pool_name)


def _depth_routing(config: ModelConfig, segment: Segment) -> DepthRouting:
    if isinstance(segment.router, TokenChoiceConfig):
        return TokenChoice(config, segment.router, segment)
    assert segment.router is not None
    return ExpertChoice(config, segment.router, segment)


def layer_places(config: ModelConfig, program: Program) -> dict[str, LayerPlace]:
    """Where each unique layer stands, and how many experts the routers before it score."""
    names = program.layers
    predecessors: dict[str, dict[str, int]] = {name: {} for name in names}
    last: dict[str, int] = {}
    for visit in program.visits:
        predecessors[visit.layer] |= last
        if isinstance(config.attention, MixtureAttentionConfig):
            last["attention"] = config.attention.num_experts
        ffn = config.ffn_in(names.index(visit.layer), len(names))
        if isinstance(ffn, MoEConfig):
            last["ffn"] = ffn.num_experts
    return {
        name: LayerPlace(name, index, len(names), program.num_depths(name), predecessors[name])
        for index, name in enumerate(names)
    }


def pool_names(config: ModelConfig, places: Mapping[str, LayerPlace]) -> dict[str, str]:
    """For each unique layer the name of the pool that it would share with its neighbours."""
    if not isinstance(config.ffn, MoEConfig):
        return dict.fromkeys(places, "")
    names, number = {}, 0
    for name, place in places.items():
        names[name] = f"experts_{number // config.ffn.reuse}"
        number += isinstance(config.ffn_in(place.index, place.num_layers), MoEConfig)
    return names


def _shared_modules(
    config: ModelConfig, places: Mapping[str, LayerPlace], pools: Mapping[str, str]
) -> nn.ModuleDict:
    """Modules that several layers use: recurrent units of routers, pools of reused experts."""
    shared: dict[str, nn.Module] = {}
    for sublayer, router in config.routers.items():
        if isinstance(router.scorer, GRUScorerConfig):
            shared[f"{sublayer}_{ROUTER_GRU}"] = RouterGRU(router.scorer, router.frozen)
    for name, place in places.items():
        ffn = config.ffn_in(place.index, place.num_layers)
        if isinstance(ffn, MoEConfig) and ffn.reuse > 1 and pools[name] not in shared:
            shared[pools[name]] = ExpertPool(config.hidden_size, ffn, config.init_std)
    return nn.ModuleDict(shared)

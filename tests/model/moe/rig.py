"""Routers, pools and small models for the oracles, each built without the rest of a run."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moebius.model.carry import Carry
from moebius.model.config import AttentionConfig, DenseConfig, ModelConfig
from moebius.model.context import DepthContext, StepContext, TokenContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor, StepResult, TokenBatch
from moebius.model.ledger import NO_SAMPLES, Ledger
from moebius.model.moe.config import RouterConfig
from moebius.model.moe.losses import Load, Observation
from moebius.model.moe.pool import ExpertKind, PoolShape
from moebius.model.moe.router import Routed, Router
from moebius.model.moe.routing import RouteContext, Routing, Scores
from moebius.model.parameters import initialize
from moebius.model.program import Site, Visit
from moebius.model.recursion.config import DepthConfig
from moebius.model.rules import MODEL_RULES

MOEPP = (("ffn", 16), ("constant", 2), ("copy", 1), ("zero", 1))
SITE = Site("layers.0.ffn", 1)


def pool_of(*groups: tuple[ExpertKind, int], owners: int = 1) -> PoolShape:
    """A pool, ffn experts only where nothing else is said."""
    return PoolShape(groups, owners)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of their own generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def logits_of_varying_sharpness(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    """Logits `[1, T, N]` from nearly equal to nearly one-hot."""
    scale_T1 = torch.logspace(-2, 1, num_tokens, dtype=torch.float64).unsqueeze(1)
    return (scale_T1 * normal(num_tokens, num_experts, seed=seed)).unsqueeze(0)


def token_context(
    rows: int,
    length: int,
    segment_ids_BS: Tensor | None = None,
    valid_BS: Tensor | None = None,
    first_sample: int = 0,
) -> TokenContext:
    """Full rows of one document each, or of given ones."""
    if segment_ids_BS is None:
        segment_ids_BS = torch.zeros(rows, length, dtype=torch.int64)
    dummy = torch.zeros(rows, length, 1)
    samples = torch.arange(first_sample, first_sample + rows)
    tokens = TokenContext.of_rows(segment_ids_BS, dummy, dummy, samples)
    return tokens if valid_BS is None else replace(tokens, valid_BS=valid_BS)


def route_context(
    rows: int, length: int, step: int = 0, seed: int = 0, training: bool = False
) -> RouteContext:
    """What a stage sees of its tokens."""
    context = StepContext("topk", Ledger(), step, seed, training)
    return RouteContext(SITE, 0, token_context(rows, length), context)


def scores_of(probs_TN: Tensor, select_TN: Tensor | None = None) -> Scores:
    """What selectors and capacities see of given probabilities."""
    return Scores(probs_TN, probs_TN, probs_TN if select_TN is None else select_TN)


def observation(
    probs_TN: Tensor,
    ids_TK: Tensor,
    pool: PoolShape,
    rows: int = 1,
    last_step: Load | None = None,
) -> Observation:
    """What losses see of given probabilities and decisions, counted by a loop."""
    length = len(ids_TK) // rows
    counts_GN = torch.zeros(rows, pool.num_experts, dtype=probs_TN.dtype)
    for token, ids_K in enumerate(ids_TK.tolist()):
        for expert in ids_K:
            if expert >= 0:
                counts_GN[token // length, expert] += 1
    per_row = Load(
        counts_GN,
        torch.stack([part.sum(dim=0) for part in probs_TN.split(length)]),
        torch.full((rows,), float(length), dtype=probs_TN.dtype),
    )
    routing = Routing(ids_TK, probs_TN.gather(1, ids_TK.clamp(min=0)), probs_TN, probs_TN.log())
    valid_T = torch.ones(len(ids_TK), dtype=torch.bool)
    return Observation(routing, valid_T, per_row, last_step, pool)


def make_router(
    pool: PoolShape,
    hidden_size: int | None = None,
    depths: int = 1,
    dtype: torch.dtype = torch.float64,
    predecessor: int | None = None,
    **config: Any,
) -> Router:
    """A router alone. Without a hidden size its input is its logits: the weight is the identity."""
    model = ModelConfig(
        vocab_size=8,
        hidden_size=hidden_size or pool.num_experts,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2),
        ffn=DenseConfig(intermediate_size=8),
        depth=DepthConfig(num_layers=1),
        init_std=0.1,
    )
    sites = tuple(Site(SITE.module, number + 1) for number in range(depths))
    router = Router(model, RouterConfig.model_validate(config), pool, "ffn", sites, predecessor)
    initialize(router, 0)
    if hidden_size is None:
        with torch.no_grad():
            router.scorer.weight.copy_(torch.eye(pool.num_experts))
    return router.to(dtype)


class Visited(NamedTuple):
    """What came of one call of a router."""

    routed: Routed
    ledger: Ledger

    @property
    def ids_TK(self) -> Tensor:
        """Experts after capacities."""
        return self.routed.routing.ids_TK

    @property
    def counts_T(self) -> Tensor:
        """How many experts each token has."""
        return (self.ids_TK >= 0).sum(dim=1)

    def sums(self, name: str, depth: int = 1) -> Tensor:
        """A statistic of the router's site."""
        return self.ledger.statistics[Site("layers.0.ffn", depth)][name]


def visit(
    router: Router,
    x_BSD: Tensor,
    tokens: TokenContext | None = None,
    carry: Carry | None = None,
    shared: nn.ModuleDict | None = None,
    depth: int = 1,
    ledger: Ledger | None = None,
    **step: Any,
) -> Visited:
    """Call a router once, at one of its sites."""
    ledger = Ledger() if ledger is None else ledger
    context = DepthContext(
        Visit("0", depth, depth - 1),
        tokens or token_context(*x_BSD.shape[:2]),
        StepContext("topk", ledger, **step),
        nn.ModuleDict() if shared is None else shared,
    )
    site = next(site for site in router.sites if site.depth == depth)
    return Visited(router(x_BSD, carry or Carry(), context, site), ledger)


def build_model(dtype: torch.dtype = torch.float64, scale: float = 1.0, **tree: Any) -> Decoder:
    """A small decoder; `scale` multiplies matrices, so that what they do is not lost in rounding.

    A config that breaks a rule fails here.
    """
    base: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
        "ffn": {"kind": "dense", "intermediate_size": 24},
        "depth": {"num_layers": 2},
        "init_std": 0.1,
    }
    config = ModelConfig.model_validate(base | tree)
    assert [problem for rule in MODEL_RULES for problem in rule(config)] == []
    decoder = Decoder(config)
    initialize(decoder, 0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return decoder.to(dtype)


def random_tokens(rows: int, length: int, seed: int = 0) -> TokenBatch:
    """Random token ids, one document per row, samples 0, 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(0, 64, (rows, length), generator=generator)
    return SimpleNamespace(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        segment_ids_BS=torch.zeros_like(tokens_BS),
        positions_BS=torch.arange(length).expand(rows, -1),
        sample_ids_B=torch.arange(rows),
    )


def in_parts(batch: TokenBatch, rows_per_part: int) -> list[TokenBatch]:
    """A batch cut into micro-batches."""
    parts = {name: values.split(rows_per_part) for name, values in vars(batch).items()}
    names, columns = parts.keys(), zip(*parts.values(), strict=True)
    return [SimpleNamespace(**dict(zip(names, column, strict=True))) for column in columns]


class Step(NamedTuple):
    """What one optimizer step is made of."""

    result: StepResult
    gradients: dict[str, Tensor]


def gradients(
    decoder: Decoder,
    micro_batches: Sequence[TokenBatch],
    keep: range = NO_SAMPLES,
    **step: Any,
) -> Step:
    """Loss, ledger and gradients of a step in training; parameters stay as they are."""
    decoder.zero_grad(set_to_none=True)
    context = StepContext("topk", Ledger(keep=keep), training=True, **step)
    result = LocalExecutor(decoder).accumulate_gradients(micro_batches, context)
    found = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    return Step(result, found)


def hidden_states(decoder: Decoder, batch: TokenBatch, **step: Any) -> Tensor:
    """Final hidden states."""
    with torch.no_grad():
        return LocalExecutor(decoder).hidden(batch, StepContext("topk", Ledger(), **step))

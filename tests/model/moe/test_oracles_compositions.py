"""Oracles that build one system from the parts of another: their outputs must be the same."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.model.attention import Attention
from moebius.model.carry import Carry
from moebius.model.config import AttentionConfig
from moebius.model.context import DepthContext, StepContext, TokenContext
from moebius.model.decoder import Decoder
from moebius.model.ffn import SwiGLU
from moebius.model.ledger import Ledger
from moebius.model.mixture_attention import MixtureAttention
from moebius.model.moe.chain import chain_of_experts
from moebius.model.moe.config import ChainConfig
from moebius.model.moe.experts import ExpertPool, ZeroComputationExperts
from moebius.model.moe.layer import MoE
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.slicing import slice_dense
from moebius.model.parameters import initialize
from moebius.model.program import LayerPlace, Visit
from tests.model.moe.rig import (
    Step,
    build_model,
    gradients,
    hidden_states,
    normal,
    random_tokens,
)

WIDTH = 24


def moe(count: int = 4, width: int = WIDTH, **changes: Any) -> dict[str, Any]:
    """A feed-forward of ffn experts, without losses unless given."""
    router = {"losses": []} | changes.pop("router", {})
    experts = [{"kind": "ffn", "count": count, "intermediate_size": width}]
    return {"kind": "moe", "experts": experts, "router": router} | changes


def swiglu_of(decoder: Decoder, layer: str) -> SwiGLU:
    """The dense feed-forward of a layer."""
    ffn = decoder.layers[layer].ffn
    assert isinstance(ffn, SwiGLU)
    return ffn


def pool_in(decoder: Decoder, layer: str) -> ExpertPool:
    """The expert pool of a layer."""
    ffn = decoder.layers[layer].ffn
    assert isinstance(ffn, MoE)
    return ffn.pool(decoder.shared)


def copy_all_but(part: str, source: Decoder, target: Decoder) -> None:
    """Give a decoder another's parameters, except those of one sublayer."""
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if f".{part}." not in name:
                parameter.copy_(values[name])


def assert_same_step(got: Step, expected: Step, names: list[str] | None = None) -> None:
    """Loss and gradients of two models agree."""
    torch.testing.assert_close(got.result.loss, expected.result.loss, rtol=1e-12, atol=0)
    for name in names or list(expected.gradients):
        torch.testing.assert_close(
            got.gradients[name], expected.gradients[name], rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(
    "groups",
    [
        (("ffn", 2), ("constant", 3), ("copy", 2), ("zero", 2)),
        (("constant", 1),),
        (("copy", 1), ("zero", 1)),
    ],
)
def test_zero_computation_experts_equal_a_loop(groups: Any) -> None:
    """Oracle 5: the affine epilogue is a loop over constant, copy and zero experts to 1e-6, and so
    are its gradients with respect to tokens, weights and parameters."""
    pool = PoolShape(groups)
    experts = ZeroComputationExperts(7, pool, 0.5).double()
    initialize(experts, 0)
    x_TD = normal(9, 7).requires_grad_()
    chosen_TN = normal(9, pool.num_experts, seed=1) > 0
    weights_TN = (normal(9, pool.num_experts, seed=2).exp() * chosen_TN).requires_grad_()
    kinds = [kind for kind, count in groups for _ in range(count)]
    rows = []
    for x, weights in zip(x_TD, weights_TN, strict=True):
        y, constant = torch.zeros_like(x), 0
        for expert, kind in enumerate(kinds):
            if kind == "copy":
                y = y + weights[expert] * x
            if kind == "constant":
                alpha = (experts.mix[constant] @ x).softmax(dim=0)
                output = alpha[0] * x + alpha[1] * experts.constants[constant]
                y = y + weights[expert] * output
                constant += 1
        rows.append(y)
    naive_TD, y_TD = torch.stack(rows), experts(x_TD, weights_TN)
    torch.testing.assert_close(y_TD, naive_TD, rtol=0, atol=1e-6)
    used = [x_TD, weights_TN] + ([experts.mix, experts.constants] if "constant" in kinds else [])
    direction_TD = normal(9, 7, seed=3)
    got = torch.autograd.grad((y_TD * direction_TD).sum(), used)
    expected = torch.autograd.grad((naive_TD * direction_TD).sum(), used)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
SOFT = {"selector": {"kind": "all"}, "losses": []}


def mixture(decoder: Decoder, layer: str) -> MixtureAttention:
    """The attention experts of a layer."""
    attention = decoder.layers[layer].attention
    assert isinstance(attention, MixtureAttention)
    return attention


@pytest.mark.parametrize("kv", ["shared", "per_expert"])
@pytest.mark.parametrize("block", ["sequential", "parallel"])
def test_soft_attention_of_one_expert_is_attention(kv: str, block: str) -> None:
    """Oracle 19: BAM with one expert is the block without a mixture."""
    tree = ATTENTION | {"kind": "mixture", "num_experts": 1, "kv": kv, "router": SOFT}
    mixed, plain = (build_model(attention=a, block=block, scale=3.0) for a in (tree, ATTENTION))
    copy_all_but("attention", plain, mixed)
    with torch.no_grad():
        for layer in ("0", "1"):
            source, target = plain.layers[layer].attention, mixture(mixed, layer)
            target.q[0], target.out[0] = source.q.weight, source.out.weight
            target.k.weight.copy_(source.k.weight)
            target.v.weight.copy_(source.v.weight)
    batch = random_tokens(3, 12)
    torch.testing.assert_close(hidden_states(mixed, batch), hidden_states(plain, batch))
    got, expected = gradients(mixed, [batch]), gradients(plain, [batch])
    assert_same_step(got, expected, ["embedding.weight", "layers.0.attention.k.weight"])
    for layer in ("0", "1"):
        for name in ("q", "out"):
            torch.testing.assert_close(
                got.gradients[f"layers.{layer}.attention.{name}"][0],
                expected.gradients[f"layers.{layer}.attention.{name}.weight"],
                rtol=1e-9,
                atol=1e-12,
            )


@pytest.mark.parametrize("kv", ["shared", "per_expert"])
def test_soft_attention_is_the_weighted_sum_of_attentions(kv: str) -> None:
    """Oracle 19: with several experts `sum_m softmax(W x)_m Attention_m(x)`."""
    tree = ATTENTION | {"kind": "mixture", "num_experts": 3, "kv": kv, "router": SOFT}
    decoder = build_model(attention=tree, scale=3.0)
    layer = mixture(decoder, "0")
    positions_BS = torch.arange(10).expand(2, -1)
    segments_BS = (positions_BS > 5).long()
    tokens = TokenContext.of_rows(segments_BS, *decoder.rope(positions_BS), torch.arange(2))
    ctx = DepthContext(Visit("0", 1, 0), tokens, StepContext("topk", Ledger()))
    x_BSD = normal(2, 10, 16)
    y_BSD, _ = layer(x_BSD, Carry(), ctx)
    gates_BSN = (x_BSD @ layer.routers[0].scorer.weight.T).softmax(dim=-1)
    expected = torch.zeros_like(x_BSD)
    place = LayerPlace("0", 0, 2, 1, {})
    for expert in range(3):
        one = Attention(decoder.config, AttentionConfig.model_validate(ATTENTION), place).double()
        own = slice(8 * expert, 8 * expert + 8) if kv == "per_expert" else slice(None)
        with torch.no_grad():
            one.q.weight.copy_(layer.q[expert])
            one.out.weight.copy_(layer.out[expert])
            one.k.weight.copy_(layer.k.weight[own])
            one.v.weight.copy_(layer.v.weight[own])
        expected = expected + gates_BSN[..., expert : expert + 1] * one(x_BSD, Carry(), ctx)[0]
    torch.testing.assert_close(y_BSD, expected)


@pytest.mark.parametrize("residual", ["inner", "outer"])
@pytest.mark.parametrize("routers", ["per_iteration", "shared"])
def test_a_chain_of_one_turn_is_a_moe(residual: str, routers: str) -> None:
    """Oracle 19: Chain-of-Experts with C = 1 is the layer without a chain."""
    chain = {"iterations": 1, "residual": residual, "routers": routers}
    losses = {"router": {"losses": [{"kind": "switch"}]}}
    chained, plain = build_model(ffn=moe(chain=chain, **losses)), build_model(ffn=moe(**losses))
    batch = random_tokens(2, 10)
    assert torch.equal(hidden_states(chained, batch), hidden_states(plain, batch))
    assert_same_step(gradients(chained, [batch]), gradients(plain, [batch]))


@pytest.mark.parametrize("residual", ["inner", "outer", "both"])
@pytest.mark.parametrize("norm", ["per_iteration", "once"])
def test_a_chain_of_two_turns_by_hand(residual: Any, norm: Any) -> None:
    """Oracle 19: C = 2 written out, for each residual and norm."""
    x_BSD, zero = normal(1, 3, 4), Carry()

    def normed(x: Tensor) -> Tensor:
        return F.rms_norm(x, (4,))

    def turn(x: Tensor, carry: Carry, number: int) -> tuple[Tensor, Carry]:
        return number * x.sin(), carry

    config = ChainConfig(iterations=2, residual=residual, norm=norm)
    y_BSD, _ = chain_of_experts(x_BSD, zero, normed, turn, config)
    inner = 0 if residual == "outer" else 1
    if norm == "per_iteration":
        first = inner * x_BSD + normed(x_BSD).sin()
        last = inner * first + 2 * normed(first).sin()
    else:
        first = inner * normed(x_BSD) + normed(x_BSD).sin()
        last = inner * first + 2 * first.sin()
    torch.testing.assert_close(y_BSD, last if residual == "inner" else x_BSD + last)


def test_reuse_of_one_layer_is_a_moe() -> None:
    """Oracle 19: ReXMoE with r = 1: a pool in the place where groups of layers keep theirs does
    what the layer's own does."""
    plain, grouped = (build_model(ffn=moe(reuse=1)) for _ in range(2))
    assert all(isinstance(block.ffn, MoE) for block in grouped.layers.values())
    for block in grouped.layers.values():
        grouped.shared[block.ffn.pool_name], block.ffn.experts = block.ffn.experts, None
    assert len(grouped.shared) == 2
    batch = random_tokens(2, 10)
    assert torch.equal(hidden_states(grouped, batch), hidden_states(plain, batch))
    names = ["embedding.weight", "layers.0.ffn.routers.0.scorer.weight"]
    assert_same_step(gradients(grouped, [batch]), gradients(plain, [batch]), names)


def test_reuse_of_two_equal_layers_is_a_moe() -> None:
    """Oracle 19: two layers whose experts are the same: each sees every expert twice, and twice as
    many of them weigh what once as many do; the pool gets the gradients of both layers."""
    renormalize = {"losses": [], "weights": {"kind": "renormalize"}}
    plain = build_model(ffn=moe(router=renormalize), scale=3.0)
    doubled = renormalize | {"selector": {"kind": "top_k", "top_k": 4}}
    reused = build_model(ffn=moe(router=doubled, reuse=2))
    shared = pool_in(reused, "0")
    assert shared is pool_in(reused, "1")
    values = dict(plain.named_parameters())
    own = [pool_in(plain, layer).groups[0] for layer in ("0", "1")]
    with torch.no_grad():
        own[1].gate_up.copy_(own[0].gate_up)
        own[1].down.copy_(own[0].down)
        for name, parameter in reused.named_parameters():
            if "scorer" in name:
                parameter.copy_(values[name].repeat(2, 1))
            elif name in values:
                parameter.copy_(values[name])
        shared.groups[0].gate_up.copy_(own[0].gate_up.repeat(2, 1, 1))
        shared.groups[0].down.copy_(own[0].down.repeat(2, 1, 1))
    batch = random_tokens(2, 10)
    torch.testing.assert_close(hidden_states(reused, batch), hidden_states(plain, batch))
    got, expected = gradients(reused, [batch]), gradients(plain, [batch])
    assert_same_step(got, expected, ["embedding.weight"])
    both = sum(expected.gradients[f"layers.{layer}.ffn.experts.groups.0.down"] for layer in "01")
    halves = got.gradients["shared.experts_0.groups.0.down"].split(4)
    torch.testing.assert_close(halves[0] + halves[1], both)


def fill_first_group(source: Decoder, target: Decoder, num_slices: int) -> None:
    """Cut each layer's SwiGLU into the first experts of the other model's pool."""
    with torch.no_grad():
        for layer in source.layers:
            dense, group = swiglu_of(source, layer), pool_in(target, layer).groups[0]
            weights = (dense.gate.weight, dense.up.weight, dense.down.weight)
            gate_up, down = slice_dense(*weights, num_slices)
            group.gate_up.copy_(gate_up)
            group.down.copy_(down)


@pytest.mark.parametrize("num_slices", [1, 2, 4])
@pytest.mark.parametrize("selector", ["all", "top_k"])
def test_all_slices_are_the_dense_layer(num_slices: int, selector: str) -> None:
    """Oracle 19: slices of a SwiGLU, all of them chosen with weight 1, are the SwiGLU."""
    choice = {"kind": selector} | ({"top_k": num_slices} if selector == "top_k" else {})
    router = {"selector": choice, "weights": {"kind": "ones"}, "losses": []}
    sliced = build_model(ffn=moe(num_slices, WIDTH // num_slices, router=router))
    dense = build_model(ffn={"kind": "dense", "intermediate_size": WIDTH}, scale=3.0)
    copy_all_but("ffn", dense, sliced)
    fill_first_group(dense, sliced, num_slices)
    batch = random_tokens(2, 10)
    torch.testing.assert_close(
        hidden_states(sliced, batch), hidden_states(dense, batch), rtol=0, atol=1e-6
    )
    names = ["embedding.weight", "layers.0.attention.q.weight"]
    assert_same_step(gradients(sliced, [batch]), gradients(dense, [batch]), names)


def test_forced_big_experts_are_the_dense_model() -> None:
    """Oracle 19: Duo-LLM with every token forced to the big expert is the dense model, and with all
    forced to skip it is not."""
    experts = [
        {"kind": "copy"},
        {"kind": "ffn", "intermediate_size": WIDTH},
        {"kind": "ffn", "intermediate_size": 8},
    ]

    def duo(expert: int) -> Decoder:
        router = {
            "scorer": {"kind": "none"},
            "selector": {"kind": "fixed", "ids": [expert]},
            "weights": {"kind": "ones"},
            "losses": [],
        }
        decoder = build_model(ffn={"kind": "moe", "experts": experts, "router": router})
        copy_all_but("ffn", dense, decoder)
        fill_first_group(dense, decoder, 1)
        return decoder

    dense = build_model(ffn={"kind": "dense", "intermediate_size": WIDTH}, scale=3.0)
    batch = random_tokens(2, 10)
    assert pool_in(duo(0), "0").shape.groups == (("ffn", 1), ("ffn", 1), ("copy", 1))
    expected = hidden_states(dense, batch)
    torch.testing.assert_close(hidden_states(duo(0), batch), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(hidden_states(duo(1), batch), expected, atol=1e-2)
    assert not torch.allclose(hidden_states(duo(2), batch), expected, atol=1e-2)

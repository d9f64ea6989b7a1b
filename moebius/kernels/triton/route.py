"""`moebius.kernels.route` in Triton: scores, choice and statistics in one pass over the logits.

A program has all experts of a few tokens in its registers and takes the best one K times; there is
no sort. Shapes: T tokens, N experts, K the most experts that a token can have.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import route as definition
from moebius.kernels.route import Picked, RouteRule
from moebius.kernels.triton.depth_select import INT_MAX, INT_MIN, order_image
from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

TILE = 2048
"""logits that a program holds, of several tokens where there are few experts"""
WARPS = 4
TINY = tl.constexpr(1.1754943508222875e-38)
"""the smallest normal number of fp32"""


def route(
    logits_TN: Tensor,
    rule: RouteRule,
    bias_N: Tensor | None = None,
    threshold: float | Tensor | None = None,
) -> Picked:
    """Scores of the logits, and the experts chosen by `score + bias`, where -inf closes an expert.

    As `moebius.kernels.route.route`, to which goes what is not in fp32, bf16 or fp16, and what it
    refuses.
    """
    tensors = [t for t in (logits_TN, bias_N, threshold) if isinstance(t, Tensor)]
    readable = _is_readable(threshold, rule, logits_TN.shape[1])
    if not readable or any(t.dtype not in DTYPES for t in tensors):
        return definition.route(logits_TN, rule, bias_N, threshold)
    return Picked(*_Route.apply(logits_TN, rule, bias_N, threshold))  # type: ignore[no-untyped-call]


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    bars: tl.tensor,
    bar: tl.tensor,
    affinity: tl.tensor,
    ids: tl.tensor,
    logsumexp: tl.tensor,
    entropy: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    LOG_N: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIAS: tl.constexpr,
    SELECT: tl.constexpr,
    BARS: tl.constexpr,
    INCLUDE: tl.constexpr,
    MIN_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BARS is how many thresholds `bars` has: one, one for each expert, or 0, then it is `bar`."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    here, real = token < num_tokens, column < N
    inside = here[:, None] & real[None, :]
    at = token.to(tl.int64)[:, None] * N + column[None, :]
    # Tokens behind the end have logits of 0, which give numbers; experts behind the end have none.
    values = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(real[None, :], values, float("-inf"))
    largest = tl.max(values, axis=1)
    exponentials = tl.exp(values - largest[:, None])
    total = tl.sum(exponentials, axis=1)
    tl.store(logsumexp + token, largest + tl.log(total), mask=here)
    if SOFTMAX:
        scores = exponentials / total[:, None]
        probs = scores
    else:
        scores = 1 / (1 + tl.exp(-values))
        probs = scores / tl.maximum(tl.sum(scores, axis=1), TINY)[:, None]
    tl.store(affinity + at, scores, mask=inside)
    probs = tl.maximum(probs, TINY)
    terms = tl.where(real[None, :], probs * tl.log(probs), 0.0)
    tl.store(entropy + token, tl.minimum(-tl.sum(terms, axis=1) / LOG_N, 1.0), mask=here)

    select = scores
    if BIAS:
        select += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    key = tl.where(real[None, :], order_image(select), INT_MIN)
    if BARS == 1:
        bar = tl.load(bars).to(tl.float32)
    if SELECT == "threshold":
        if BARS > 1:
            bar = tl.load(bars + column, mask=real, other=0.0).to(tl.float32)[None, :]
        above = (select > bar) & real[None, :]
        best = tl.argmax(key, axis=1)
        nothing = (tl.max(above.to(tl.int32), axis=1) == 0)[:, None]
        key = tl.where(above | (nothing & (column[None, :] == best[:, None])), key, INT_MIN)
    if SELECT == "top_p":
        bar = tl.where(bar >= 1, float("inf"), bar)
        mass = tl.sum(tl.where(real[None, :], tl.maximum(select, 0.0), 0.0), axis=1)
        gathered = tl.zeros((TOKENS,), tl.float32)
        share = tl.zeros((TOKENS,), tl.float32)
    for place in range(K):
        best, expert = tl.max(key, axis=1, return_indices=True)
        kept = best > INT_MIN
        if SELECT == "top_p":
            score = (best ^ ((best >> 31) & INT_MAX)).to(tl.float32, bitcast=True)
            gathered += tl.maximum(score, 0.0)
            before = share
            share = gathered / mass
            kept = before <= bar if INCLUDE else share <= bar
            kept = (kept | (place < MIN_K)) & (tl.abs(score) < float("inf"))
        picked = tl.where(kept, expert, -1).to(tl.int64)
        tl.store(ids + token.to(tl.int64) * K + place, picked, mask=here)
        key = tl.where(column[None, :] == expert[:, None], INT_MIN, key)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(
    affinity: tl.tensor,
    d_affinity: tl.tensor,
    d_logits: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The derivative of the activation, from its value."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    inside = (token < num_tokens)[:, None] & (column < N)[None, :]
    at = token.to(tl.int64)[:, None] * N + column[None, :]
    scores = tl.load(affinity + at, mask=inside, other=0.0)
    upstream = tl.load(d_affinity + at, mask=inside, other=0.0)
    if SOFTMAX:
        result = scores * (upstream - tl.sum(scores * upstream, axis=1)[:, None])
    else:
        result = upstream * scores * (1 - scores)
    tl.store(d_logits + at, result.to(d_logits.dtype.element_ty), mask=inside)


class _Route(torch.autograd.Function):
    """The kernels, over logits that are contiguous."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TN: Tensor,
        rule: RouteRule,
        bias_N: Tensor | None,
        threshold: float | Tensor | None,
    ) -> tuple[Tensor, ...]:
        num_tokens, num_experts = logits_TN.shape
        constants = _constants(rule, num_experts, bias_N is not None, threshold)
        affinity_TN = logits_TN.new_empty(num_tokens, num_experts, dtype=torch.float32)
        ids_TK = logits_TN.new_empty(num_tokens, constants["K"], dtype=torch.int64)
        logsumexp_T, entropy_T = affinity_TN.new_empty(2, num_tokens).unbind()
        outputs = (affinity_TN, ids_TK, logsumexp_T, entropy_T)
        if num_tokens:
            bar = threshold if isinstance(threshold, float | int) else 0.0
            bars = logits_TN
            if isinstance(threshold, Tensor):
                bars = threshold.to(logits_TN.device).contiguous()
            bias = logits_TN if bias_N is None else bias_N.contiguous()
            forward_kernel[(triton.cdiv(num_tokens, constants["TOKENS"]),)](
                logits_TN.contiguous(),
                bias,
                bars,
                float(bar),
                *outputs,
                num_tokens,
                **constants,
                num_warps=WARPS,
            )
        ctx.save_for_backward(affinity_TN)
        ctx.dtype, ctx.softmax = logits_TN.dtype, constants["SOFTMAX"]
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_affinity_TN: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (affinity_TN,) = ctx.saved_tensors
        num_tokens, num_experts = affinity_TN.shape
        d_logits_TN = affinity_TN.new_empty(affinity_TN.shape, dtype=ctx.dtype)
        tile = _tile(num_experts)
        if num_tokens:
            backward_kernel[(triton.cdiv(num_tokens, tile["TOKENS"]),)](
                affinity_TN,
                d_affinity_TN.contiguous(),
                d_logits_TN,
                num_tokens,
                N=num_experts,
                SOFTMAX=ctx.softmax,
                **tile,
                num_warps=WARPS,
            )
        return d_logits_TN, None, None, None


def _is_readable(threshold: float | Tensor | None, rule: RouteRule, num_experts: int) -> bool:
    """Whether the kernel can read a threshold, or none, for a selector."""
    if threshold is None or rule.select == "top_k":
        return threshold is None and rule.select == "top_k"
    if not isinstance(threshold, Tensor) or threshold.shape in ((), (1,)):
        return True
    return rule.select == "threshold" and threshold.shape == (num_experts,)


def _constants(
    rule: RouteRule, num_experts: int, has_bias: bool, threshold: float | Tensor | None
) -> dict[str, Any]:
    return {
        "N": num_experts,
        "K": min(rule.max_k, num_experts),
        "LOG_N": math.log(max(num_experts, 2)),  # one expert: the sum is 0
        "SOFTMAX": rule.activation == "softmax",
        "BIAS": has_bias,
        "SELECT": rule.select,
        "BARS": threshold.numel() if isinstance(threshold, Tensor) else 0,
        "INCLUDE": rule.crossing == "include",
        "MIN_K": rule.min_k,
        **_tile(num_experts),
    }


def _tile(num_experts: int) -> dict[str, int]:
    """Tokens of a program, and the power of two that holds a token's experts."""
    block = triton.next_power_of_2(num_experts)
    return {"TOKENS": 64 if interpreted() else max(TILE // block, 1), "BLOCK": block}


def variants() -> Iterator[Variant]:
    """Every selector, over few and many experts; logits in fp32 and bf16."""
    numbers = dict.fromkeys(("bias", "bars", "affinity", "logsumexp", "entropy"), "*fp32")
    types = numbers | {"ids": "*i64", "bar": "fp32", "num_tokens": "i32"}
    for activation, select, max_k, num_experts, threshold, logits in (
        ("softmax", "top_k", 2, 8, None, "*fp32"),
        ("softmax", "top_k", 8, 64, None, "*bf16"),
        ("sigmoid", "top_k", 8, 256, None, "*fp32"),
        ("softmax", "top_p", 16, 64, 0.4, "*fp32"),
        ("sigmoid", "threshold", 16, 100, torch.zeros(100), "*fp32"),
    ):
        rule = RouteRule(activation, select, max_k)  # type: ignore[arg-type]
        constants = _constants(rule, num_experts, True, threshold)
        yield Variant(forward_kernel, types | {"logits": logits}, constants, num_warps=WARPS)
        yield Variant(
            backward_kernel,
            {"affinity": "*fp32", "d_affinity": "*fp32", "d_logits": logits, "num_tokens": "i32"},
            {"N": num_experts, "SOFTMAX": constants["SOFTMAX"], **_tile(num_experts)},
            num_warps=WARPS,
        )

"""The MoE layer against a dense MLP of the same FLOPs, and against its bare matrix products.

    .venv/bin/python benchmarks/layer.py

Forward and backward of 4096 tokens of width 512, experts of width 1024, top-2, in turns:

- `moe`: router, softmax and top-2 (`kernels.route`), sort, permute, `grouped_swiglu`, unpermute,
  with the kernels that a run would choose; tokens are drawn anew for every step, so the numbers of
  rows per expert change, as they do in training; `balanced` and `skewed`, where logits have an
  offset that falls with the expert's number;
- `dense`: one SwiGLU MLP over 8192 rows through autograd: the same products;
- `floor`: its six products alone, into memory that is there already.

Gradients of `moe` are compared with those through `grouped_swiglu_reference` in fp32, once for each
case.
Weights and tokens are in the precision of the products; the router is in fp32. Writes
benchmarks/results/layer-<machine>.json.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import NO_BF16, has_bf16, parser, precisions, prepare, product_rates, write_result
from models import TOP_K, model_config, routed
from rounds import Comparison, compare, show_comparison
from torch import Tensor

from moebius.kernels.grouped_swiglu import grouped_swiglu_reference
from moebius.kernels.permute import Order
from moebius.kernels.registry import Kernels
from moebius.kernels.route import RouteRule
from moebius.trainer.kernels import KernelsConfig, choose_kernels

CPU = torch.device("cpu")
RULE = RouteRule("softmax", "top_k", TOP_K)
WORST = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""largest error of a gradient that is let pass, relative to its largest element"""
SKEW = 0.7
"""logits of expert e are lowered by this times log(e + 1)"""


@dataclass(frozen=True)
class Size:
    """What is measured."""

    tokens: int = 4096
    hidden: int = 512
    width: int = 1024
    experts: tuple[int, ...] = (8, 16, 64)
    rounds: int = 9


class Given(NamedTuple):
    """What a round is given: tokens, the gradient of the output, and both once per assignment."""

    x_TD: Tensor
    dy_TD: Tensor
    x_RD: Tensor
    dy_RD: Tensor


@dataclass
class Layer:
    """Weights of a MoE layer."""

    kernels: Kernels
    router_ED: Tensor
    offset_E: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    ids_TK: Tensor | None = None
    """what was chosen at the last step"""

    @classmethod
    def build(cls, size: Size, experts: int, skewed: bool, dtype: torch.dtype) -> "Layer":
        """Random weights, and the kernels of a model of such layers."""
        config = model_config(size.hidden, 1, 8, 256, routed(size.width, experts))
        kernels, _ = choose_kernels(KernelsConfig(), config, CPU, dtype)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * float(shape[-1]) ** -0.5

        offset_E = -SKEW * torch.arange(1, experts + 1).log()
        return cls(
            kernels,
            draw(experts, size.hidden).requires_grad_(),
            offset_E if skewed else torch.zeros(experts),
            draw(experts, 2 * size.width, size.hidden).to(dtype).requires_grad_(),
            draw(experts, size.hidden, size.width).to(dtype).requires_grad_(),
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """`[T, D]`."""
        kernels = self.kernels
        logits_TE = F.linear(x_TD.float(), self.router_ED, self.offset_E)
        picked = kernels.route(logits_TE, RULE)
        self.ids_TK = picked.ids_TK
        weights_TK = picked.affinity_TN.gather(1, picked.ids_TK)
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        order: Order = kernels.sort_by_expert(picked.ids_TK, len(self.router_ED), kernels.alignment)
        rows_RD, weights_R = kernels.permute(x_TD, weights_TK, order)
        out_RD = kernels.grouped_swiglu(
            rows_RD, weights_R, self.gate_up_E2FD, self.down_EDF, order.ends_E
        )
        return kernels.unpermute(out_RD, order, torch.zeros_like(x_TD))

    def step(self, given: Given) -> tuple[Tensor, ...]:
        """Gradients of tokens, router and experts."""
        inputs = (given.x_TD, self.router_ED, self.gate_up_E2FD, self.down_EDF)
        return torch.autograd.grad(self.forward(given.x_TD), inputs, given.dy_TD)

    @property
    def max_over_mean(self) -> float:
        """Load of the fullest expert at the last step, over the mean."""
        assert self.ids_TK is not None
        counts_E = self.ids_TK.flatten().bincount(minlength=len(self.router_ED))
        return float(counts_E.max() / counts_E.float().mean())


def dense_step(gate_up_2FD: Tensor, down_DF: Tensor) -> Callable[[Given], tuple[Tensor, ...]]:
    """A dense MLP over as many rows as there are assignments."""

    def step(given: Given) -> tuple[Tensor, ...]:
        gate, up = F.linear(given.x_RD, gate_up_2FD).chunk(2, dim=-1)
        y_RD = F.linear(F.silu(gate) * up, down_DF)
        return torch.autograd.grad(y_RD, (given.x_RD, gate_up_2FD, down_DF), given.dy_RD)

    return step


def floor_step(size: Size, gate_up_2FD: Tensor, down_DF: Tensor) -> Callable[[Given], None]:
    """The six products of the dense MLP, written into memory that is there already."""
    gate_up_2FD, down_DF = gate_up_2FD.detach(), down_DF.detach()
    rows, dtype = size.tokens * TOP_K, down_DF.dtype
    generator = torch.Generator().manual_seed(2)
    act_RF = torch.randn(rows, size.width, generator=generator).to(dtype)
    d_inner_R2F = torch.randn(rows, 2 * size.width, generator=generator).to(dtype)
    inner_R2F, d_act_RF = torch.empty_like(d_inner_R2F), torch.empty_like(act_RF)
    y_RD, dx_RD = (torch.empty(rows, size.hidden, dtype=dtype) for _ in range(2))
    d_gate_up_2FD, d_down_DF = torch.empty_like(gate_up_2FD), torch.empty_like(down_DF)

    def step(given: Given) -> None:
        x_RD, dy_RD = given.x_RD.detach(), given.dy_RD
        torch.mm(x_RD, gate_up_2FD.T, out=inner_R2F)
        torch.mm(act_RF, down_DF.T, out=y_RD)
        torch.mm(dy_RD, down_DF, out=d_act_RF)
        torch.mm(dy_RD.T, act_RF, out=d_down_DF)
        torch.mm(d_inner_R2F, gate_up_2FD, out=dx_RD)
        torch.mm(d_inner_R2F.T, x_RD, out=d_gate_up_2FD)

    return step


def draws(size: Size, dtype: torch.dtype) -> Callable[[int], Given]:
    """Tokens and the gradient of the output, new ones for every number."""

    def draw(number: int) -> Given:
        generator = torch.Generator().manual_seed(number)
        x_TD, dy_TD = torch.randn(2, size.tokens, size.hidden, generator=generator).to(dtype)
        x_RD, dy_RD = x_TD.repeat(TOP_K, 1), dy_TD.repeat(TOP_K, 1)
        return Given(x_TD.clone().requires_grad_(), dy_TD, x_RD.requires_grad_(), dy_RD)

    return draw


def definition(
    rows_RD: Tensor, weights_R: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """`grouped_swiglu_reference` in fp32."""
    return grouped_swiglu_reference(
        rows_RD.float(), weights_R, gate_up_E2FD.float(), down_EDF.float(), ends_E
    )


def gradient_error(layer: Layer, given: Given) -> float:
    """Of all gradients the largest difference from the reference, relative to largest elements.

    Raises AssertionError where it is more than rounding.
    """
    plain = replace(layer, kernels=Kernels(grouped_swiglu=definition))
    pairs = zip(layer.step(given), plain.step(given), strict=True)
    error = max(float((own - ref).abs().max() / ref.abs().max()) for own, ref in pairs)
    if not error <= WORST[given.x_TD.dtype]:
        raise AssertionError(f"gradients differ by {error:.1e} of their largest element")
    return error


def measure(
    size: Size, experts: int, skewed: bool, dtype: torch.dtype
) -> tuple[Comparison, dict[str, object]]:
    """One case."""
    layer, draw = Layer.build(size, experts, skewed, dtype), draws(size, dtype)
    error = gradient_error(layer, draw(0))
    generator = torch.Generator().manual_seed(1)
    gate_up_2FD = torch.randn(2 * size.width, size.hidden, generator=generator).to(dtype)
    down_DF = torch.randn(size.hidden, size.width, generator=generator).to(dtype)
    weights = (gate_up_2FD.requires_grad_(), down_DF.requires_grad_())
    candidates: dict[str, Callable[[Given], object]] = {
        "dense": dense_step(*weights),
        "moe": layer.step,
        "floor": floor_step(size, *weights),
    }
    taken = compare(candidates, "dense", draw, size.rounds)
    return taken, {
        "experts": experts,
        "routing": "skewed" if skewed else "balanced",
        "max_over_mean_load": round(layer.max_over_mean, 2),
        "alignment": layer.kernels.alignment,
        "gradient_error": error,
        "flops": 18 * size.tokens * TOP_K * size.hidden * size.width,
        "speed_over_dense": round(1 / taken.ratio("moe"), 4),
        "speed_over_floor": round(_speed_over_floor(taken), 4),
        "times": taken.report(),
    }


def _speed_over_floor(taken: Comparison) -> float:
    """Of the MoE layer, again a median of ratios inside of rounds."""
    return 1 / replace(taken, baseline="floor").ratio("moe")


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__).parse_args()
    size = Size(256, 64, 128, (8,), 2) if arguments.quick else Size()
    prepared = prepare()
    found: dict[str, object] = {} if has_bf16() else {"bf16": NO_BF16}
    for name, dtype in precisions().items():
        cases = []
        for experts, skewed in product(size.experts, (False, True)):
            taken, case = measure(size, experts, skewed, dtype)
            title = f"{name}, {experts} experts, {case['routing']}"
            show_comparison(
                f"{title}, fullest expert {case['max_over_mean_load']} of the mean", taken
            )
            cases.append(case)
        found[name] = cases
    result = {
        "settings": prepared,
        "product_gflops": product_rates(),
        "layer": f"{size.tokens} tokens, width {size.hidden}, experts of {size.width}, top-{TOP_K}",
        "rounds": size.rounds,
        **found,
    }
    write_result("layer", result, arguments.out)


if __name__ == "__main__":
    main()

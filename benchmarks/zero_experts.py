"""What zero-computation experts save: the expert forward of MoE++ against vanilla experts.

    .venv/bin/python benchmarks/zero_experts.py

Both have 8 FFN experts and top-2; MoE++ has a zero, a copy and two constant experts beside them
(arXiv 2410.07348), no capacity. Timed is the forward pass of the pool, sort and combination
included, router excluded, in turns. Decisions are drawn so that exactly the share

    rho = tau * N_ffn / (tau * N_ffn + N_zero)

of all assignments goes to FFN experts, which is where the balance loss with that tau has its
minimum; all experts of a sort are equally likely. If nothing but FFN rows cost time, vanilla would
take 1 / rho times as long; reported are the ratio that is measured and the part of 1 / rho that it
is. Writes benchmarks/results/zero_experts-<machine>.json.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from machine import NO_BF16, has_bf16, parser, precisions, prepare, product_rates, write_result
from models import model_config
from rounds import Comparison, compare, show
from torch import Tensor

from moebius.kernels.registry import Kernels
from moebius.model.config import ModelConfig
from moebius.model.context import TokenContext
from moebius.model.moe.config import MoEConfig
from moebius.model.moe.experts import ExpertPool
from moebius.model.parameters import initialize
from moebius.trainer.kernels import KernelsConfig, choose_kernels

TAUS = (0.75, 0.5, 0.25, 0.1)
SIZES = ((512, 1024), (768, 2048))
"""width of the model and of an expert"""
TOKENS = 4096
NUM_FFN, NUM_ZERO = 8, 4
IN_PLACE: list[dict[str, Any]] = [
    {"kind": "constant", "count": 2},
    {"kind": "copy"},
    {"kind": "zero"},
]
ROUNDS = 15


def share_of(tau: float) -> float:
    """rho, see above."""
    return tau * NUM_FFN / (tau * NUM_FFN + NUM_ZERO)


def config_of(hidden: int, width: int, in_place: bool) -> ModelConfig:
    """A model of such layers."""
    experts = [{"kind": "ffn", "count": NUM_FFN, "intermediate_size": width}]
    ffn = {"kind": "moe", "experts": experts + (IN_PLACE if in_place else [])}
    return model_config(hidden, 1, 8, 256, ffn)


def draw_ids(tokens: int, share: float, generator: torch.Generator) -> Tensor:
    """Two different experts for each token, `round(2 * tokens * share)` of them FFN, `[T, 2]`."""
    is_ffn = torch.zeros(2 * tokens, dtype=torch.bool)
    chosen = torch.randperm(2 * tokens, generator=generator)[: round(2 * tokens * share)]
    is_ffn[chosen] = True
    is_ffn_T2 = is_ffn.view(tokens, 2)
    among_T2 = torch.where(is_ffn_T2, NUM_FFN, NUM_ZERO)
    drawn_T2 = (torch.rand(tokens, 2, generator=generator) * among_T2).long()
    # Of a pair of the same sort the second is one of those that the first is not.
    is_pair_T = is_ffn_T2[:, 0] == is_ffn_T2[:, 1]
    others_T = among_T2[:, 1] - 1
    further_T = 1 + (torch.rand(tokens, generator=generator) * others_T).long()
    second_T = (drawn_T2[:, 0] + further_T) % among_T2[:, 1]
    drawn_T2[:, 1] = torch.where(is_pair_T, second_T, drawn_T2[:, 1])
    return drawn_T2 + torch.where(is_ffn_T2, 0, NUM_FFN)


def pool_of(
    hidden: int, width: int, in_place: bool, dtype: torch.dtype
) -> tuple[ExpertPool, Kernels]:
    """Experts whose products are in a precision, and kernels as a run would choose them."""
    config = config_of(hidden, width, in_place)
    assert isinstance(config.ffn, MoEConfig)
    pool = ExpertPool(hidden, config.ffn, config.init_std)
    initialize(pool, 0)
    pool.groups.to(dtype)
    kernels, _ = choose_kernels(KernelsConfig(), config, torch.device("cpu"), dtype)
    return pool, kernels


def context_of(tokens: int) -> TokenContext:
    """One row of one document; experts of these kinds do not look at it."""
    zeros = torch.zeros(1, tokens, dtype=torch.int64)
    table = torch.zeros(1, tokens, 2)
    return TokenContext.of_rows(zeros, table, table, torch.zeros(1, dtype=torch.int64))


Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""of tokens `[T, D]`, ids and weights `[T, K]`"""


def forward_of(pool: ExpertPool, kernels: Kernels, tokens: TokenContext) -> Forward:
    """The expert forward, without gradients."""

    @torch.no_grad()
    def forward(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD: Tensor = pool(x_TD, ids_TK, weights_TK, tokens, None, kernels)
        return out_TD

    return forward


def measure(hidden: int, width: int, tokens: int, dtype: torch.dtype, rounds: int) -> Comparison:
    """All taus and vanilla in turns, decisions drawn anew for every round."""
    names = {"vanilla": 1.0} | {f"tau {tau}": share_of(tau) for tau in TAUS}
    forwards = {
        in_place: forward_of(*pool_of(hidden, width, in_place, dtype), context_of(tokens))
        for in_place in (False, True)
    }

    def draw(number: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(number)
        x_TD = torch.randn(tokens, hidden, generator=generator).to(dtype)
        weights_TK = torch.rand(tokens, 2, generator=generator)
        return {n: (x_TD, draw_ids(tokens, s, generator), weights_TK) for n, s in names.items()}

    def run(name: str, given: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        return forwards[name != "vanilla"](*given[name])

    return compare({name: partial(run, name) for name in names}, "vanilla", draw, rounds)


def cases_of(taken: Comparison) -> list[dict[str, float]]:
    """For each tau the ratio of times beside that of FFN rows."""
    cases = []
    for tau in TAUS:
        share, ratio = share_of(tau), 1 / taken.ratio(f"tau {tau}")
        cases.append(
            {
                "tau": tau,
                "ffn_share": round(share, 4),
                "one_over_share": round(1 / share, 4),
                "speed_over_vanilla": round(ratio, 4),
                "part_of_one_over_share": round(ratio * share, 4),
            }
        )
    return cases


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__).parse_args()
    quick = arguments.quick
    tokens, rounds = (256, 2) if quick else (TOKENS, ROUNDS)
    sizes = ((64, 128),) if quick else SIZES
    prepared = prepare()
    found: dict[str, object] = {} if has_bf16() else {"bf16": NO_BF16}
    for name, dtype in precisions().items():
        of_size = []
        for hidden, width in sizes:
            taken = measure(hidden, width, tokens, dtype, rounds)
            cases = cases_of(taken)
            rows = [[f"tau {case['tau']}", *list(case.values())[1:]] for case in cases]
            columns = ("", "FFN share", "1 / share", "vanilla / MoE++ time", "of 1 / share")
            show(f"{name}, width {hidden}, experts of {width}", columns, rows)
            of_size.append(
                {"hidden": hidden, "width": width, "taus": cases, "times": taken.report()}
            )
        found[name] = of_size
    result = {
        "settings": prepared,
        "product_gflops": product_rates(),
        "experts": f"{NUM_FFN} FFN, zero, copy, 2 constant; top-2, no capacity; {tokens} tokens",
        "ffn_share": "drawn: tau * N_ffn / (tau * N_ffn + N_zero) of all assignments, exactly",
        "rounds": rounds,
        **found,
    }
    write_result("zero_experts", result, arguments.out)


if __name__ == "__main__":
    main()

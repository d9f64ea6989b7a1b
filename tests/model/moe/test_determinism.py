"""The same numbers every time, whatever thread gets where first."""

import torch

from moebius.model.context import TokenContext
from moebius.model.moe.config import ExpertSpec, MoEConfig
from moebius.model.moe.experts import ExpertPool
from moebius.model.parameters import initialize


def test_gradients_of_many_experts_per_token_repeat_bit_for_bit() -> None:
    """Four rows of each token are added up, in a batch large enough for several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        moe = MoEConfig(experts=(ExpertSpec(kind="ffn", count=8, intermediate_size=16),))
        pool = ExpertPool(64, moe, std=0.1)
        initialize(pool, 0)
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(8192, 64, generator=generator, requires_grad=True)
        ids_TK = torch.rand(8192, 8, generator=generator).argsort(dim=1)[:, :4]
        weights_TK = torch.rand(8192, 4, generator=generator)
        row = torch.zeros(1, 8192, dtype=torch.int64)
        tokens = TokenContext.of_rows(row, row, row, row[0, :1])
        results = []
        for _ in range(5):
            y_TD = pool(x_TD, ids_TK, weights_TK, tokens)
            results.append((y_TD, *torch.autograd.grad(y_TD.square().sum(), x_TD)))
        for other in results[1:]:
            for first, again in zip(results[0], other, strict=True):
                assert torch.equal(first, again)
    finally:
        torch.set_num_threads(threads)

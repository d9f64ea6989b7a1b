"""One call of each operation with backends for GPUs, forward and backward, and what it must move.

The floor is the least that an operation has to read and write, each element once, or the FLOPs of
its products; what backends move beyond that is theirs.

Shapes: T tokens, D hidden, E experts, K of them for a token, R = T * K rows; others as in the
modules of `moebius.kernels`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import TOP_K
from torch import Tensor

from moebius.kernels.attention import Sight, document_mask
from moebius.kernels.cross_entropy import linear_cross_entropy
from moebius.kernels.permute import sort_by_expert
from moebius.kernels.registry import Kernels, Operation
from moebius.kernels.rope import rope_tables
from moebius.kernels.route import RouteRule

EPS = 1e-5


@dataclass(frozen=True)
class Size:
    """Of all operations."""

    rows: int = 8
    length: int = 2048
    hidden: int = 2048
    width: int = 2816
    experts: int = 64
    heads: int = 16
    kv_heads: int = 16
    vocabulary: int = 32_000

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length

    @property
    def head_dim(self) -> int:
        """C."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class Work:
    """One call of an operation, forward and backward."""

    run: Callable[[Kernels], object]
    bytes: int = 0
    """that have to be moved"""
    flops: int = 0
    """of products"""


class Maker:
    """Makes random tensors on a device."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """A leaf that takes a gradient."""
        values = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype).requires_grad_()

    def pair(self, *shape: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A leaf, and a gradient for a result of its shape."""
        return self.draw(*shape, dtype=dtype), self.draw(*shape, dtype=dtype).detach()

    def integers(self, most: int, *shape: int) -> Tensor:
        """From 0 to `most`, excluded."""
        return torch.randint(0, most, shape, generator=self.generator, device=self.device)


def permute(make: Maker) -> Work:
    """Sort, tokens to rows, rows to tokens."""
    size = make.size
    x_TD, dy_TD = make.pair(size.tokens, size.hidden)
    weights_TK = make.draw(size.tokens, TOP_K, dtype=torch.float32)
    ids_TK = make.integers(size.experts, size.tokens, TOP_K)
    y_TD = torch.zeros_like(x_TD)

    def run(kernels: Kernels) -> object:
        order = kernels.sort_by_expert(ids_TK, size.experts, kernels.alignment)
        rows_RD, _ = kernels.permute(x_TD, weights_TK, order)
        return torch.autograd.grad(kernels.unpermute(rows_RD, order, y_TD), x_TD, dy_TD)

    # Four passes between T tokens and T * K rows, one of which reads y, too.
    return Work(run, x_TD.nbytes * (4 * (1 + TOP_K) + 1) + 8 * ids_TK.numel())


def grouped_gemm(make: Maker) -> Work:
    """SwiGLU experts, rows of balanced experts but for chance."""
    size = make.size
    ids_TK = make.integers(size.experts, size.tokens, TOP_K)
    order = sort_by_expert(ids_TK, size.experts)
    num_rows = size.tokens * TOP_K
    rows_RD, dy_RD = make.pair(num_rows, size.hidden)
    weights_R = make.draw(num_rows, dtype=torch.float32)
    gate_up = make.draw(size.experts, 2 * size.width, size.hidden, scale=size.hidden**-0.5)
    down = make.draw(size.experts, size.hidden, size.width, scale=size.width**-0.5)

    def run(kernels: Kernels) -> object:
        y_RD = kernels.grouped_swiglu(rows_RD, weights_R, gate_up, down, order.ends_E)
        return torch.autograd.grad(y_RD, (rows_RD, weights_R, gate_up, down), dy_RD)

    return Work(run, flops=18 * num_rows * size.hidden * size.width)


def zero_experts(make: Maker) -> Work:
    """A copy and two constant experts."""
    size = make.size
    x_TD, dy_TD = make.pair(size.tokens, size.hidden)
    exact = torch.float32
    copy_T, constant_TC = (
        make.draw(size.tokens, dtype=exact),
        make.draw(size.tokens, 2, dtype=exact),
    )
    mix_TC2 = make.draw(size.tokens, 2, 2, dtype=exact)
    constants_CD = make.draw(2, size.hidden, dtype=exact)
    inputs = (x_TD, copy_T, constant_TC, mix_TC2, constants_CD)

    def run(kernels: Kernels) -> object:
        return torch.autograd.grad(kernels.affine_experts(*inputs), inputs, dy_TD)

    # x and the result; x, the result's gradient and that of x; weights and logits, twice and out.
    return Work(run, 5 * x_TD.nbytes + 3 * (copy_T.nbytes + constant_TC.nbytes + mix_TC2.nbytes))


def route(make: Maker) -> Work:
    """Softmax and top-2."""
    size, rule = make.size, RouteRule("softmax", "top_k", TOP_K)
    logits_TN, d_TN = make.pair(size.tokens, size.experts, dtype=torch.float32)

    def run(kernels: Kernels) -> object:
        return torch.autograd.grad(kernels.route(logits_TN, rule).affinity_TN, logits_TN, d_TN)

    return Work(run, 5 * logits_TN.nbytes + 8 * TOP_K * size.tokens)


def depth_select(make: Maker) -> Work:
    """Two thirds of the tokens out of their rows and back."""
    size = make.size
    kept = 2 * size.length // 3
    x_BSD, dy_BSD = make.pair(size.rows, size.length, size.hidden)
    scores_BS = make.draw(size.rows, size.length, dtype=torch.float32).detach()
    gate_BK = make.draw(size.rows, kept, dtype=torch.float32)

    def run(kernels: Kernels) -> object:
        index_BK = kernels.top_k_positions(scores_BS, kept)
        rows_BKD = kernels.take_rows(x_BSD, index_BK)
        y_BSD = kernels.add_gated_rows(x_BSD, index_BK, gate_BK, rows_BKD)
        return torch.autograd.grad(y_BSD, (x_BSD, gate_BK), dy_BSD)

    # Rows: 2 taken, 1 added, 3 for gradients of the addition, 1 of taking; x: 2 added, 2 gradient.
    row_bytes = x_BSD.nbytes // size.length * kept
    return Work(run, 7 * row_bytes + 4 * x_BSD.nbytes + scores_BS.nbytes)


def rms_norm(make: Maker) -> Work:
    """Of all tokens."""
    size = make.size
    x_TD, dy_TD = make.pair(size.tokens, size.hidden)
    weight_D = make.draw(size.hidden, dtype=torch.float32)

    def run(kernels: Kernels) -> object:
        return torch.autograd.grad(kernels.rms_norm(x_TD, weight_D, EPS), (x_TD, weight_D), dy_TD)

    return Work(run, 5 * x_TD.nbytes)


def rope(make: Maker) -> Work:
    """Of all queries."""
    size = make.size
    shape = (size.rows, size.length, size.heads, size.head_dim)
    x_BSHC, dy_BSHC = make.pair(*shape)
    positions_BS = torch.arange(size.length, device=make.device).expand(size.rows, -1)
    cos_BSC, sin_BSC = rope_tables(positions_BS, size.head_dim, 10_000.0)

    def run(kernels: Kernels) -> object:
        return torch.autograd.grad(kernels.apply_rope(x_BSHC, cos_BSC, sin_BSC), x_BSHC, dy_BSHC)

    return Work(run, 4 * x_BSHC.nbytes + 2 * (cos_BSC.nbytes + sin_BSC.nbytes))


def attention(make: Maker) -> Work:
    """Causal, every row one document; FLOPs of pairs that are seen, nothing computed twice."""
    size = make.size
    shape = (size.rows, size.length)
    q, dy = make.pair(*shape, size.heads, size.head_dim)
    k, v = (make.draw(*shape, size.kv_heads, size.head_dim) for _ in range(2))
    segments_BS = torch.zeros(shape, dtype=torch.int64, device=make.device)
    sight = Sight(lambda: document_mask(segments_BS), segments_BS)

    def run(kernels: Kernels) -> object:
        return torch.autograd.grad(kernels.attention(q, k, v, sight), (q, k, v), dy)

    pairs = size.rows * size.length * (size.length + 1) // 2
    return Work(run, flops=12 * pairs * size.heads * size.head_dim)


def cross_entropy(make: Maker) -> Work:
    """Head and loss in chunks."""
    size = make.size
    hidden_TD = make.draw(size.tokens, size.hidden)
    weight_VD = make.draw(size.vocabulary, size.hidden, scale=0.02)
    labels_T = make.integers(size.vocabulary, size.tokens)

    def run(kernels: Kernels) -> object:
        losses = linear_cross_entropy(
            [hidden_TD], weight_VD, labels_T, [1.0], row_losses=kernels.row_losses
        )
        return torch.autograd.grad(losses.total, (hidden_TD, weight_VD))

    return Work(run, flops=6 * size.tokens * size.hidden * size.vocabulary)


WORKS: dict[Operation, Callable[[Maker], Work]] = {
    "permute": permute,
    "grouped_gemm": grouped_gemm,
    "zero_experts": zero_experts,
    "route": route,
    "depth_select": depth_select,
    "rms_norm": rms_norm,
    "rope": rope,
    "attention": attention,
    "cross_entropy": cross_entropy,
}

"""Zero-computation experts of MoE++ (Jin et al. 2024, arXiv 2410.07348) as one affine epilogue.

With `e_zero(x) = 0`, `e_copy(x) = x` and `e_const(x) = m1 * x + m2 * v` where
`(m1, m2) = softmax(Wc x)`, whatever a token picked among them sums to `a * x + b @ V`. So they need
neither dispatch nor a place in the all-to-all, only per-token scalars.

Shapes: T tokens, D hidden, C constant experts.
"""

from torch import Tensor


def affine_experts(
    x_TD: Tensor,
    copy_weight_T: Tensor,
    constant_weight_TC: Tensor,
    mix_logits_TC2: Tensor,
    constants_CD: Tensor,
) -> Tensor:
    """Weighted sum of the copy and constant experts' outputs, `[T, D]` in the dtype of `x`.

    `*_weight` are router weights, 0 where an expert was not picked; zero experts add nothing and
    do not appear. Reads and writes each activation once; forward FLOPs `2 * T * C * D`.
    """
    mix_TC2 = mix_logits_TC2.softmax(dim=-1)
    a_T = copy_weight_T + (constant_weight_TC * mix_TC2[..., 0]).sum(dim=-1)
    b_TC = constant_weight_TC * mix_TC2[..., 1]
    return a_T.to(x_TD.dtype).unsqueeze(1) * x_TD + (b_TC @ constants_CD).to(x_TD.dtype)

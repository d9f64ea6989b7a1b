"""Chain-of-Experts (arXiv 2506.18945): the tokens of a layer pass its experts several times."""

from collections.abc import Callable

from torch import Tensor

from moebius.model.carry import Carry
from moebius.model.moe.config import ChainConfig

Turn = Callable[[Tensor, Carry, int], tuple[Tensor, Carry]]
"""(normalised input, carry, number from 1) -> (output, carry)"""


def chain_of_experts(
    x_BSD: Tensor, carry: Carry, norm: Callable[[Tensor], Tensor], turn: Turn, config: ChainConfig
) -> tuple[Tensor, Carry]:
    """The residual stream after all turns, `[B, S, D]`.

    With F_c the experts under router c and u_0 the stream x:

    - per_iteration: `u_c = [u_{c-1} +] F_c(norm(u_{c-1}))`;
    - once: the same with `u_0 = norm(x)` and no norm after that;

    the term in brackets with inner residuals. The result is u_C, and x + u_C with outer ones. One
    turn with the defaults is an ordinary layer. Published is (once, inner): its result has lost
    the scale of x.
    """
    u_BSD = norm(x_BSD) if config.norm == "once" else x_BSD
    for number in range(1, config.iterations + 1):
        normed_BSD = norm(u_BSD) if config.norm == "per_iteration" else u_BSD
        y_BSD, carry = turn(normed_BSD, carry, number)
        u_BSD = y_BSD if config.residual == "outer" else u_BSD + y_BSD
    return (u_BSD if config.residual == "inner" else x_BSD + u_BSD), carry

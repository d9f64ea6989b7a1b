"""Gated recurrent unit (Cho et al. 2014, arXiv 1406.1078), gates in the order r, z, n.

Shapes: B rows, S tokens, P state size; the leading dimensions of a cell are any.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gru_cell(input_gates: Tensor, h: Tensor, weight_3PP: Tensor, bias_3P: Tensor) -> Tensor:
    """One step: `h' = (1 - z) * n + z * h`, `[..., P]`.

    `input_gates` `[..., 3P]` is the input's projection with its bias; `weight` and `bias` belong to
    the state. `r, z = sigmoid(.)`, `n = tanh(input_n + r * (U h + b)_n)`, as in `torch.nn.GRU`.
    """
    input_r, input_z, input_n = input_gates.chunk(3, dim=-1)
    state_r, state_z, state_n = F.linear(h, weight_3PP, bias_3P).chunk(3, dim=-1)
    z = torch.sigmoid(input_z + state_z)
    n = torch.tanh(input_n + torch.sigmoid(input_r + state_r) * state_n)
    return (1 - z) * n + z * h


def gru_scan(
    input_gates_BS3P: Tensor, segment_ids_BS: Tensor, weight_3PP: Tensor, bias_3P: Tensor
) -> Tensor:
    """States after each token, `[B, S, P]`; the state is zero where a document begins.

    Forward FLOPs: `6 * B * S * P**2`, one small product per token of a row: the recurrence cannot
    be run over the sequence at once.
    """
    rows, length, _ = input_gates_BS3P.shape
    same_BS = segment_ids_BS[:, 1:] == segment_ids_BS[:, :-1]
    h = input_gates_BS3P.new_zeros(rows, weight_3PP.shape[1])
    states = []
    for position, gates in enumerate(input_gates_BS3P.unbind(1)):
        if position:
            h = h * same_BS[:, position - 1].unsqueeze(1)
        h = gru_cell(gates, h, weight_3PP, bias_3P)
        states.append(h)
    return torch.stack(states, dim=1) if length else input_gates_BS3P.new_zeros(rows, 0, h.shape[1])

"""The recurrent unit against torch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.kernels.gru import gru_cell, gru_scan

INPUT, STATE = 6, 5


def scan(gru: nn.GRU, x_BSI: Tensor, segment_ids_BS: Tensor) -> Tensor:
    """`gru_scan` with the parameters of a torch module."""
    gates = F.linear(x_BSI, gru.weight_ih_l0, gru.bias_ih_l0)
    return gru_scan(gates, segment_ids_BS, gru.weight_hh_l0, gru.bias_hh_l0)


def module(dtype: torch.dtype = torch.float64) -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(INPUT, STATE, batch_first=True, dtype=dtype)


def each_document_alone(gru: nn.GRU, x_BSI: Tensor, segment_ids_BS: Tensor) -> Tensor:
    """torch's GRU from a zero state over every run of equal ids."""
    rows = []
    for x, ids in zip(x_BSI, segment_ids_BS.tolist(), strict=True):
        start, parts = 0, []
        for _, run in itertools.groupby(ids):
            end = start + len(list(run))
            parts.append(gru(x[start:end].unsqueeze(0))[0][0])
            start = end
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of the output."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((output * direction.to(output)).sum(), inputs))


@pytest.mark.parametrize("leading", [(4,), (2, 3), ()])
def test_cell_equals_torch(leading: tuple[int, ...]) -> None:
    """Forward and the gradients of input, state and parameters."""
    torch.manual_seed(0)
    cell = nn.GRUCell(INPUT, STATE, dtype=torch.float64)
    x = torch.randn(*leading, INPUT, dtype=torch.float64, requires_grad=True)
    h = torch.randn(*leading, STATE, dtype=torch.float64, requires_grad=True)
    gates = F.linear(x, cell.weight_ih, cell.bias_ih)
    got = gru_cell(gates, h, cell.weight_hh, cell.bias_hh)
    expected = cell(x.reshape(-1, INPUT), h.reshape(-1, STATE)).view(*leading, STATE)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, h, *cell.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_scan_of_one_document_equals_torch(length: int) -> None:
    gru = module()
    x = torch.randn(3, length, INPUT, dtype=torch.float64, requires_grad=True)
    got = scan(gru, x, torch.full((3, length), 4))
    expected = gru(x)[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *gru.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


SEGMENTS = torch.tensor(
    [
        [0, 0, 0, 0, 1, 1, 1, 2, 2],
        [5, 5, 9, 3, 3, 3, 3, 3, 4],  # ids in any order, documents of one token
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [1, 1, 0, 0, 1, 1, 1, 0, 0],  # an id that comes again is another document
    ]
)


def test_scan_of_several_documents_equals_each_alone() -> None:
    """Forward and the gradients of inputs and parameters, with other boundaries in every row."""
    gru = module()
    x = torch.randn(*SEGMENTS.shape, INPUT, dtype=torch.float64, requires_grad=True)
    got, expected = scan(gru, x, SEGMENTS), each_document_alone(gru, x, SEGMENTS)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *gru.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_flows_between_documents_or_back_in_time() -> None:
    """The gradient of one state reaches the earlier tokens of its document and no others."""
    gru = module()
    x = torch.randn(*SEGMENTS.shape, INPUT, dtype=torch.float64, requires_grad=True)
    states = scan(gru, x, SEGMENTS)
    for position, start in ((5, 4), (3, 0), (8, 7)):
        (grad,) = torch.autograd.grad(states[0, position].sum(), x, retain_graph=True)
        reached = grad.abs().sum(dim=-1) > 0
        expected = torch.zeros_like(reached)
        expected[0, start : position + 1] = True
        assert torch.equal(reached, expected)


def test_scan_in_single_precision_is_close() -> None:
    gru = module(torch.float32)
    x = torch.randn(*SEGMENTS.shape, INPUT)
    got = scan(gru, x, SEGMENTS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, each_document_alone(gru, x, SEGMENTS), rtol=1e-5, atol=1e-6)


def test_scan_of_no_tokens_and_of_no_rows_is_empty() -> None:
    gru = module()
    for rows, length in ((2, 0), (0, 3)):
        x = torch.zeros(rows, length, INPUT, dtype=torch.float64)
        got = scan(gru, x, torch.zeros(rows, length, dtype=torch.int64))
        assert got.shape == (rows, length, STATE)

"""The norm on a CPU and in Triton against the definition left to autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from moebius.kernels.rms_norm import rms_norm
from moebius.kernels.triton import rms_norm as triton_source

device = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = {"torch": rms_norm, "triton": triton_source.rms_norm}
EPS = 1e-5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7}
"""relative; the interpreter cuts bf16 off where a GPU rounds"""


def definition(x: Tensor, weight: Tensor, eps: float, scale: Tensor | float = 1.0) -> Tensor:
    """Every step written out."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight * scale


def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def agree(name: str, x: Tensor, weight: Tensor, scale: Tensor | float) -> None:
    """The result and every gradient, as if the inputs had been in fp64."""
    inputs = [x, weight, *([scale] if isinstance(scale, Tensor) else [])]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dy = tensor(3, *x.shape, dtype=x.dtype).detach()
    y = IMPLEMENTATIONS[name](x, weight, EPS, scale)
    expected = definition(*exact[:2], EPS, exact[2] if isinstance(scale, Tensor) else scale)
    assert y.dtype == x.dtype
    got = [y, *torch.autograd.grad(y, inputs, dy)]
    wanted = [expected, *torch.autograd.grad(expected, exact, dy.double())]
    for ours, theirs, dtype in zip(got, wanted, [x.dtype, *(t.dtype for t in inputs)], strict=True):
        assert ours.dtype == dtype
        largest = max([1.0, *theirs.detach().abs().flatten().tolist()])
        bound = TOLERANCE[dtype] * largest
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    width=st.integers(1, 130),
    dtype=st.sampled_from(list(TOLERANCE)),
    scale=st.sampled_from(["vector", 1.0, 0.5]),
)
@example([0], 96, torch.float32, "vector")
@example([201], 1000, torch.bfloat16, "vector")
def test_equals_the_definition(
    name: str, shape: list[int], width: int, dtype: torch.dtype, scale: str | float
) -> None:
    """Any leading dimensions, any width, with and without a factor of the visit."""
    factor = tensor(2, width) if isinstance(scale, str) else scale
    agree(name, tensor(0, *shape, width, dtype=dtype), tensor(1, width), factor)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_are_not_contiguous(name: str) -> None:
    agree(name, tensor(0, 3, 20, 5).transpose(1, 2), tensor(1, 20), tensor(2, 40)[::2])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1e-20, 1e4])
def test_rows_beneath_eps_and_far_above(name: str, size: float) -> None:
    """Zeros stay zeros; nothing overflows."""
    x = (size * tensor(0, 4, 33).detach()).requires_grad_()
    agree(name, x, tensor(1, 33), 1.0)


def test_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward in two programs of up to four tiles, the last ones incomplete or empty."""
    monkeypatch.setattr(triton_source, "_tile", lambda width: (4, 32, 1))
    monkeypatch.setattr(triton_source, "WARPS", 2)
    assert triton_source._steps(21, 4, 1) == 4
    agree("triton", tensor(0, 21, 24), tensor(1, 24), tensor(2, 24))


def test_rows_that_are_too_wide_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_source, "WIDEST", 16)
    agree("triton", tensor(0, 3, 17), tensor(1, 17), tensor(2, 17))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_is_repeatable_bit_for_bit(name: str) -> None:
    def run() -> list[Tensor]:
        x, weight, scale = tensor(0, 300, 48), tensor(1, 48), tensor(2, 48)
        y = IMPLEMENTATIONS[name](x, weight, EPS, scale)
        return [y, *torch.autograd.grad(y.sin().sum(), (x, weight, scale))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 512), (3, 5, 96), (33,)])
def test_forward_on_a_cpu_has_the_bits_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Checkpoints of earlier versions go on as they were trained."""
    x, weight = tensor(0, *shape, dtype=dtype).cpu(), tensor(1, shape[-1]).cpu()
    expected = F.rms_norm(x.float(), weight.shape, weight, EPS).to(dtype)
    assert torch.equal(rms_norm(x, weight, EPS), expected)

"""Whatever computes the operations, a model learns the same.

One step of each model by the definitions, and by other kernels: in blocks and with padded groups in
float64, by C++ and by Triton in float32 (in its interpreter where there is no GPU), and compiled.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from moebius.kernels.registry import BACKENDS, PLAIN, Kernels, Operation, choose
from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from tests.parity.layouts import Rows, decoder_of, documents
from tests.parity.models import MODELS

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = {operation: "triton" for operation, names in BACKENDS.items() if "triton" in names}
CPP = {operation: "cpp" for operation, names in BACKENDS.items() if "cpp" in names}
IN_TRITON = {"moepp": False, "mor": False, "top_p": True, "moepp_mor": True, "mixed": True}
"""model -> whether it is slow"""


@dataclass
class Left:
    """What one step left behind."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
    counts: list[Tensor]


def step(name: str, dtype: torch.dtype, kernels: Kernels, compile: bool = False) -> Left:
    """Gradients of two rows of documents."""
    decoder = decoder_of(name, dtype).to(DEVICE)
    context = StepContext(
        "topk", Ledger(), step=30, seed=3, training=True, kernels=kernels, compile=compile
    )
    batch = Rows(**{name: tensor.to(DEVICE) for name, tensor in vars(documents(2)).items()})
    result = LocalExecutor(decoder).accumulate_gradients([batch], context)
    gradients = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    names = ("expert_tokens", "executed_tokens", "selected")
    counts = [
        sums[name] for sums in result.ledger.statistics.values() for name in names if name in sums
    ]
    return Left(result.losses | result.ledger.losses, gradients, counts)


def assert_alike(got: Left, expected: Left, **tolerance: Any) -> None:
    for found, wanted in ((got.losses, expected.losses), (got.gradients, expected.gradients)):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )
    assert len(got.counts) == len(expected.counts)
    for found, wanted in zip(got.counts, expected.counts, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_padded_groups(name: str) -> None:
    kernels = choose({"attention": "blocks"}, DEVICE, torch.float64, alignment=4)
    expected = step(name, torch.float64, PLAIN)
    assert_alike(step(name, torch.float64, kernels), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="for CPUs")
@pytest.mark.parametrize("name", MODELS)
def test_cpp(name: str) -> None:
    kernels = choose(CPP, DEVICE, torch.float32, alignment=4)
    expected = step(name, torch.float32, PLAIN)
    assert_alike(step(name, torch.float32, kernels), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * is_slow) for n, is_slow in IN_TRITON.items()],
)
def test_triton(name: str) -> None:
    kernels = choose(TRITON, DEVICE, torch.float32, alignment=4)
    expected = step(name, torch.float32, PLAIN)
    assert_alike(step(name, torch.float32, kernels), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("operation", ["permute", "grouped_gemm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_mix(operation: Operation, dtype: torch.dtype) -> None:
    """Triton's sort leaves rows behind those of the last expert, which others must not mind."""
    kernels = choose({operation: "triton"}, DEVICE, dtype, alignment=4)
    expected = step("moepp", dtype, PLAIN)
    assert_alike(step("moepp", dtype, kernels), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.slow
def test_compiled_in_one_piece() -> None:
    """Numbers of experts vary from token to token, and so do those of rows."""
    name = "top_p"
    varying = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    torch._dynamo.utils.counters.clear()
    expected = step(name, torch.float32, PLAIN)
    with torch._dynamo.config.patch(varying):
        got = step(name, torch.float32, PLAIN, compile=True)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_alike(got, expected, rtol=2e-4, atol=2e-6)

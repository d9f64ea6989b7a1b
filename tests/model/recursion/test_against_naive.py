"""Hidden states, losses and all gradients of every system against loops over tokens, in float64."""

import pytest
import torch

from moebius.model.context import Mode, StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from tests.model.recursion.compare import assert_step_equals
from tests.model.recursion.naive_model import NaiveModel
from tests.model.recursion.systems import NAIVE, documents, system

STEP, SEED = 20, 7


def steered(executor: LocalExecutor) -> LocalExecutor:
    """The same with biases of token choice that change some choices."""
    generator = torch.Generator().manual_seed(3)
    for name, buffer in executor.decoder.named_buffers():
        if name.endswith("bias_UN"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return executor


@pytest.mark.parametrize("name", NAIVE)
def test_hidden_states_losses_and_gradients(name: str) -> None:
    """Of a step of training, in the middle of schedules."""
    executor = steered(system(**NAIVE[name]))
    assert_step_equals(executor, documents(rows=2, length=10, share=0.2), STEP, SEED)


@pytest.mark.parametrize("name", [name for name in NAIVE if NAIVE[name]["depth"].get("router")])
def test_selections_and_statistics(name: str) -> None:
    """Who made each pass, who could have, and the gates, as the ledger counts them."""
    mode: Mode
    for mode in ("topk", "threshold"):
        executor = steered(system(**NAIVE[name]))
        batch, ledger = documents(rows=2, length=10, share=0.2), Ledger()
        naive = NaiveModel(executor, mode, STEP)
        with torch.no_grad():
            hidden = naive.hidden(batch)[len(naive.program.visits)]
            got = executor.hidden(batch, StepContext(mode, ledger, STEP))
        expected = torch.stack([torch.stack(row) for row in hidden])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        depths = [s for s in ledger.statistics if s.module.startswith("depth.")]
        sites = {
            (s.module, s.depth): ledger.statistics[s] for s in depths if "choice" not in str(s)
        }
        assert set(sites) == set(naive.terms.selected)
        for (loop, number), rows in naive.terms.selected.items():
            sums = sites[loop, number]
            assert int(sums["selected"]) == sum(len(row) for row in rows)
            before = naive.terms.selected.get((loop, number - 1), [list(range(10))] * 2)
            assert int(sums["candidates"]) == sum(len(row) for row in before)
            places = [sum(t in row for row in rows) for t in range(10)]
            assert sums["places"].tolist() == places
            if "gates" in sums:
                assert float(sums["gates"]) == pytest.approx(naive.terms.gates[loop, number])

"""The numbers of a report against counts made by hand."""

import pytest
import torch

from moebius.model.ledger import Ledger
from moebius.model.program import Site
from moebius.trainer.metrics import fetched, layer_metrics, width_metrics
from tests.model.helpers import build

POOL = {
    "kind": "moe",
    "experts": [{"kind": "ffn", "count": 3, "intermediate_size": 16}, {"kind": "zero"}],
    "router": {"losses": []},
}


def ledger_of_two_sites() -> Ledger:
    """Two layers of 3 FFN experts and a zero expert; the second drops and varies K."""
    ledger = Ledger()
    ledger.record(
        Site("layers.0.ffn", 1),
        tokens=torch.tensor(10),
        expert_tokens=torch.tensor([6.0, 6.0, 6.0, 2.0]),
        executed_tokens=torch.tensor([6.0, 6.0, 6.0, 2.0]),
        dropped=torch.tensor(0),
        entropy=torch.tensor(5.0),
        logsumexp_squares=torch.tensor(40.0),
        k_histogram=torch.tensor([0.0, 0.0, 10.0]),
    )
    ledger.record(
        Site("layers.1.ffn", 1),
        tokens=torch.tensor(10),
        expert_tokens=torch.tensor([12.0, 0.0, 3.0, 0.0]),
        executed_tokens=torch.tensor([8.0, 0.0, 3.0, 0.0]),
        dropped=torch.tensor(4),
        entropy=torch.tensor(9.0),
        logsumexp_squares=torch.tensor(140.0),
        k_histogram=torch.tensor([0.0, 5.0, 5.0]),
    )
    return ledger


def test_width_metrics_of_two_sites() -> None:
    decoder, ledger = build(ffn=POOL, depth={"num_layers": 2}).decoder, ledger_of_two_sites()
    assert width_metrics(decoder, ledger) == pytest.approx(
        {
            "width/computing_share": (18 + 11) / 35,
            "width/experts_per_token": 35 / 20,
            "width/experts_per_token_std": 0.5,
            "width/load_max_over_mean": 12 / 5,
            "width/dead_share": 2 / 8,
            "width/entropy": 14 / 20,
            "width/dropped_share": 4 / 35,
            "width/logsumexp_rms": 3.0,
        }
    )


def test_each_layer_has_its_own_numbers() -> None:
    decoder = build(ffn=POOL, depth={"num_layers": 2}).decoder
    found = layer_metrics(decoder, ledger_of_two_sites())
    second = {n: v for n, v in found.items() if n.startswith("layers/1.ffn.1/")}
    assert found["layers/0.ffn.1/load_max_over_mean"] == 1
    assert second == pytest.approx(
        {
            "layers/1.ffn.1/computing_share": 11 / 15,
            "layers/1.ffn.1/experts_per_token": 1.5,
            "layers/1.ffn.1/load_max_over_mean": 12 / 5,
            "layers/1.ffn.1/dead_share": 2 / 4,
            "layers/1.ffn.1/entropy": 0.9,
            "layers/1.ffn.1/dropped_share": 4 / 15,
        }
    )


def test_numbers_are_fetched_in_one_piece_and_unchanged() -> None:
    ledger = ledger_of_two_sites()
    ledger.losses = {"switch": torch.tensor(0.25), "z": torch.tensor(1e-3)}
    host = fetched(ledger)
    assert list(host.statistics) == list(ledger.statistics)
    for site, sums in ledger.statistics.items():
        assert list(host.statistics[site]) == list(sums)
        for name, value in sums.items():
            assert host.statistics[site][name].dtype == value.dtype
            assert torch.equal(host.statistics[site][name], value)
    assert {name: float(loss) for name, loss in host.losses.items()} == pytest.approx(
        {"switch": 0.25, "z": 1e-3}
    )
    assert fetched(Ledger()).statistics == {}


def test_a_dense_model_has_no_width_metrics() -> None:
    decoder = build(ffn={"kind": "dense", "intermediate_size": 16}).decoder
    assert width_metrics(decoder, Ledger()) == {}

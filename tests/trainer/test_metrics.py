"""The numbers of a report against counts made by hand."""

import pytest
import torch

from moebius.model.ledger import Ledger
from moebius.model.program import Site
from moebius.trainer.metrics import width_metrics
from tests.model.helpers import build

POOL = {
    "kind": "moe",
    "experts": [{"kind": "ffn", "count": 3, "intermediate_size": 16}, {"kind": "zero"}],
    "router": {"losses": []},
}


def test_width_metrics_of_two_sites() -> None:
    """Two layers of 3 FFN experts and a zero expert; the second drops and varies K."""
    decoder = build(ffn=POOL, depth={"num_layers": 2}).decoder
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


def test_a_dense_model_has_no_width_metrics() -> None:
    decoder = build(ffn={"kind": "dense", "intermediate_size": 16}).decoder
    assert width_metrics(decoder, Ledger()) == {}

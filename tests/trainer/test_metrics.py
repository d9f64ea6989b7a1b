"""The numbers of a report against counts made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.model.ledger import Ledger
from moebius.model.program import Site
from moebius.trainer.config import RunConfig
from moebius.trainer.metrics import fetched, layer_metrics, width_metrics
from moebius.trainer.planning import planned_bytes
from tests.model.helpers import build, random_batch
from tests.trainer.helpers import error_line, moebius, train_run, write_config

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
        spilled=torch.tensor(2),
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
        spilled=torch.tensor(0),
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
            "width/spilled_share": 2 / 35,
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
            "layers/1.ffn.1/spilled_share": 0,
        }
    )


@pytest.mark.parametrize(
    ("router", "share"),
    [
        ({"losses": []}, None),
        ({"losses": [{"kind": "switch", "tau": 0.5}]}, 0.5 * 3 / (0.5 * 3 + 1)),
        ({"losses": [], "controllers": [{"kind": "budget", "share": 0.7}]}, 0.7),
        ({"losses": [], "controllers": [{"kind": "budget", "group": 1, "share": 0.1}]}, 0.9),
    ],
)
def test_the_share_that_is_asked_for(router: dict[str, Any], share: float | None) -> None:
    """By MoE++'s loss and by a budget on either kind of experts; a budget's bias has a spread."""
    model = build(ffn=POOL | {"router": router}, depth={"num_layers": 2})
    ledger = model.accumulate_gradients([random_batch(2, 8)]).ledger
    found = width_metrics(model.decoder, ledger)
    assert found.get("width/target_computing_share") == (share and pytest.approx(share))
    layers = layer_metrics(model.decoder, ledger)
    assert layers.get("layers/1.ffn.1/target_computing_share") == (share and pytest.approx(share))
    assert ("width/bias_spread" in found) == ("controllers" in router)
    if "controllers" in router:
        model.decoder.update_routers(ledger, 0)
        again = model.accumulate_gradients([random_batch(2, 8), random_batch(2, 8)]).ledger
        biases = [b for n, b in model.decoder.named_buffers() if n.endswith("bias_U")]
        spreads = [abs(float(bias)) for bias in biases]
        assert max(spreads) > 0
        assert width_metrics(model.decoder, again)["width/bias_spread"] == max(spreads)


def test_tokens_by_their_number_of_experts() -> None:
    router = {"losses": [], "selector": {"kind": "top_p", "threshold": 0.5}}
    model = build(ffn=POOL | {"router": router}, depth={"num_layers": 2})
    for name, parameter in model.decoder.named_parameters():
        if "router" in name:
            torch.nn.init.normal_(parameter)
    ledger = model.accumulate_gradients([random_batch(4, 16)]).ledger
    found = width_metrics(model.decoder, ledger)
    shares = {int(n.rpartition("_")[2]): v for n, v in found.items() if "/tokens_with_" in n}
    assert sum(shares.values()) == pytest.approx(1)
    mean = sum(number * share for number, share in shares.items())
    assert mean == pytest.approx(found["width/experts_per_token"])
    assert sum(share > 0 for share in shares.values()) > 1


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


def test_numbers_of_a_run(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """The norm of the weights and the packing, against what the run holds and has read; the memory
    that the planner foresees, where it is asked."""
    tree = run_tree | {"run_dir": str(tmp_path / "run"), "log": {"plan": True}}
    result = moebius("train", write_config(tree, tmp_path / "run.yaml"))
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (found,) = (line for line in lines if line["step"] == 6 and "train/loss" in line)
    config = RunConfig.model_validate(tree)
    assert found["memory/planned_gigabytes"] == planned_bytes(config, 1, "cpu") / 1e9
    assert 1e-4 < found["memory/planned_gigabytes"] < found["memory/peak_gigabytes"]

    run = train_run(config.model_copy(update={"run_dir": str(tmp_path / "again")}))
    squares = [p.detach().double().square().sum() for p in run.decoder.parameters()]
    assert found["train/param_norm"] == pytest.approx(float(torch.stack(squares).sum().sqrt()))
    run.stream.load(20, {})
    batch = run.stream.take([(0, 4)])[0]
    documents, sight = 0, 0
    for segments, positions in zip(batch.segment_ids_BS, batch.positions_BS, strict=True):
        documents += len(segments.unique())
        sight += sum(position + 1 for position in positions.tolist())
    assert found["data/documents_per_row"] == documents / 4
    assert found["data/context_tokens"] == sight / batch.num_tokens


def test_what_is_not_simulated_cannot_be_planned(run_tree: dict[str, Any], tmp_path: Path) -> None:
    tree = run_tree | {"log": {"plan": True}, "parallel": {"engine": "deepspeed"}}
    result = moebius("train", write_config(tree, tmp_path / "run.yaml"))
    assert "log.plan: true, but parallel.engine=deepspeed is not simulated" in error_line(result)
    assert not (tmp_path / "run").exists()

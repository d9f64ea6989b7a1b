"""Decisions of one run, recorded and made again by another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moebius.errors import DataError
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.model.moe.replay import RoutingTable
from moebius.model.moe.router import Router
from moebius.model.parameters import initialize
from moebius.trainer.config import RunConfig
from moebius.trainer.routing_record import load_routing
from tests.model.helpers import batch_of, loss_sum
from tests.trainer.helpers import error_line, logged, moebius, train_run, write_config

POOL = [{"kind": "ffn", "count": 4, "intermediate_size": 16}, {"kind": "zero"}]


def config_with(
    run_tree: dict[str, Any], folder: Path, selector: dict[str, Any], record: int = 0
) -> RunConfig:
    """A run whose tokens go where a forced selector says, also at a routed depth."""
    router = {"scorer": {"kind": "none"}, "selector": selector, "weights": {"kind": "ones"}}
    ffn = {"kind": "moe", "experts": POOL, "router": router | {"losses": []}}
    log = {"interval": 1, "record_routing": record}
    model = run_tree["model"] | {"ffn": ffn}
    return RunConfig.model_validate(run_tree | {"run_dir": str(folder), "model": model, "log": log})


def train_losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in logged(folder) if "train/loss" in line]


def test_a_replayed_run_is_the_recorded_one(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Random decisions, recorded and replayed: the same losses, also where the batch is cut
    otherwise; another seed of the drawing makes other ones."""
    random = {"kind": "random", "top_k": 2}
    recorded = tmp_path / "recorded"
    train_run(config_with(run_tree, recorded, random, record=6))
    table = load_routing(recorded / "routing", torch.device("cpu"))
    assert table.sample_ids_R.tolist() == list(range(24))
    assert set(table.experts) == {
        "layers.0.ffn@1",
        *(f"layers.{layer}.ffn@{depth}" for layer in (1, 2) for depth in (1, 2)),
        "layers.3.ffn@1",
    }
    replay = {"kind": "replay", "path": str(recorded / "routing"), "top_k": 2}
    train_run(config_with(run_tree, tmp_path / "replayed", replay))
    assert train_losses(tmp_path / "replayed") == train_losses(recorded)

    cut = run_tree | {"train": run_tree["train"] | {"micro_batch_size": 1}}
    train_run(config_with(cut, tmp_path / "cut", replay))
    assert train_losses(tmp_path / "cut") == pytest.approx(train_losses(recorded), rel=1e-5)
    train_run(config_with(run_tree, tmp_path / "other", {"kind": "random", "top_k": 1}))
    assert train_losses(tmp_path / "other") != train_losses(recorded)


def test_a_resumed_run_records_what_the_unbroken_one_did(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    random = {"kind": "random", "top_k": 2}
    for name, stop in (("whole", None), ("broken", 2)):
        config = config_with(run_tree, tmp_path / name, random, record=4)
        train_run(config, stop_after=stop)
    train_run(config_with(run_tree, tmp_path / "broken", random, record=4))
    whole, broken = (
        load_routing(tmp_path / name / "routing", torch.device("cpu"))
        for name in ("whole", "broken")
    )
    assert torch.equal(whole.sample_ids_R, broken.sample_ids_R)
    assert len(whole.sample_ids_R) == 16
    for site, ids in whole.experts.items():
        assert torch.equal(ids, broken.experts[site])


def test_what_cannot_be_replayed_is_one_line(run_tree: dict[str, Any], tmp_path: Path) -> None:
    recorded = tmp_path / "recorded"
    train_run(config_with(run_tree, recorded, {"kind": "random", "top_k": 2}, record=2))
    path = str(recorded / "routing")
    cases = [
        ({"path": str(tmp_path / "nowhere"), "top_k": 2}, "holds no recorded routing"),
        ({"path": path, "top_k": 1}, "has 2 experts per token"),
        ({"path": path, "top_k": 2}, "sample 8 of the training stream was not recorded"),
    ]
    for number, (options, message) in enumerate(cases):
        folder = tmp_path / f"run{number}"
        config = config_with(run_tree, folder, {"kind": "replay", **options})
        file = write_config(config.model_dump(mode="json"), tmp_path / f"{number}.yaml")
        assert message in error_line(moebius("train", file))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"cannot read '.*step-00000001"):
        load_routing(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"a@1": (2, 4, 1)}], "needs a list sample_ids"),
        ([{"sample_ids": (2,)}], "and a tensor per site"),
        ([{"sample_ids": (2,), "a@1": (2, 4)}], r"a@1 is \[2, 4\]; expected \[2, sequence length"),
        ([{"sample_ids": (2,), "a@1": (3, 4, 1)}], r"a@1 is \[3, 4, 1\]; expected \[2, "),
        (
            [
                {"sample_ids": (2,), "a@1": (2, 4, 1)},
                {"sample_ids": (2,), "b@1": (2, 4, 1)},
            ],
            "other sites or shapes than",
        ),
    ],
)
def test_a_record_made_by_hand_is_checked(
    steps: list[dict[str, tuple[int, ...]]], message: str, tmp_path: Path
) -> None:
    for number, step in enumerate(steps):
        tensors = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in step.items()}
        save_file(tensors, tmp_path / f"step-{number:08}.safetensors")
    with pytest.raises(DataError, match=message):
        load_routing(tmp_path, torch.device("cpu"))


def test_routers_replay_the_record_that_each_names(run_tree: dict[str, Any]) -> None:
    """Two folders are two tables; one does not hide the other."""
    attention = run_tree["model"]["attention"] | {"kind": "mixture", "num_experts": 2}
    selectors = [{"kind": "replay", "path": name} for name in ("a", "b")]
    ffn = {"kind": "moe", "experts": POOL, "router": {"selector": selectors[1]}}
    tree = run_tree["model"] | {
        "attention": attention | {"router": {"selector": selectors[0]}},
        "ffn": ffn,
    }
    decoder = Decoder(ModelConfig.model_validate(tree))
    initialize(decoder, 0)
    tokens = torch.arange(32).view(2, 16)
    tables = {}
    for expert, path in enumerate("ab"):
        sites = [
            site
            for router in decoder.modules()
            if isinstance(router, Router)
            for site in router.sites
        ]
        ids = {str(site): torch.full((2, 16, 1), expert) for site in sites}
        tables[path] = RoutingTable(torch.arange(2), ids)
    ledger = Ledger()
    step = StepContext("topk", ledger, training=True, replay=tables)
    loss_sum(LocalExecutor(decoder), batch_of(tokens), step)
    for site, sums in ledger.statistics.items():
        if "expert_tokens" in sums:
            expected = 0 if site.module.endswith("attention") else 1
            assert int(sums["expert_tokens"].argmax()) == expected, site
            assert int((sums["expert_tokens"] > 0).sum()) == 1, site

"""Runs on mixtures, packed samples, other objectives and streams: trained, resumed, audited."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebius.data import prepare as preparing
from moebius.data.config import DataConfig
from moebius.data.corpus import open_corpora
from moebius.data.prepare import prepare
from moebius.errors import CheckpointError, DataError
from moebius.model.context import StepContext
from moebius.model.ledger import Ledger
from moebius.trainer.cli import main
from moebius.trainer.config import RunConfig
from moebius.trainer.run import Run
from tests.conftest import QUIET, VOCAB_SIZE, model_tree
from tests.trainer.helpers import logged, train_run, write_config

SENTINELS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


@pytest.fixture(scope="module")
def mixed(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two corpora of one tokenizer, as a config tree: modules, and numbers written out."""
    root = tmp_path_factory.mktemp("mixed")
    lines = [json.dumps({"text": f"{n} and {n + 1} are {2 * n + 1}. " * 9}) for n in range(200)]
    (root / "numbers.jsonl").write_text("\n".join(lines))
    tree = {
        "dir": str(root / "data"),
        "corpora": {
            "code": {"source": {"kind": "files", "paths": [str(corpus_file)]}},
            "numbers": {"source": {"kind": "files", "paths": [str(root / "numbers.jsonl")]}},
        },
        "tokenizer": {"special_tokens": SENTINELS},
        "sequence_length": 32,
        "validation_fraction": 0.1,
    }
    prepare(DataConfig.model_validate(tree), VOCAB_SIZE, QUIET)
    return tree


def config_in(tree: dict[str, Any], folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(tree | {"run_dir": str(folder)} | changes)


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in logged(folder) if "train/loss" in line]


def test_a_mixture_is_logged_and_evaluated_by_corpus(
    run_tree: dict[str, Any], mixed: dict[str, Any], tmp_path: Path
) -> None:
    """Its shares follow the phases: six steps of four samples, the second half of numbers alone."""
    phases = [
        {"weights": {"code": 3, "numbers": 1}},
        {"from_tokens": 3 * 4 * 32, "weights": {"numbers": 1}},
    ]
    run = train_run(config_in(run_tree, tmp_path, data=mixed | {"mixture": phases}))
    lines = [line for line in logged(run.folder) if "data/code/weight" in line]
    assert [line["data/code/weight"] for line in lines] == [0.75] * 2 + [0.0] * 4
    first = [run.stream.place(position).corpus for position in range(24)]
    assert first[12:] == [1] * 12
    assert lines[-1]["data/numbers/share"] == sum(first) / 24
    evaluations = [line for line in logged(run.folder) if "eval/loss" in line]
    for line, weight in zip(evaluations, (0.75, 0.0, 0.0), strict=True):
        mean = weight * line["eval/code/loss"] + (1 - weight) * line["eval/numbers/loss"]
        assert line["eval/loss"] == pytest.approx(mean)
    assert main(["evaluate", str(run.folder), "--device", "cpu"]) == 0
    assert main(["sweep", str(run.folder), "--device", "cpu"]) == 0


def test_a_phase_may_be_added_but_none_that_is_past_changed(
    run_tree: dict[str, Any], mixed: dict[str, Any], tmp_path: Path
) -> None:
    past = {"weights": {"code": 1, "numbers": 1}}
    train_run(config_in(run_tree, tmp_path, data=mixed | {"mixture": [past]}), stop_after=3)
    added = {"from_tokens": 3 * 4 * 32, "weights": {"code": 1}}
    with pytest.raises(CheckpointError, match=r"data\.mixture: the 384 tokens .* had the phases"):
        train_run(
            config_in(
                run_tree,
                tmp_path,
                data=mixed
                | {"mixture": [added | past, added]}
                | {"mixture": [{"weights": {"code": 2, "numbers": 1}}]},
            )
        )
    run = train_run(config_in(run_tree, tmp_path, data=mixed | {"mixture": [past, added]}))
    assert [run.stream.place(position).corpus for position in range(12, 24)] == [0] * 12
    assert run.step == 6


def test_corpora_of_different_tokenizers_are_not_mixed(
    mixed: dict[str, Any], data_config: DataConfig, corpora: object
) -> None:
    other = {"other": {"dir": data_config.dir}}
    tree = mixed | {"corpora": mixed["corpora"] | other}
    with pytest.raises(DataError, match=r"data\.corpora\.other: .* another tokenizer"):
        prepare(DataConfig.model_validate(tree), VOCAB_SIZE, QUIET)


def test_a_corpus_that_joins_later_gets_the_tokenizer_of_the_others(
    mixed: dict[str, Any], corpus_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(mixed["dir"], tmp_path / "data")
    source = {"kind": "files", "paths": [str(corpus_file)]}
    tree = mixed | {
        "dir": str(tmp_path / "data"),
        "corpora": mixed["corpora"] | {"more": {"source": source}},
    }
    corpora = prepare(DataConfig.model_validate(tree), VOCAB_SIZE, QUIET)
    assert list(corpora.members) == ["code", "numbers", "more"]
    assert corpora.members["more"].manifest.tokenizer == corpora.tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"packing": "best_fit"},
        {"objective": {"kind": "fim", "rate": 1.0}},
        {"shuffle": {"kind": "blocks", "run": 3, "block": 7}, "workers": 2, "prefetch": 3},
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    run_tree: dict[str, Any], mixed: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    data = mixed | change
    whole = train_run(config_in(run_tree, tmp_path / "whole", data=data))
    train_run(config_in(run_tree, tmp_path / "run", data=data), stop_after=2)
    resumed = train_run(config_in(run_tree, tmp_path / "run", data=data))
    assert losses(resumed.folder) == losses(whole.folder)
    plain = train_run(config_in(run_tree, tmp_path / "plain", data=mixed), stop_after=1)
    assert losses(plain.folder)[0] != losses(whole.folder)[0]


def test_another_order_of_samples_is_another_run(
    run_tree: dict[str, Any], mixed: dict[str, Any], tmp_path: Path
) -> None:
    train_run(config_in(run_tree, tmp_path, data=mixed), stop_after=2)
    with pytest.raises(CheckpointError, match=r"data\.packing: concat -> best_fit"):
        train_run(config_in(run_tree, tmp_path, data=mixed | {"packing": "best_fit"}))


def test_objectives_rearrange_training_samples_only(
    run_tree: dict[str, Any], mixed: dict[str, Any], tmp_path: Path
) -> None:
    """Sentinels come in batches, and not in what is evaluated."""
    data = mixed | {"objective": {"kind": "fim", "rate": 1.0}}
    config = config_in(run_tree, tmp_path, data=data)
    run = Run(config, open_corpora(config.data), [])
    batch = next(run.stream)
    run.stream.close()
    sentinels = torch.tensor([1, 2, 3])  # after the end-of-document token
    assert torch.isin(batch.tokens_BS, sentinels).any()
    for reader in run.validation.values():
        windows = [reader.sample(number) for number in range(reader.num_samples)]
        assert not np.isin(windows, sentinels).any()


def test_samples_of_a_stream_are_resumed_exactly(
    run_tree: dict[str, Any], corpus_file: Path, tmp_path: Path
) -> None:
    """Straight from the data set, without shards; generation finds its tokenizer."""
    (tmp_path / "set").mkdir()
    shutil.copy(corpus_file, tmp_path / "set" / "train.jsonl")
    data = {
        "dir": str(tmp_path / "data"),
        "source": {"kind": "hf-stream", "name": str(tmp_path / "set")},
        "sequence_length": 32,
        "validation_fraction": 0.1,
        "shuffle": {"kind": "blocks", "block": 10},
    }
    prepare(DataConfig.model_validate(data), VOCAB_SIZE, QUIET)
    whole = train_run(config_in(run_tree, tmp_path / "whole", data=data))
    train_run(config_in(run_tree, tmp_path / "run", data=data), stop_after=2)
    resumed = train_run(config_in(run_tree, tmp_path / "run", data=data))
    assert losses(resumed.folder) == losses(whole.folder)
    assert len(losses(whole.folder)) == 6
    generate = ["generate", str(resumed.folder), "--prompt", "def ", "--max-new-tokens", "4"]
    assert main([*generate, "--device", "cpu"]) == 0


def test_logs_of_a_run_prove_that_each_sample_came_once(
    run_tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted, and resumed with another batch size, beside a run that was not."""
    tree = run_tree | {"log": {"interval": 1, "audit": True}}
    one, two = tmp_path / "one", tmp_path / "two"
    train_run(config_in(tree, one))
    train_run(config_in(tree, two), stop_after=3)
    resumed = train_run(config_in(tree, two, train=tree["train"] | {"batch_size": 6}))
    assert resumed.stream.position == 3 * 4 + 3 * 6
    assert main(["audit", str(one), str(two)]) == 0
    shown = capsys.readouterr().out
    assert "24 samples, positions 0 to 23, in 1 epochs: each once" in shown
    assert "30 samples, positions 0 to 29, in 1 epochs: each once" in shown
    assert "24 positions in both, the same samples" in shown


def test_a_run_counts_what_it_has_quarantined(
    run_tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One flipped bit: the shard is named and its samples are counted; else the run is refused."""
    monkeypatch.setattr(preparing, "SHARD_TOKENS", 20_000)
    data = run_tree["data"] | {"dir": str(tmp_path / "data")}
    train = run_tree["train"] | {"num_steps": 3}
    config = write_config(run_tree | {"data": data, "train": train}, tmp_path / "run.yaml")
    assert main(["prepare", str(config)]) == 0
    shard = tmp_path / "data" / "train-00001.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(tmp_path / "data"), "--verify"]) == 3
    assert main(["train", str(config), "data.bad_shards=quarantine"]) == 0
    shown = capsys.readouterr().out
    assert f"quarantined: shard file '{shard.name}'" in shown
    found = re.search(r"others stand in for ([\d,]+) of ([\d,]+) training samples", shown)
    assert found is not None
    count, total = (int(number.replace(",", "")) for number in found.groups())
    assert 0 < count < total


# What attention sees of packed samples.


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_changed_document_changes_no_other_of_its_row(
    run_tree: dict[str, Any], mixed: dict[str, Any], tmp_path: Path, packing: str, masked: bool
) -> None:
    """Each part of a document in turn gets other tokens; without masks later ones feel it."""
    dense = model_tree(
        ffn={"kind": "dense", "intermediate_size": 48}, depth={"num_layers": 2, "sharing": "none"}
    )
    data = mixed | {"packing": packing, "mask_documents": masked, "sequence_length": 512}
    config = config_in(run_tree, tmp_path, model=dense, data=data)
    run = Run(config, open_corpora(config.data), [])
    batch = next(run.stream)
    run.stream.close()
    segments = naive_segments(run, batch.tokens_BS) if packing == "concat" else None
    if segments is not None and masked:
        assert torch.equal(segments, batch.segment_ids_BS)
    parts = parts_of(run, len(batch.tokens_BS), packing)
    assert max(len(row) for row in parts[:2]) > 2
    before = losses_of(run, batch)
    for row, ends in enumerate(parts[:2]):
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            tokens = batch.tokens_BS.clone()
            tokens[row, start:end] = (tokens[row, start:end] + 7) % VOCAB_SIZE
            changed = type(batch)(
                tokens,
                batch.labels_BS,
                batch.segment_ids_BS,
                batch.positions_BS,
                batch.sample_ids_B,
            )
            differs = (losses_of(run, changed) != before).nonzero().tolist()
            assert all(r == row and start <= column for r, column in differs)
            inside = {column for _, column in differs if column < end}
            assert inside
            assert all(column < end for _, column in differs) or not masked
            if not masked and end < 512:
                assert any(column >= end for _, column in differs)


def losses_of(run: Run, batch: Any) -> torch.Tensor:
    step = StepContext("threshold", Ledger(), 0, 0)
    with torch.no_grad():
        (found,) = run.layout.executor.token_losses(batch, step).values()
    return found.view_as(batch.tokens_BS)


def parts_of(run: Run, num_rows: int, packing: str) -> list[list[int]]:
    """Ends of the parts of documents in each row, counted window by window and token by token."""
    eod, found = run.stream.eod_id, []
    for position in range(num_rows):
        ends: list[int] = []
        column = 0
        for window in run.stream.sample(position):
            for token in window[:-1].tolist():
                if token == eod and column and ends[-1:] != [column]:
                    ends.append(column)
                column += 1
            if ends[-1:] != [column]:
                ends.append(column)
        found.append(ends)
    return found


def naive_segments(run: Run, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Documents counted token by token."""
    rows = []
    for row in tokens_BS.tolist():
        count, ids = 0, []
        for token in row:
            count += token == run.stream.eod_id
            ids.append(count)
        rows.append(ids)
    return torch.tensor(rows)

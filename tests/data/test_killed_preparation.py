"""A preparation that is killed at any moment goes on to the corpus that it would have made."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moebius.data import prepare as prepare_module
from moebius.data.config import DataConfig, FilesSource, TokenizerConfig
from moebius.data.corpus import Corpus, SplitReader
from moebius.data.manifest import Manifest, read_manifest
from moebius.data.prepare import prepare
from moebius.data.tokenizer import train_tokenizer
from tests.conftest import QUIET

REPOSITORY = Path(__file__).parents[2]


def write_source(folder: Path, documents: int) -> FilesSource:
    """Several files of rows, about half of which have the id of another one."""
    rng = random.Random(documents)
    words = [f"word{rng.randrange(10**6)}" for _ in range(50)]
    for part in range(3):
        with (folder / f"{part}.jsonl").open("w") as file:
            for _ in range(documents // 3):
                text = " ".join(rng.choices(words, k=rng.randint(0, 20)))
                row = {"text": text, "id": f"id-{rng.randrange(documents // 2)}"}
                file.write(json.dumps(row) + "\n")
    return FilesSource(paths=(str(folder / "*.jsonl"),))


def config_of(folder: Path, documents: int, id_field: str | None) -> DataConfig:
    source = write_source(folder, documents).model_copy(update={"id_field": id_field})
    train_tokenizer(["some words 123"], 300, "<|endoftext|>").save(str(folder / "own.json"))
    return DataConfig(
        dir=str(folder / "out"),
        source=source,
        tokenizer=TokenizerConfig(path=str(folder / "own.json")),
        validation_fraction=0.2,
    )


def undisturbed(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """The same corpus made in this process, in a folder beside it."""
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 1000)
    whole = config.model_copy(update={"dir": f"{config.dir}-whole"})
    return prepare(whole, 300, QUIET).first.manifest


def run_driver(action: str, config: DataConfig, processes: int, number: int) -> dict[str, Any]:
    arguments = [action, config.model_dump_json(), str(processes), str(number)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.killed_preparation", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        env={**os.environ, "USE_TORCH": "0"},  # of `datasets`, which would import it
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("processes", "id_field", "documents"),
    [
        pytest.param(1, None, 150, id="plain"),
        pytest.param(1, "id", 150, id="ids"),
        pytest.param(2, "id", 60, id="processes"),
    ],
)
def test_killed_at_random_moments_it_makes_the_same_corpus(
    tmp_path: Path,
    processes: int,
    id_field: str | None,
    documents: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time it goes on where it was."""
    config = config_of(tmp_path, documents, id_field)
    whole = undisturbed(config, monkeypatch)
    assert (whole.duplicates > documents // 4) == (id_field is not None)
    found = run_driver("random", config, processes, number=processes)
    assert found["status"] == 0
    safe = found["safe"]
    assert len(set(safe)) >= 2  # it was killed in several places
    assert safe == sorted(safe)  # and never fell back
    assert read_manifest(Path(config.dir)) == whole
    corpus = Corpus.open(config.dir)
    for split in whole.splits:
        assert all(shard.fault() is None for shard in SplitReader(corpus, split, 16).shards)


def test_no_process_stays_when_the_main_one_is_killed(tmp_path: Path) -> None:
    """Nobody else would end those that encode."""
    found = run_driver("once", config_of(tmp_path, 90, None), processes=2, number=3)
    assert found["started"] >= 2
    assert found["left"] == 0


STRIDES = [
    pytest.param("id", 11, id="some"),
    pytest.param("id", 1, id="all", marks=pytest.mark.slow),
    pytest.param(None, 1, id="all, without ids", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("id_field", "stride"), STRIDES)
def test_killed_at_any_operation_on_a_file_it_makes_the_same_files(
    tmp_path: Path, id_field: str | None, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them those at the end, when shards are closed and the manifest is written."""
    config = config_of(tmp_path, 60, id_field)
    undisturbed(config, monkeypatch)
    found = run_driver("sweep", config, 1, stride)
    assert found["operations"] > 50
    assert found["wrong"] == []

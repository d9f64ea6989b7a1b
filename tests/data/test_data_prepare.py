"""Preparation: complete, split by document, repeatable, and never silently of another recipe."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebius.data import prepare as prepare_module
from moebius.data.config import DataConfig, FilesSource
from moebius.data.manifest import Manifest, read_manifest
from moebius.data.prepare import is_validation, prepare
from moebius.data.shards import open_shard
from moebius.data.sources import documents
from moebius.data.stream import SplitReader
from moebius.data.tokenizer import load_tokenizer
from moebius.errors import DataError
from tests.conftest import VOCAB_SIZE


def silent(line: str) -> None:
    pass


def texts_of(folder: Path, manifest: Manifest, name: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    texts = []
    for shard in manifest.splits[name].shards:
        ids: list[int] = []
        for token in open_shard(folder / shard.name, shard.tokens).tolist():
            if token == manifest.tokenizer.eod_id:
                texts.append(tokenizer.decode(ids, skip_special_tokens=False))
                ids = []
            else:
                ids.append(token)
        assert not ids, "every document ends in an end-of-document token"
    return texts


def test_nothing_is_lost_and_splits_are_chosen_by_document(
    data_config: DataConfig, manifest: Manifest
) -> None:
    folder = Path(data_config.dir)
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    for document in documents(data_config.source):
        held_out = is_validation(document.id, data_config.validation_fraction)
        expected["validation" if held_out else "train"].append(document.text)
    for name, texts in expected.items():
        assert texts_of(folder, manifest, name) == texts
        split = manifest.splits[name]
        assert split.documents == len(texts) > 0
        assert split.bytes == sum(len(text.encode()) for text in texts)
    share = len(expected["validation"]) / sum(map(len, expected.values()))
    assert 0.03 < share < 0.2


def test_a_prepared_folder_is_used_as_it_is(data_config: DataConfig, manifest: Manifest) -> None:
    times = {path: path.stat().st_mtime_ns for path in Path(data_config.dir).iterdir()}
    assert prepare(data_config, VOCAB_SIZE, silent) == manifest
    assert {path: path.stat().st_mtime_ns for path in Path(data_config.dir).iterdir()} == times


@pytest.mark.parametrize(
    ("changes", "vocab_size", "field"),
    [
        ({"source": {"kind": "stdlib"}}, VOCAB_SIZE, "data.source"),
        ({"validation_fraction": 0.2}, VOCAB_SIZE, "data.validation_fraction"),
        ({"tokenizer": {"vocab_size": 300}}, VOCAB_SIZE, "data.tokenizer"),
        ({}, 300, "data.tokenizer"),
    ],
)
def test_a_folder_of_another_recipe_is_refused(
    data_config: DataConfig,
    manifest: Manifest,
    changes: dict[str, Any],
    vocab_size: int,
    field: str,
) -> None:
    other = DataConfig.model_validate(data_config.model_dump() | changes)
    with pytest.raises(DataError, match=rf"{field}: .* was prepared with"):
        prepare(other, vocab_size, silent)


def test_an_interrupted_preparation_is_done_again(
    data_config: DataConfig, manifest: Manifest, tmp_path: Path
) -> None:
    """What stands in a folder without a manifest is not trusted."""
    (tmp_path / "train-00000.bin").write_bytes(b"half")
    again = prepare(data_config.model_copy(update={"dir": str(tmp_path)}), VOCAB_SIZE, silent)
    assert again == manifest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "cannot read"),
        (lambda data: data[:50] + bytes([data[50] ^ 0x80]) + data[51:], "cannot read"),
        (lambda data: data.replace(b'"validation": {', b'"test": {'), "train and validation"),
        (lambda data: data.replace(b'"eod_id":', b'"eod":'), "tokenizer.eod_id: Field required"),
    ],
)
def test_a_damaged_manifest_is_named(
    data_config: DataConfig,
    manifest: Manifest,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    folder = Path(shutil.copytree(data_config.dir, tmp_path / "copy"))
    path = folder / "manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        read_manifest(folder)
    assert f"'{path}'" in str(caught.value)
    assert message in str(caught.value)


def test_another_tokenizer_beside_the_shards_is_noticed(
    data_config: DataConfig, manifest: Manifest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(data_config.dir, tmp_path / "copy"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not the one the shards were made with"):
        read_manifest(folder)
    with pytest.raises(DataError, match="there is no prepared corpus"):
        read_manifest(tmp_path / "nowhere")


def test_a_full_disk_is_one_line(tmp_path: Path, data_config: DataConfig) -> None:
    """A real one: writing to the folder fails with ENOSPC after the tokenizer."""
    (tmp_path / "train-00000.bin").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"cannot write to .*No space left on device"):
        prepare(data_config.model_copy(update={"dir": str(tmp_path)}), VOCAB_SIZE, silent)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "the corpus is empty"),
        ([""], "the corpus is empty"),
        (["one document is not two splits"], "give more text"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, texts: list[str], message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(dir=str(tmp_path / "data"), source=FilesSource(paths=(str(path),)))
    with pytest.raises(DataError, match=message):
        prepare(config, VOCAB_SIZE, silent)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_stream_does_not_notice_shard_borders(
    data_config: DataConfig,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 5_000)
    config = data_config.model_copy(update={"dir": str(tmp_path)})
    many = prepare(config, VOCAB_SIZE, silent)
    assert len(many.splits["train"].shards) > 3
    assert read_manifest(tmp_path) == many
    one_reader = SplitReader(Path(data_config.dir), manifest, "train", 100)
    many_reader = SplitReader(tmp_path, many, "train", 100)
    assert one_reader.num_windows == many_reader.num_windows
    for number in range(one_reader.num_windows):
        assert np.array_equal(one_reader.window(number), many_reader.window(number))


def test_the_tokenizer_can_be_given(
    data_config: DataConfig, manifest: Manifest, tmp_path: Path
) -> None:
    """A loaded tokenizer gives the same shards as the training that made it."""
    path = str(Path(data_config.dir) / "tokenizer.json")
    tree = data_config.model_dump() | {"dir": str(tmp_path), "tokenizer": {"path": path}}
    given = prepare(DataConfig.model_validate(tree), VOCAB_SIZE, silent)
    assert given.splits == manifest.splits
    assert given.tokenizer == manifest.tokenizer
    hashes = Counter(shard.sha256 for split in given.splits.values() for shard in split.shards)
    assert max(hashes.values()) == 1

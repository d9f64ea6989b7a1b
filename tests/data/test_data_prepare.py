"""A prepared corpus holds its documents, each in its split, and says what made it."""

import fcntl
import gc
import hashlib
import itertools
import json
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from moebius.data import encode as encode_module
from moebius.data import prepare as prepare_module
from moebius.data.config import (
    CorpusConfig,
    DataConfig,
    FilesSource,
    HubSource,
    TokenizerConfig,
    TokensSource,
)
from moebius.data.corpus import Corpus, SplitReader
from moebius.data.journal import SplitWriter
from moebius.data.manifest import Manifest, read_manifest
from moebius.data.prepare import Workshop, is_validation, prepare
from moebius.data.stream import TrainStream
from moebius.data.tokenizer import load_tokenizer, train_tokenizer
from moebius.errors import DataError
from moebius.files import seal, unseal
from tests.conftest import QUIET, VOCAB_SIZE

EOD = "<|endoftext|>"


def prepared(config: DataConfig, vocab_size: int = 300) -> Manifest:
    """The manifest of a corpus, which is made where it is not there."""
    return prepare(config, vocab_size, QUIET).first.manifest


def source_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config_of(folder: Path, *paths: Path, **changes: Any) -> DataConfig:
    """A small corpus of jsonl files."""
    values: dict[str, Any] = {
        "dir": str(folder),
        "source": FilesSource(paths=tuple(map(str, paths))),
        "sequence_length": 16,
        "validation_fraction": 0.2,
    }
    return DataConfig(**values | changes)


def held_out(document_id: str, fraction: float) -> bool:
    """The rule, written down once more."""
    return int(hashlib.sha256(document_id.encode()).hexdigest()[:16], 16) / 2**64 < fraction


def decoded(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """Documents of a split, read from the files without the package's reader."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = [np.fromfile(folder / f"{s.name}.bin", "<u2") for s in manifest.splits[split].shards]
    tokens = np.concatenate(parts)
    ends = np.flatnonzero(tokens == manifest.tokenizer.eod_id)
    assert ends[-1] == len(tokens) - 1  # every document is ended, the last one too
    pieces = np.split(tokens, ends + 1)[:-1]
    return [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and identity of each file."""
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}


def bin_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def refusal(config: DataConfig, vocab_size: int = 300) -> str:
    with pytest.raises(DataError) as caught:
        prepared(config, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def small_file(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents, so that preparing takes a moment only."""
    path = tmp_path_factory.mktemp("small") / "small.jsonl"
    return write_texts(path, source_texts(corpus_file)[:60])


@pytest.fixture(scope="module")
def small_corpus(small_file: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Prepared once; tests that change it work on a copy."""
    config = config_of(tmp_path_factory.mktemp("prepared"), small_file)
    prepared(config)
    return config


@pytest.fixture
def corpus_copy(small_corpus: DataConfig, tmp_path: Path) -> DataConfig:
    folder = shutil.copytree(small_corpus.dir, tmp_path / "copy")
    return small_corpus.model_copy(update={"dir": str(folder)})


# What the shards hold.


def test_every_document_is_in_the_split_of_its_hash(
    corpus_file: Path, data_config: DataConfig, manifest: Manifest
) -> None:
    """Decoded, in order, complete; the two splits share none."""
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    for number, text in enumerate(source_texts(corpus_file)):
        name = "validation" if held_out(f"{corpus_file.name}:{number}", 0.1) else "train"
        expected[name].append(text)
    folder = Path(data_config.dir)
    assert decoded(folder, manifest, "train") == expected["train"]
    assert decoded(folder, manifest, "validation") == expected["validation"]
    assert len(expected["validation"]) > 10


def test_totals_are_those_of_the_shards(
    corpus_file: Path, data_config: DataConfig, manifest: Manifest
) -> None:
    folder = Path(data_config.dir)
    total_documents = 0
    for name, split in manifest.splits.items():
        texts = decoded(folder, manifest, name)
        tokens = sum((folder / f"{s.name}.bin").stat().st_size // 2 for s in split.shards)
        assert split.tokens == tokens
        assert split.documents == len(texts)
        total_documents += len(texts)
        for shard in split.shards:
            kinds = {"bin": shard.sha256, "idx": shard.index_sha256, "sums": shard.sums_sha256}
            for kind, expected in kinds.items():
                content = (folder / f"{shard.name}.{kind}").read_bytes()
                assert hashlib.sha256(content).hexdigest() == expected
    assert set(manifest.splits) == {"train", "validation"}
    assert total_documents == len(source_texts(corpus_file))


def test_bytes_are_the_utf8_bytes_of_the_documents(tmp_path: Path) -> None:
    """Bytes, not characters: bits per byte are divided by them."""
    texts = [f"{number}: Größe, 数据, 🧵" for number in range(40)]
    config = config_of(tmp_path / "out", write_texts(tmp_path / "a.jsonl", texts))
    made = prepared(config)
    for name, split in made.splits.items():
        found = decoded(tmp_path / "out", made, name)
        assert split.bytes == sum(len(text.encode()) for text in found) > sum(map(len, found))
    assert sum(split.bytes for split in made.splits.values()) == len("".join(texts).encode())


def test_the_tokenizer_entry_describes_the_file_beside_the_manifest(
    data_config: DataConfig, manifest: Manifest
) -> None:
    path = Path(data_config.dir) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    assert manifest.tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.tokenizer.vocab_size == tokenizer.get_vocab_size() == VOCAB_SIZE
    assert manifest.tokenizer.eod_id == tokenizer.token_to_id(EOD)


def test_a_document_that_spells_the_end_of_document_stays_one(tmp_path: Path) -> None:
    texts = [f"{number} before {EOD} after {EOD}" for number in range(40)]
    config = config_of(tmp_path / "out", write_texts(tmp_path / "a.jsonl", texts))
    made = prepared(config)
    assert made.splits["train"].documents + made.splits["validation"].documents == 40
    both = [text for name in made.splits for text in decoded(tmp_path / "out", made, name)]
    assert sorted(both) == sorted(texts)


def test_documents_without_text_are_left_out_and_move_no_other(
    small_file: Path, small_corpus: DataConfig, tmp_path: Path
) -> None:
    """The ids count rows, with or without text."""
    texts = source_texts(small_file)
    path = write_texts(tmp_path / small_file.name, [*texts, "", ""])
    made = prepared(config_of(tmp_path / "out", path))
    assert sum(split.documents for split in made.splits.values()) == len(texts)
    assert bin_bytes(tmp_path / "out") == bin_bytes(Path(small_corpus.dir))


def test_more_documents_than_one_encoding_batch_stay_in_order(
    small_corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "BATCH_DOCUMENTS", 7)
    prepared(small_corpus.model_copy(update={"dir": str(tmp_path)}))
    assert bin_bytes(tmp_path) == bin_bytes(Path(small_corpus.dir))


def test_preparing_is_deterministic(small_corpus: DataConfig, tmp_path: Path) -> None:
    again = prepared(small_corpus.model_copy(update={"dir": str(tmp_path)}))
    assert again == read_manifest(Path(small_corpus.dir))
    for path in Path(small_corpus.dir).iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_tokenizer_is_trained_on_no_more_text_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents after the limit teach it nothing, but are encoded."""
    texts = [f"{number} alpha alpha" for number in range(20)] + ["omega " * 50] * 20
    path = write_texts(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", len("".join(texts[:20])))
    made = prepared(config_of(tmp_path / "out", path))
    vocabulary = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert any("alpha" in token for token in vocabulary)
    assert not any("ome" in token for token in vocabulary)
    assert sum(split.documents for split in made.splits.values()) == 40


# The split.


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_the_share_held_out_is_the_fraction(fraction: float) -> None:
    ids = [f"rows.jsonl:{number}" for number in range(20_000)]
    share = sum(is_validation(name, fraction) for name in ids) / len(ids)
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(ids)) ** 0.5


def test_the_split_follows_the_rule() -> None:
    ids = [f"json/decoder.py:{number}" for number in range(500)] + ["größe.txt:0", ""]
    for name in ids:
        assert is_validation(name, 0.3) == held_out(name, 0.3)


def test_a_larger_fraction_holds_out_the_same_documents_and_more() -> None:
    ids = [str(number) for number in range(1000)]
    small, large = ({name for name in ids if is_validation(name, f)} for f in (0.1, 0.3))
    assert small < large


def test_a_corpus_that_grows_keeps_its_documents_in_their_splits(
    small_file: Path, small_corpus: DataConfig, corpus_file: Path, tmp_path: Path
) -> None:
    path = write_texts(tmp_path / small_file.name, source_texts(corpus_file)[:90])
    made = prepared(config_of(tmp_path / "out", path))
    before_folder = Path(small_corpus.dir)
    for name in ("train", "validation"):
        before = decoded(before_folder, read_manifest(before_folder), name)
        assert decoded(tmp_path / "out", made, name)[: len(before)] == before


# Reuse, refusal and repair.


def test_a_second_prepare_reuses_the_files(small_corpus: DataConfig) -> None:
    folder = Path(small_corpus.dir)
    before = state_of(folder)
    reports: list[str] = []
    again = prepare(small_corpus, 300, Workshop(reports.append))
    assert again.first.manifest == read_manifest(folder)
    assert state_of(folder) == before
    assert reports == []


def test_the_source_may_be_gone_once_prepared(
    small_file: Path, tmp_path: Path, small_corpus: DataConfig
) -> None:
    path = Path(shutil.copy(small_file, tmp_path))
    config = config_of(tmp_path / "out", path)
    made = prepared(config)
    path.unlink()
    assert prepared(config) == made


def test_the_shape_of_samples_is_not_part_of_the_corpus(small_corpus: DataConfig) -> None:
    changed = small_corpus.model_copy(update={"sequence_length": 99})
    assert prepared(changed) == read_manifest(Path(small_corpus.dir))


def test_a_vocabulary_size_of_the_model_or_of_the_data_is_the_same(
    small_corpus: DataConfig,
) -> None:
    changed = small_corpus.model_copy(update={"tokenizer": TokenizerConfig(vocab_size=300)})
    assert prepared(changed, 5000) == read_manifest(Path(small_corpus.dir))


OTHER_RECIPES = [
    pytest.param({"source": FilesSource(paths=("other.jsonl",))}, "source", id="paths"),
    pytest.param({"source": HubSource(name="some/data")}, "source", id="kind"),
    pytest.param({"tokenizer": TokenizerConfig(vocab_size=301)}, "tokenizer", id="size"),
    pytest.param({"tokenizer": TokenizerConfig(path="t.json")}, "tokenizer", id="path"),
    pytest.param({"tokenizer": TokenizerConfig(eod_token="<e>")}, "tokenizer", id="eod"),
    pytest.param({"validation_fraction": 0.21}, "validation_fraction", id="fraction"),
]


@pytest.mark.parametrize(("change", "field"), OTHER_RECIPES)
def test_a_corpus_made_otherwise_is_refused_by_the_field(
    small_corpus: DataConfig, change: dict[str, Any], field: str
) -> None:
    before = state_of(Path(small_corpus.dir))
    message = refusal(small_corpus.model_copy(update=change))
    assert message.startswith(f"data.{field}:")
    assert small_corpus.dir in message
    assert state_of(Path(small_corpus.dir)) == before


def test_another_text_field_is_another_source(small_corpus: DataConfig) -> None:
    assert isinstance(small_corpus.source, FilesSource)
    source = small_corpus.source.model_copy(update={"text_field": "body"})
    message = refusal(small_corpus.model_copy(update={"source": source}))
    assert message.startswith("data.source:")


def test_a_model_of_another_vocabulary_is_refused(small_corpus: DataConfig) -> None:
    """The model's size is that of the tokenizer trained for it."""
    message = refusal(small_corpus, 400)
    assert message.startswith("data.tokenizer:")
    assert "300" in message
    assert "400" in message


def test_a_corpus_without_its_manifest_is_made_again(
    corpus_copy: DataConfig, small_corpus: DataConfig
) -> None:
    """What an interruption left: shards cut short, and one too many."""
    folder = Path(corpus_copy.dir)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json.tmp").write_text('{"format"')
    (folder / "train-00000.bin").write_bytes(b"\x01\x00")
    (folder / "tokenizer.json").write_text("{")
    (folder / "train-00001.bin").write_bytes(b"\x01\x00")
    made = prepared(corpus_copy)
    assert made == read_manifest(Path(small_corpus.dir)) == read_manifest(folder)
    for path in Path(small_corpus.dir).iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    reader = SplitReader(Corpus.open(str(folder)), "train", 16)
    assert [shard.fault() for shard in reader.shards] == [None]


def test_a_failed_preparation_is_not_taken_for_a_corpus(small_file: Path, tmp_path: Path) -> None:
    """The folder can be used as soon as the source is repaired."""
    path = tmp_path / "a.jsonl"
    content = small_file.read_text()
    path.write_text(content + "{broken\n")
    config = config_of(tmp_path / "out", path)
    assert str(path) in refusal(config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    path.write_text(content)
    assert sum(split.documents for split in prepared(config).splits.values()) == 60


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_refused(corpus_copy: DataConfig, content: bytes) -> None:
    path = Path(corpus_copy.dir) / "manifest.json"
    path.write_bytes(content)
    assert str(path) in refusal(corpus_copy)


def test_a_manifest_of_another_format_is_refused(corpus_copy: DataConfig) -> None:
    path = Path(corpus_copy.dir) / "manifest.json"
    tree = unseal(path.read_bytes())
    for other in (1, 3, "2", None):
        path.write_text(seal(tree | {"format": other}))
        message = refusal(corpus_copy)
        assert str(path) in message
        assert "format" in message
    path.write_text(seal(tree | {"version": 2}))
    assert str(path) in refusal(corpus_copy)
    path.write_text(seal(tree))
    prepared(corpus_copy)


@pytest.mark.parametrize("field", ["documents", "tokens", "sha256", "sums_sha256"])
def test_a_manifest_that_was_edited_is_refused(corpus_copy: DataConfig, field: str) -> None:
    """Also where what it says then could be."""
    path = Path(corpus_copy.dir) / "manifest.json"
    tree = json.loads(path.read_text())
    shard = tree["splits"]["train"]["shards"][0]
    shard[field] = shard[field][::-1] if isinstance(shard[field], str) else shard[field] + 1
    path.write_text(json.dumps(tree, indent=1))
    message = refusal(corpus_copy)
    assert str(path) in message
    assert "checksum" in message


def test_a_manifest_written_is_the_manifest_read(small_corpus: DataConfig) -> None:
    """No temporary file is left beside it."""
    folder = Path(small_corpus.dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        "lock",
        "manifest.json",
        "tokenizer.json",
        "train-00000.bin",
        "train-00000.idx",
        "train-00000.sums",
        "validation-00000.bin",
        "validation-00000.idx",
        "validation-00000.sums",
    ]
    content = json.dumps(unseal((folder / "manifest.json").read_bytes()))
    assert Manifest.model_validate_json(content) == read_manifest(folder)


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": ""}\n'])
def test_an_empty_corpus_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    message = refusal(config_of(tmp_path / "out", tmp_path / "a.jsonl"))
    assert message.startswith("data.source")
    assert "corpus is empty" in message
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("fraction", "name"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_a_split_that_would_be_empty_is_refused(
    small_file: Path, tmp_path: Path, fraction: float, name: str
) -> None:
    message = refusal(config_of(tmp_path / "out", small_file, validation_fraction=fraction))
    assert f"the {name} split" in message
    assert "60 documents" in message
    assert "validation_fraction" in message
    assert not (tmp_path / "out" / "manifest.json").exists()


# A tokenizer from elsewhere.


@pytest.fixture
def own_tokenizer(small_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "own.json"
    train_tokenizer(source_texts(small_file), 280, "</s>").save(str(path))
    return path


def test_a_given_tokenizer_is_used_and_kept(
    small_file: Path, own_tokenizer: Path, tmp_path: Path
) -> None:
    chosen = TokenizerConfig(path=str(own_tokenizer), eod_token="</s>")
    made = prepared(config_of(tmp_path / "out", small_file, tokenizer=chosen), 5000)
    own = Tokenizer.from_file(str(own_tokenizer))
    kept = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert kept.get_vocab() == own.get_vocab()
    assert made.tokenizer.vocab_size == 280
    assert made.tokenizer.eod_id == own.token_to_id("</s>")
    both = [text for name in made.splits for text in decoded(tmp_path / "out", made, name)]
    assert sorted(both) == sorted(source_texts(small_file))


def test_a_given_tokenizer_without_the_end_of_document_is_refused(
    small_file: Path, own_tokenizer: Path, tmp_path: Path
) -> None:
    chosen = TokenizerConfig(path=str(own_tokenizer))
    message = refusal(config_of(tmp_path / "out", small_file, tokenizer=chosen))
    assert "data.tokenizer.eod_token" in message
    assert str(own_tokenizer) in message
    assert EOD in message


def test_a_given_tokenizer_that_is_missing_is_refused(small_file: Path, tmp_path: Path) -> None:
    chosen = TokenizerConfig(path=str(tmp_path / "none.json"))
    message = refusal(config_of(tmp_path / "out", small_file, tokenizer=chosen))
    assert str(tmp_path / "none.json") in message


def test_a_vocabulary_with_gaps_in_its_ids_is_read_back(
    small_file: Path, own_tokenizer: Path, tmp_path: Path
) -> None:
    """The ids of a given tokenizer reach beyond the number of its tokens."""
    tree = json.loads(own_tokenizer.read_text())
    vocabulary = tree["model"]["vocab"]
    for token in sorted(vocabulary, key=vocabulary.__getitem__)[-20:]:
        vocabulary[token] += 1000
    own_tokenizer.write_text(json.dumps(tree))
    chosen = TokenizerConfig(path=str(own_tokenizer), eod_token="</s>")
    made = prepared(config_of(tmp_path / "out", small_file, tokenizer=chosen), 5000)
    reader = SplitReader(Corpus.open(str(tmp_path / "out")), "train", 16)
    highest = max(int(reader.sample(number)[0].max()) for number in range(reader.num_samples))
    assert 1000 < highest < made.tokenizer.vocab_size


# Several shards.


@pytest.fixture
def rotated(
    small_corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DataConfig:
    """The small corpus in shards of a few hundred tokens."""
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 700)
    config = small_corpus.model_copy(update={"dir": str(tmp_path / "rotated")})
    prepared(config)
    return config


def test_a_full_shard_is_followed_by_another(rotated: DataConfig, small_corpus: DataConfig) -> None:
    """Together they hold what one would; all but the last are full, none is empty."""
    made, whole = (read_manifest(Path(config.dir)) for config in (rotated, small_corpus))
    for name in ("train", "validation"):
        shards = made.splits[name].shards
        assert len(shards) > 2
        assert [shard.name for shard in shards] == [f"{name}-{n:05}" for n in range(len(shards))]
        assert all(shard.tokens >= 700 for shard in shards[:-1])
        assert all(shard.documents > 0 for shard in shards)
        joined = b"".join((Path(rotated.dir) / f"{s.name}.bin").read_bytes() for s in shards)
        assert joined == (Path(small_corpus.dir) / f"{name}-00000.bin").read_bytes()
        for total in ("documents", "tokens", "bytes"):
            assert getattr(made.splits[name], total) == getattr(whole.splits[name], total)


def test_documents_do_not_span_shards(rotated: DataConfig) -> None:
    made = read_manifest(Path(rotated.dir))
    for shard in made.splits["train"].shards:
        tokens = np.fromfile(Path(rotated.dir) / f"{shard.name}.bin", "<u2")
        assert tokens[-1] == made.tokenizer.eod_id
        assert int((tokens == made.tokenizer.eod_id).sum()) == shard.documents


def test_the_stream_over_shards_equals_that_over_one(
    rotated: DataConfig, small_corpus: DataConfig
) -> None:
    """Windows that cross a border between shards are among them."""
    streams = []
    for config in (rotated, small_corpus):
        reader = SplitReader(Corpus.open(config.dir), "train", 16)
        streams.append(TrainStream([reader], batch_size=4, seed=1))
    many, one = streams
    assert len(many.readers[0].shards) > len(one.readers[0].shards) == 1
    assert any(start % 16 for start in many.readers[0].tokens[1:-1])
    for _ in range(2 * one.readers[0].num_samples // 4):
        got, wanted = next(many), next(one)
        assert got.tokens_BS.equal(wanted.tokens_BS)
        assert got.labels_BS.equal(wanted.labels_BS)


def test_another_tokenizer_beside_the_shards_is_noticed(
    data_config: DataConfig, manifest: Manifest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(data_config.dir, tmp_path / "copy"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not the one the shards were made with"):
        read_manifest(folder)
    with pytest.raises(DataError, match="there is no prepared corpus"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["progress.json.tmp", "train-00000.idx", "validation-00000.sums"])
def test_a_full_disk_is_one_line(
    small_corpus: DataConfig, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: writing a file of the folder fails with ENOSPC after the tokenizer. There is a
    corpus as soon as there is room."""
    config = small_corpus.model_copy(update={"dir": str(tmp_path)})
    monkeypatch.setattr(
        prepare_module, "clear", lambda folder: (folder / name).symlink_to("/dev/full")
    )
    with pytest.raises(DataError, match=r"cannot write to .*No space left on device") as caught:
        prepared(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / name).unlink(missing_ok=True)  # nothing is left of what is written beside its place
    monkeypatch.undo()
    assert prepared(config) == read_manifest(Path(small_corpus.dir))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond a size, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "id_field"), [(100, None), (9000, None), (20_000, "id"), (50_000, "id")]
)
def test_a_disk_that_becomes_full_anywhere_is_one_line(
    tmp_path: Path, size: int, id_field: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the preparation goes on when there is room."""
    monkeypatch.setattr(prepare_module, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(encode_module, "BATCH_DOCUMENTS", 20)
    rows_with_ids(tmp_path / "a.jsonl", repeated_ids(400))
    source = FilesSource(paths=(str(tmp_path / "a.jsonl"),), id_field=id_field)
    config = config_of(tmp_path / "out", source=source)
    try:
        with files_up_to(size):
            prepared(config)
    except DataError as error:
        message = str(error)
        assert "data.dir: cannot" in message
        assert "\n" not in message
        assert not (tmp_path / "out" / "manifest.json").exists()
    gc.collect()
    assert prepared(config) == prepared(config.model_copy(update={"dir": str(tmp_path / "whole")}))


# A preparation that was interrupted.


class StopError(Exception):
    """Raised in place of an interruption."""


def interrupt(config: DataConfig, at: int, processes: int = 1) -> bool:
    """Prepare up to a number of batches; whether that was before the end."""
    batches = itertools.count(1)

    def stop(done: int, total: int | None) -> None:
        if next(batches) == at:
            raise StopError

    try:
        prepare(config, 300, Workshop(lambda line: None, stop, processes))
    except StopError:
        return True
    return False


def all_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def journaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is written after each batch, batches and shards are small."""
    monkeypatch.setattr(prepare_module, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(encode_module, "BATCH_DOCUMENTS", 7)


@pytest.fixture(scope="module")
def undisturbed(
    small_corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of the small corpus in such shards."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "SHARD_TOKENS", 3000)
        prepared(small_corpus.model_copy(update={"dir": str(folder)}))
    return all_files(folder)


@pytest.mark.usefixtures("journaled")
def test_an_interrupted_preparation_goes_on_where_it_was(
    small_corpus: DataConfig,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After each batch: the same files, and no document before the journal's is encoded again."""
    encoded: list[str] = []
    encode = encode_module._encode

    def counted(encoder: Any, documents: list[Any]) -> Any:
        encoded.extend(document.id for document in documents)
        return encode(encoder, documents)

    monkeypatch.setattr(encode_module, "_encode", counted)
    for at in (1, 2, 5, 9):  # 60 documents are 9 batches
        config = small_corpus.model_copy(update={"dir": str(tmp_path / str(at))})
        assert interrupt(config, at)
        assert not (tmp_path / str(at) / "manifest.json").exists()
        encoded.clear()
        said: list[str] = []
        prepare(config, 300, Workshop(said.append))
        first = 7 * (at - 1)  # it was interrupted before the journal was written
        assert [name.split(":")[1] for name in encoded] == [str(n) for n in range(first, 60)]
        assert any(f"after {first} documents" in line for line in said) == (at > 1)
        assert all_files(tmp_path / str(at)) == undisturbed
    assert not interrupt(small_corpus.model_copy(update={"dir": str(tmp_path / "10")}), 10)


@pytest.mark.usefixtures("journaled")
def test_progress_is_told_in_bytes_of_text(
    small_file: Path, small_corpus: DataConfig, tmp_path: Path
) -> None:
    """Also that of a preparation which goes on."""
    config = small_corpus.model_copy(update={"dir": str(tmp_path)})
    assert interrupt(config, 4)
    seen: list[tuple[int, int | None]] = []
    prepare(config, 300, Workshop(lambda line: None, lambda *values: seen.append(values)))
    sizes = [len(text.encode()) for text in source_texts(small_file)]
    ends = [*range(28, 60, 7), 60]  # 21 documents are in the journal
    assert seen == [(sum(sizes[:end]), small_file.stat().st_size) for end in ends]


@pytest.mark.usefixtures("journaled")
def test_a_preparation_may_be_interrupted_again_and_again(
    small_corpus: DataConfig, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    config = small_corpus.model_copy(update={"dir": str(tmp_path / "out")})
    times = 0
    while interrupt(config, 2):
        times += 1
    assert times == 8
    assert all_files(tmp_path / "out") == undisturbed


def change_recipe(folder: Path) -> None:
    path = folder / "progress.json"
    tree = unseal(path.read_bytes())
    tree["recipe"]["validation_fraction"] = 0.3
    path.write_text(seal(tree))


def cut_lengths(folder: Path) -> None:
    path = sorted(folder.glob("train-*.lengths"))[0]
    path.write_bytes(path.read_bytes()[:-4])


def cut_tokens(folder: Path) -> None:
    path = sorted(folder.glob("train-*.lengths"))[0]
    path.with_suffix(".bin").write_bytes(b"\x01\x00")


REMAINS = [
    pytest.param(lambda folder: (folder / "progress.json").write_text("{"), id="journal"),
    pytest.param(lambda folder: (folder / "progress.json").unlink(), id="no journal"),
    pytest.param(change_recipe, id="recipe"),
    pytest.param(lambda folder: (folder / "tokenizer.json").write_text("{}"), id="tokenizer"),
    pytest.param(lambda folder: (folder / "tokenizer.json").unlink(), id="no tokenizer"),
    pytest.param(cut_lengths, id="lengths"),
    pytest.param(cut_tokens, id="tokens"),
    pytest.param(lambda folder: (folder / "train-00000.bin").unlink(), id="no shard"),
]


@pytest.mark.usefixtures("journaled")
@pytest.mark.parametrize("damage", REMAINS)
def test_what_cannot_be_gone_on_from_is_made_anew(
    small_corpus: DataConfig,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:
    """The remains of another preparation, or of this one and a broken disk."""
    config = small_corpus.model_copy(update={"dir": str(tmp_path / "out")})
    assert interrupt(config, 7)
    assert len(list((tmp_path / "out").glob("train-*.idx"))) > 1
    damage(tmp_path / "out")
    prepared(config)
    assert all_files(tmp_path / "out") == undisturbed


@pytest.mark.usefixtures("journaled")
def test_another_recipe_does_not_go_on(small_corpus: DataConfig, tmp_path: Path) -> None:
    config = small_corpus.model_copy(update={"dir": str(tmp_path / "out")})
    assert interrupt(config, 5)
    other = config.model_copy(update={"validation_fraction": 0.3})
    prepared(other)
    prepared(other.model_copy(update={"dir": str(tmp_path / "whole")}))
    assert all_files(tmp_path / "out") == all_files(tmp_path / "whole")


@pytest.mark.usefixtures("journaled")
def test_a_source_that_was_repaired_goes_on(
    small_file: Path, own_tokenizer: Path, tmp_path: Path
) -> None:
    """The documents before the broken place are not read again."""
    path = tmp_path / "a.jsonl"
    lines = small_file.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    path.write_text("".join([*lines[:40], '{"text": 7}\n', *lines[41:]]))
    chosen = TokenizerConfig(path=str(own_tokenizer), eod_token="</s>")
    config = config_of(tmp_path / "out", path, tokenizer=chosen)
    with pytest.raises(DataError, match=r"data\.source"):
        prepared(config)
    path.write_text("".join(lines))
    said: list[str] = []
    prepare(config, 300, Workshop(said.append))
    assert any("going on after 35 documents" in line for line in said)
    made = read_manifest(tmp_path / "out")
    both = [text for name in made.splits for text in decoded(tmp_path / "out", made, name)]
    assert sorted(both) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize("finished", [False, True])
def test_a_second_preparation_waits_for_the_first(
    small_corpus: DataConfig, tmp_path: Path, finished: bool
) -> None:
    """And takes its corpus, or goes on where it was killed."""
    config = small_corpus.model_copy(update={"dir": str(tmp_path)})
    if not finished:
        assert interrupt(config, 1)
    said: list[str] = []
    waiting = threading.Event()

    def report(line: str) -> None:
        said.append(line)
        waiting.set()

    with (tmp_path / "lock").open("w") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = pool.submit(prepare, config, 300, Workshop(report))
        assert waiting.wait(10)
        if finished:
            before = Path(small_corpus.dir)
            shutil.copytree(before, tmp_path, dirs_exist_ok=True, ignore=lambda *_: ["lock"])
        assert not second.done()
        fcntl.flock(file, fcntl.LOCK_UN)
        made = second.result().first.manifest
    assert made == read_manifest(Path(small_corpus.dir))
    assert str(tmp_path) in said[0]
    assert "waiting" in said[0]
    assert (len(said) == 1) == finished


# Ids from the source.


def rows_with_ids(path: Path, ids: list[str]) -> list[dict[str, str]]:
    """Rows of distinct texts with such ids, written to a file."""
    rows = [{"text": f"text {number} of {name}", "id": name} for number, name in enumerate(ids)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def repeated_ids(count: int) -> list[str]:
    """Each about twice, near and far from each other."""
    rng = random.Random(count)
    return [f"id-{rng.randrange(count // 2)}" for _ in range(count)]


def ids_config(tmp_path: Path, *names: str) -> DataConfig:
    source = FilesSource(paths=tuple(str(tmp_path / name) for name in names), id_field="id")
    return config_of(tmp_path / "out", source=source)


@pytest.mark.parametrize("batch", [7, 1000])
def test_of_documents_with_the_same_id_the_first_is_kept(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across files and batches; the ids decide the splits, and the manifest counts the others."""
    monkeypatch.setattr(encode_module, "BATCH_DOCUMENTS", batch)
    ids = repeated_ids(200)
    rows = rows_with_ids(tmp_path / "a.jsonl", ids[:120])
    rows += rows_with_ids(tmp_path / "b.jsonl", ids[120:])
    said: list[str] = []
    config = ids_config(tmp_path, "a.jsonl", "b.jsonl")
    made = prepare(config, 300, Workshop(said.append)).first.manifest
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for row in rows:
        if row["id"] not in seen:
            seen.add(row["id"])
            name = "validation" if held_out(row["id"], 0.2) else "train"
            expected[name].append(row["text"])
    for name, texts in expected.items():
        assert decoded(tmp_path / "out", made, name) == texts
    assert made.duplicates == 200 - len(seen) > 50
    assert any(f"{made.duplicates} documents left out" in line for line in said)
    assert not list((tmp_path / "out").glob("ids.*"))
    assert read_manifest(tmp_path / "out") == made


def test_without_an_id_field_nothing_is_left_out(tmp_path: Path) -> None:
    rows_with_ids(tmp_path / "a.jsonl", ["same"] * 40)
    made = prepared(config_of(tmp_path / "out", tmp_path / "a.jsonl"))
    assert sum(split.documents for split in made.splits.values()) == 40
    assert made.duplicates == 0


@pytest.mark.usefixtures("journaled")
def test_duplicates_are_counted_once_however_often_it_was_interrupted(tmp_path: Path) -> None:
    """Those before and after an interruption know each other."""
    rows_with_ids(tmp_path / "a.jsonl", repeated_ids(120))
    config = ids_config(tmp_path, "a.jsonl")
    whole = prepared(config.model_copy(update={"dir": str(tmp_path / "whole")}))
    assert whole.duplicates > 30
    times = 0
    while interrupt(config, 3):
        gc.collect()  # lets go of the database of ids, as a process that ends does
        times += 1
    assert times == 8
    assert read_manifest(tmp_path / "out") == whole
    assert bin_bytes(tmp_path / "out") == bin_bytes(tmp_path / "whole")


@pytest.mark.usefixtures("journaled")
@pytest.mark.parametrize("closed", [0, 1])
def test_ids_are_known_until_the_shards_are_closed(
    tmp_path: Path, closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing the last shards takes a while, in which a preparation may be killed."""
    rows_with_ids(tmp_path / "a.jsonl", repeated_ids(200))
    config = ids_config(tmp_path, "a.jsonl")
    whole = prepared(config.model_copy(update={"dir": str(tmp_path / "whole")}))
    close, splits = SplitWriter.close, itertools.count()

    def stopped(self: SplitWriter) -> Any:
        if next(splits) == closed:
            raise StopError
        return close(self)

    def rarely(done: int, total: int | None) -> None:
        if done > 1000:
            monkeypatch.setattr(prepare_module, "JOURNAL_SECONDS", 1e9)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "close", stopped)
        with pytest.raises(StopError):
            prepare(config, 300, Workshop(lambda line: None, rarely))
    gc.collect()
    journal = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert 0 < journal["documents"] < 200
    assert prepared(config) == whole


# Processes.


def test_several_processes_write_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which documents are duplicates, too."""
    monkeypatch.setattr(encode_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(encode_module, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 700)
    rows_with_ids(tmp_path / "a.jsonl", repeated_ids(100))
    config = ids_config(tmp_path, "a.jsonl")
    for processes in (1, 2):
        changed = config.model_copy(update={"dir": str(tmp_path / str(processes))})
        prepare(changed, 300, Workshop(lambda line: None, processes=processes))
    assert all_files(tmp_path / "2") == all_files(tmp_path / "1")


def test_an_error_in_another_process_is_one_line(
    own_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "SMALL_BYTES", 0)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "bad \\ud800"}\n')
    chosen = TokenizerConfig(path=str(own_tokenizer), eod_token="</s>")
    config = config_of(tmp_path / "out", path, tokenizer=chosen)
    with pytest.raises(DataError, match=r"data.source") as caught:
        prepare(config, 300, Workshop(lambda line: None, processes=2))
    assert "\n" not in str(caught.value)


# Token files.


@pytest.mark.usefixtures("journaled")
def test_token_files_go_on_in_the_right_file(
    small_file: Path, own_tokenizer: Path, tmp_path: Path
) -> None:
    """Documents are numbered in each file; several batches in each of several files."""
    tokenizer = load_tokenizer(own_tokenizer)
    texts = source_texts(small_file)
    eod = tokenizer.token_to_id("</s>")
    for number in range(3):
        part = [[*tokenizer.encode(text).ids, eod] for text in texts[20 * number :][:20]]
        tokens = np.array([token for ids in part for token in ids], dtype="<u2")
        tokens.tofile(tmp_path / f"{number}.bin")
    config = config_of(
        tmp_path / "out",
        source=TokensSource(kind="tokens", paths=(str(tmp_path / "*.bin"),), dtype="uint16"),
        tokenizer=TokenizerConfig(path=str(own_tokenizer), eod_token="</s>"),
    )
    whole = prepared(config.model_copy(update={"dir": str(tmp_path / "whole")}))
    both = [text for name in whole.splits for text in decoded(tmp_path / "whole", whole, name)]
    assert sorted(both) == sorted(texts)
    assert sum(split.bytes for split in whole.splits.values()) == len("".join(texts).encode())
    for at in (2, 4, 5, 8):
        again = config.model_copy(update={"dir": str(tmp_path / f"at-{at}")})
        assert interrupt(again, at)
        prepared(again)
        assert all_files(tmp_path / f"at-{at}") == all_files(tmp_path / "whole")


# Several corpora.


def test_corpora_of_a_mixture_share_a_tokenizer(small_file: Path, tmp_path: Path) -> None:
    """Trained on all of them, or that of one which is there already."""
    texts = {
        "one": [f"alpha alpha {n}" for n in range(30)],
        "two": [f"omega {n}" for n in range(30)],
    }
    for name, content in texts.items():
        write_texts(tmp_path / f"{name}.jsonl", content)
    files = {name: FilesSource(paths=(str(tmp_path / f"{name}.jsonl"),)) for name in texts}
    config = DataConfig(
        dir=str(tmp_path / "out"),
        source=None,
        corpora={name: CorpusConfig(source=source) for name, source in files.items()},
        validation_fraction=0.2,
    )
    made = prepare(config, 300, QUIET)
    vocabulary = load_tokenizer(made.tokenizer_file).get_vocab()
    assert any("alpha" in token for token in vocabulary)
    assert any("omega" in token for token in vocabulary)
    for name, corpus in made.members.items():
        folder = tmp_path / "out" / name
        assert corpus.storage.folder == folder
        assert corpus.manifest.tokenizer == made.tokenizer
        splits = corpus.manifest.splits
        both = [text for split in splits for text in decoded(folder, corpus.manifest, split)]
        assert sorted(both) == sorted(texts[name])
    before = {name: state_of(tmp_path / "out" / name) for name in texts}
    shutil.rmtree(tmp_path / "out" / "two")
    again = prepare(config, 300, QUIET)
    assert again.fingerprint == made.fingerprint
    assert state_of(tmp_path / "out" / "one") == before["one"]


def test_corpora_of_two_tokenizers_are_refused(
    small_file: Path, small_corpus: DataConfig, tmp_path: Path
) -> None:
    prepared(config_of(tmp_path / "other", small_file), 310)
    folders = {"a": small_corpus.dir, "b": str(tmp_path / "other")}
    config = DataConfig(
        dir=str(tmp_path),
        source=None,
        corpora={name: CorpusConfig(dir=folder) for name, folder in folders.items()},
    )
    message = refusal(config)
    assert message.startswith("data.corpora.b")
    assert "another tokenizer" in message

"""Token files become a corpus: the same documents, bytes counted, killed and gone on."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moebius.data import encode
from moebius.data import prepare as preparing
from moebius.data.config import DataConfig
from moebius.data.corpus import Corpora, open_corpora
from moebius.data.encode import Encoded
from moebius.data.prepare import Workshop, is_validation, prepare
from moebius.data.shards import Shard
from moebius.data.sources import documents
from moebius.data.tokenizer import load_tokenizer
from tests.conftest import QUIET

EOD = 0


@pytest.fixture(scope="module")
def ids(data_config: DataConfig, corpora: Corpora) -> list[list[int]]:
    """The documents of the tests' corpus."""
    tokenizer = load_tokenizer(corpora.tokenizer_file)
    assert data_config.source is not None
    texts = [document.text for document in documents(data_config.source)]  # type: ignore[arg-type]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture
def config(ids: list[list[int]], corpora: Corpora, tmp_path: Path) -> DataConfig:
    """Three files in two formats."""
    third = len(ids) // 3
    for number, name in enumerate(("a.npy", "b.bin", "c.npy")):
        flat = np.array(
            [i for doc in ids[number * third : (number + 1) * third] for i in [*doc, EOD]]
        )
        path = tmp_path / name
        np.save(path, flat.astype(np.uint16)) if name.endswith("npy") else flat.astype(
            np.uint16
        ).tofile(path)
    return DataConfig.model_validate(
        {
            "dir": str(tmp_path / "data"),
            "source": {
                "kind": "tokens",
                "paths": [str(tmp_path / "*.npy"), str(tmp_path / "*.bin")],
                "dtype": "uint16",
            },
            "tokenizer": {"path": str(corpora.tokenizer_file)},
            "validation_fraction": 0.2,
        }
    )


def contents(config: DataConfig) -> dict[str, list[bytes]]:
    """The documents of each split."""
    corpus = open_corpora(config).first
    found: dict[str, list[bytes]] = {}
    for name, split in corpus.manifest.splits.items():
        for entry in split.shards:
            shard = Shard(corpus.storage, entry, corpus.manifest.tokenizer.vocab_size)
            tokens: NDArray[np.int64] = shard.tokens(0, len(shard))
            ends = np.cumsum(shard.lengths())
            parts = np.split(tokens, ends[:-1])
            found.setdefault(name, []).extend(part.astype(np.int64).tobytes() for part in parts)
    return found


def test_documents_are_those_of_the_files(config: DataConfig, ids: list[list[int]]) -> None:
    """In their order, each in the split of its id, with the bytes of their text."""
    corpora = prepare(config, 512, QUIET)
    third = len(ids) // 3
    expected: dict[str, list[bytes]] = {"train": [], "validation": []}
    for file, start in (("a.npy", 0), ("c.npy", 2 * third), ("b.bin", third)):
        for number in range(third):
            name = "validation" if is_validation(f"{file}:{number}", 0.2) else "train"
            document = np.array([*ids[start + number], EOD], dtype=np.int64)
            if len(document) > 1:
                expected[name].append(document.tobytes())
    assert contents(config) == expected
    tokenizer = load_tokenizer(corpora.tokenizer_file)
    text = "".join(tokenizer.decode(doc) for doc in ids[: 3 * third])
    splits = corpora.first.manifest.splits.values()
    assert sum(split.bytes for split in splits) == len(text.encode())


@pytest.mark.parametrize("after", range(1, 9))
def test_a_broken_conversion_goes_on_where_it_was(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int
) -> None:
    """Also in the second and in the third file."""
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 20)
    monkeypatch.setattr(preparing, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(preparing, "SHARD_TOKENS", 3000)
    whole = config.model_copy(update={"dir": str(tmp_path / "whole")})
    prepare(whole, 512, QUIET)
    calls = 0

    def fail(done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, 512, Workshop(lambda line: None, fail))
    assert isinstance(calls, int)
    prepare(config, 512, QUIET)
    assert contents(config) == contents(whole)
    assert open_corpora(config).fingerprint == open_corpora(whole).fingerprint


def test_batches_say_where_they_end(config: DataConfig, corpora: Corpora) -> None:
    """The state of each is the number of the next document of all files."""
    source = config.source
    assert source is not None
    whole = list(encode.encoded_tokens(source, corpora.tokenizer_file, EOD, 0))  # type: ignore[arg-type]
    names = [item.id for batch in whole for item in batch.items]
    state = whole[0].state["document"]
    rest: list[Encoded] = list(
        encode.encoded_tokens(source, corpora.tokenizer_file, EOD, state)  # type: ignore[arg-type]
    )
    assert names == [item.id for batch in (whole[0], *rest) for item in batch.items]

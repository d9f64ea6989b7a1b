"""A data set that is tokenized while training: the same samples as prepared, resumed exactly."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moebius.data import live
from moebius.data.build import build_stream
from moebius.data.config import DATA_RULES, DataConfig
from moebius.data.corpus import open_corpora
from moebius.data.live import LiveStream
from moebius.data.prepare import is_validation, prepare
from moebius.data.sources import documents
from moebius.data.stream import Stream
from moebius.data.tokenizer import load_tokenizer
from moebius.errors import DataError
from tests.conftest import QUIET

LENGTH = 24
DOCUMENTS = 700


def write_data_set(folder: Path, texts: list[str]) -> None:
    """As `datasets` finds it on the hub, in two files."""
    folder.mkdir(exist_ok=True)
    half = len(texts) // 2
    for number, part in enumerate((texts[:half], texts[half:])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"train-{number:05}-of-00002.jsonl").write_text("".join(lines))


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set is small: a pass through it must take several reads all the same."""
    monkeypatch.setattr(live, "READ_BYTES", 4000)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"document {n}: {'words ' * (n % 37)}end of {n}" for n in range(DOCUMENTS)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> DataConfig:
    """Prepared: the tokenizer and some held-out text."""
    root = tmp_path_factory.mktemp("live")
    write_data_set(root / "set", texts)
    config = DataConfig.model_validate(
        {
            "dir": str(root / "data"),
            "source": {"kind": "hf-stream", "name": str(root / "set")},
            "sequence_length": LENGTH,
            "validation_fraction": 0.1,
            "shuffle": {"kind": "none"},
        }
    )
    prepare(config, 300, QUIET)
    return config


@pytest.fixture(scope="module")
def tokens(config: DataConfig) -> NDArray[np.int64]:
    """Two passes through the training documents, in the simplest way."""
    tokenizer = load_tokenizer(Path(config.dir) / "tokenizer.json")
    assert config.source is not None
    ids = [
        [*tokenizer.encode(document.text, add_special_tokens=False).ids, 0]
        for document in documents(config.source)  # type: ignore[arg-type]
        if not is_validation(document.id, config.validation_fraction)
    ]
    return np.array(list(itertools.chain.from_iterable(ids)) * 2)


def stream_of(config: DataConfig, batch_size: int, prefetch: int = 2) -> Stream:
    config = config.model_copy(update={"prefetch": prefetch})
    return build_stream(config, open_corpora(config), batch_size, 0, {})


def rows(stream: Stream, num_batches: int) -> list[bytes]:
    batches = [next(stream) for _ in range(num_batches)]
    return [
        np.append(tokens, labels[-1]).tobytes()
        for batch in batches
        for tokens, labels in zip(batch.tokens_BS, batch.labels_BS, strict=True)
    ]


def test_samples_are_the_windows_of_the_text(config: DataConfig, tokens: NDArray[np.int64]) -> None:
    """Through the end of the data set and on from its beginning."""
    stream = stream_of(config, 5)
    count = (len(tokens) - 1) // LENGTH // 5
    found = rows(stream, count)
    stream.close()
    assert count * 5 * LENGTH > 0.9 * len(tokens) > DOCUMENTS
    for number, row in enumerate(found):
        start = number * LENGTH
        assert row == tokens[start : start + LENGTH + 1].tobytes()


@pytest.mark.parametrize("block", [7, 64])
def test_a_block_has_its_samples_in_another_order(config: DataConfig, block: int) -> None:
    shuffled = config.model_copy(
        update={
            "shuffle": DataConfig.model_validate(
                {"dir": "", "shuffle": {"kind": "blocks", "block": block}}
            ).shuffle
        }
    )
    plain, mixed = stream_of(config, 64), stream_of(shuffled, 64)
    expected, found = rows(plain, 3), rows(mixed, 3)
    plain.close()
    mixed.close()
    assert expected != found
    for start in range(0, 192 // block * block, block):
        assert sorted(expected[start : start + block]) == sorted(found[start : start + block])


@pytest.mark.parametrize("block", [1, 16, 100])
def test_a_stream_resumed_anywhere_gives_the_continuation(config: DataConfig, block: int) -> None:
    """With another batch size and another number of batches made ahead; in the second pass, too."""
    shuffle = {"kind": "blocks", "block": block} if block > 1 else {"kind": "none"}
    config = DataConfig.model_validate(config.model_dump() | {"shuffle": shuffle})
    whole = stream_of(config, 8)
    expected = rows(whole, 400)
    whole.close()
    for steps, batch_size in [(0, 3), (1, 8), (2, 5), (13, 1), (150, 8), (311, 6)]:
        before = stream_of(config, 8, prefetch=3)
        before.load(*restart(before, 8 * max(steps - 4, 0), config))
        rows(before, min(steps, 4))
        saved = json.loads(json.dumps(before.state_dict()))
        position = before.position
        before.close()
        after = stream_of(config, batch_size)
        after.load(position, saved)
        found = rows(after, 5)
        after.close()
        assert position == 8 * steps
        assert found == expected[position : position + len(found)]


def restart(stream: Stream, position: int, config: DataConfig) -> tuple[int, dict[str, object]]:
    """A state at a position, got by reading to it."""
    other = stream_of(config, 8, prefetch=1)
    rows(other, position // 8)
    state = other.state_dict()
    other.close()
    return position, state


def test_a_resumed_stream_does_not_read_what_came_before(
    config: DataConfig, texts: list[str], tmp_path: Path
) -> None:
    """The state of the data set is saved: its beginning may even have changed its words."""
    stream = stream_of(config, 8)
    rows(stream, 60)
    state, position = stream.state_dict(), stream.position
    expected = rows(stream, 3)
    stream.close()
    assert isinstance(stream, LiveStream)
    assert state["mark"]["source"]["row"] > 100
    source = config.source.model_copy(update={"name": str(tmp_path / "set")})  # type: ignore[union-attr]
    changed = ["x" * len(text) for text in texts[:50]] + texts[50:]
    write_data_set(tmp_path / "set", changed)
    other = stream_of(config.model_copy(update={"source": source}), 8)
    other.load(position, state)
    assert rows(other, 3) == expected
    other.close()


def test_a_text_that_has_changed_is_refused(
    config: DataConfig, texts: list[str], tmp_path: Path
) -> None:
    stream = stream_of(config, 8)
    rows(stream, 60)
    state, position = stream.state_dict(), stream.position
    stream.close()
    row = state["mark"]["source"]["row"]
    texts = [text if n < row else text.replace("end", "END") for n, text in enumerate(texts)]
    write_data_set(tmp_path / "set", texts)
    source = config.source.model_copy(update={"name": str(tmp_path / "set")})  # type: ignore[union-attr]
    other = stream_of(config.model_copy(update={"source": source}), 8)
    other.load(position, state)
    with pytest.raises(DataError, match="has other text than when the checkpoint was written"):
        next(other)
    other.close()


@pytest.mark.parametrize("state", [{}, {"block": 1}, {"block": "a", "mark": {}, "sha256": ""}])
def test_a_checkpoint_of_another_kind_of_stream_is_refused(
    config: DataConfig, state: dict[str, object]
) -> None:
    stream = stream_of(config, 8)
    with pytest.raises(DataError, match="no place in the stream"):
        stream.load(8, state)


def test_only_held_out_text_is_written(config: DataConfig) -> None:
    """From the beginning of the data set: some documents that training leaves out."""
    manifest = open_corpora(config).first.manifest
    assert set(manifest.splits) == {"validation"}
    assert 0 < manifest.splits["validation"].documents < 0.2 * DOCUMENTS
    assert not list(Path(config.dir).glob("train*"))


def test_a_corpus_without_training_split_is_not_trained_on_as_prepared(config: DataConfig) -> None:
    prepared = config.model_copy(update={"source": None})
    with pytest.raises(DataError, match="has no training split"):
        build_stream(prepared, open_corpora(prepared), 4, 0, {})


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"shuffle": {"kind": "global"}}, "shuffle.kind"),
        ({"packing": "best_fit"}, "packing"),
        ({"workers": 2}, "workers"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_by_name(
    config: DataConfig, change: dict[str, object], path: str
) -> None:
    changed = DataConfig.model_validate(config.model_dump() | change)
    problems = [problem for rule in DATA_RULES for problem in rule(changed)]
    assert [problem.path for problem in problems] == [path]
    assert "hf-stream" in problems[0].message

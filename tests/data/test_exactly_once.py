"""Whatever the layout, the batch size and the moment of a kill: each sample once, in one order."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moebius.data.audit import AuditWriter, compare, next_attempt, read_audit
from moebius.data.corpus import Corpus, SplitReader
from moebius.data.manifest import Manifest, Split, TokenizerEntry
from moebius.data.mixture import Turns
from moebius.data.order import BlockShuffle, GlobalShuffle, NoShuffle, Shuffle
from moebius.data.shards import ShardWriter
from moebius.data.storage import CacheConfig, open_storage
from moebius.data.stream import TrainStream
from moebius.errors import DataError
from moebius.parallel.batch import row_ranges

EOD = 0
NUM_CASES = 200


@dataclass(frozen=True)
class Layout:
    """Processes: `dp` that read different rows, each with some that read the same."""

    dp: int
    copies: int
    batch_size: int
    micro_batch_size: int
    prefetch: int
    workers: int


@dataclass(frozen=True)
class Order:
    """What determines the order of samples."""

    packing: str
    length: int
    shuffle: Shuffle
    phases: list[tuple[int, list[float]]] | None
    seed: int


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Two corpora of numbered tokens in several shards."""
    return [
        write_corpus(tmp_path_factory.mktemp(f"corpus-{n}"), shards, documents, seed=n)
        for n, (shards, documents) in enumerate([(3, 40), (2, 25)])
    ]


def write_corpus(folder: Path, shards: int, documents: int, seed: int) -> Corpus:
    chance = random.Random(seed)
    entries = []
    for number in range(shards):
        writer = ShardWriter(folder / f"train-{number:05}", 30_000)
        for _ in range(documents):
            size = chance.randint(1, 60)
            ids = [chance.randint(1, 29_999) for _ in range(size)]
            writer.write(np.array([*ids, EOD]))
        entries.append(writer.close())
    split = Split(bytes=1, shards=entries)
    manifest = Manifest(
        recipe={},
        tokenizer=TokenizerEntry(sha256="0" * 64, vocab_size=30_000, eod_id=EOD),
        dtype="uint16",
        splits={"train": split, "validation": split},
    )
    return Corpus(open_storage(str(folder), CacheConfig()), manifest)


class Setting:
    """What a case is about; its readers keep nothing but open files."""

    def __init__(self, corpora: list[Corpus], order: Order) -> None:
        self.order = order
        chosen = corpora if order.phases else corpora[:1]
        self.readers = [SplitReader(c, "train", order.length, order.packing) for c in chosen]

    def stream(self, layout: Layout) -> TrainStream:
        """The stream of a process."""
        order = self.order
        return TrainStream(
            self.readers,
            layout.batch_size,
            order.seed,
            order.shuffle,
            Turns(order.phases, order.seed) if order.phases else None,
            layout.prefetch,
            layout.workers,
        )


ALONE = Layout(dp=1, copies=1, batch_size=1, micro_batch_size=1, prefetch=0, workers=1)


def random_order(chance: random.Random) -> Order:
    shuffles: list[Shuffle] = [
        GlobalShuffle(),
        NoShuffle(kind="none"),
        BlockShuffle(kind="blocks", run=chance.randint(1, 9), block=chance.randint(1, 40)),
    ]
    weights = [[chance.random(), chance.random()] for _ in range(3)]
    phases = [(0, weights[0]), (chance.randint(1, 60), weights[1]), (90, weights[2])]
    return Order(
        packing=chance.choice(["concat", "best_fit"]),
        length=chance.randint(4, 40),
        shuffle=chance.choice(shuffles),
        phases=chance.choice([None, phases[:1], phases]),
        seed=chance.randint(0, 5),
    )


def random_layout(chance: random.Random) -> Layout:
    dp = chance.randint(1, 5)
    return Layout(
        dp=dp,
        copies=chance.randint(1, 2),
        batch_size=chance.randint(dp, 16),
        micro_batch_size=chance.randint(1, 6),
        prefetch=chance.randint(0, 3),
        workers=chance.randint(1, 3),
    )


Given = dict[int, bytes]
"""position -> tokens and labels that were trained on"""


def attempt(
    setting: Setting,
    layout: Layout,
    folder: Path,
    start: tuple[int, int],
    steps: int,
    chance: random.Random,
) -> list[Given]:
    """Some processes from a step and position on; some are killed before they log the last step."""
    number = next_attempt(folder)
    given: list[Given] = [{} for _ in range(steps)]
    for dp in range(layout.dp):
        for copy in range(layout.copies):
            stream = setting.stream(layout)
            stream.load(start[1], {})
            rank = dp * layout.copies + copy
            writer = AuditWriter(folder, number, rank, dp, start[0], stream)
            for step in range(steps):
                ranges = row_ranges(layout.batch_size, layout.micro_batch_size, dp, layout.dp)
                read = []
                for batch in stream.take(ranges):
                    rows = np.concatenate([batch.tokens_BS, batch.labels_BS], axis=1)
                    for sample, row in zip(batch.sample_ids_B.tolist(), rows, strict=True):
                        given[step][sample] = row.tobytes()
                        read.append(sample)
                killed = step == steps - 1 and chance.random() < 0.3
                if not killed:
                    writer.write(start[0] + step + 1, read)
            writer.close()
            stream.close()
    return given


def expected(setting: Setting) -> Iterator[tuple[list[int], bytes]]:
    """One process, one sample at a time."""
    stream = setting.stream(ALONE)
    while True:
        place = stream.place(stream.position)
        row = [stream.position, *place]
        (batch,) = stream.take([(0, 1)])
        yield row, np.concatenate([batch.tokens_BS, batch.labels_BS], axis=1).tobytes()


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_killed_and_started_otherwise_each_sample_comes_once(
    corpora: list[Corpus], case: int, tmp_path: Path
) -> None:
    """The union of the logs is the expected order, and so is what was really trained on."""
    chance = random.Random(case)
    setting = Setting(corpora, random_order(chance))
    trained: Given = {}
    step = position = 0
    for _ in range(chance.randint(1, 3)):
        layout = random_layout(chance)
        steps = chance.randint(1, 6)
        given = attempt(setting, layout, tmp_path, (step, position), steps, chance)
        saved = chance.randint(0, steps - 1)  # the last checkpoint before the kill
        for rows in given[:saved]:
            trained |= rows
        step, position = step + saved, position + saved * layout.batch_size
    layout = random_layout(chance)
    # Not killed: every process logs all of its steps.
    for rows in attempt(setting, layout, tmp_path, (step, position), 3, NeverKills()):
        trained |= rows

    rows = read_audit(tmp_path)
    assert len(rows) == position + 3 * layout.batch_size == len(trained)
    for row, (wanted, tokens) in zip(rows.tolist(), expected(setting), strict=False):
        assert row == wanted
        assert trained[row[0]] == tokens


class NeverKills(random.Random):
    """Nobody is killed."""

    def random(self) -> float:
        return 1.0


@pytest.mark.parametrize("case", range(20))
def test_an_order_is_a_plain_enumeration(corpora: list[Corpus], case: int) -> None:
    """Each epoch of each corpus has each sample once, whatever the shuffle and the mixture."""
    setting = Setting(corpora, random_order(random.Random(1000 + case)))
    stream = setting.stream(ALONE)
    epochs: dict[tuple[int, int], list[int]] = {}
    for position in range(3 * sum(stream.num_samples)):
        corpus, epoch, number = stream.place(position)
        epochs.setdefault((corpus, epoch), []).append(number)
    for (corpus, epoch), numbers in epochs.items():
        assert len(set(numbers)) == len(numbers)
        if (corpus, epoch + 1) in epochs:
            assert sorted(numbers) == list(range(stream.num_samples[corpus]))


# Logs that prove nothing.


@pytest.fixture
def log(corpora: list[Corpus], tmp_path: Path) -> Path:
    """Two processes, more than an epoch."""
    setting = Setting(corpora, Order("concat", 40, GlobalShuffle(), None, seed=0))
    layout = Layout(2, 1, 8, 4, prefetch=1, workers=1)
    attempt(setting, layout, tmp_path, (0, 0), 12, NeverKills())
    assert len(read_audit(tmp_path)) == 96
    return tmp_path


def rewrite(folder: Path, rank: int, step: int, change: list[list[int]] | None) -> None:
    """Replace the rows of a step, or remove the step."""
    path = folder / f"0001-rank-{rank:05}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        {**line, "rows": change} if line["step"] == step and "rows" in line else line
        for line in lines
        if not (line["step"] == step and "rows" in line and change is None)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows_of(folder: Path, rank: int, step: int) -> list[list[int]]:
    lines = (folder / f"0001-rank-{rank:05}.jsonl").read_text().splitlines()
    return next(line["rows"] for line in map(json.loads, lines[1:]) if line["step"] == step)


def test_a_lost_sample_is_noticed(log: Path) -> None:
    rewrite(log, 1, 5, rows_of(log, 1, 5)[:-1])
    with pytest.raises(DataError, match="step 5 has samples"):
        read_audit(log)


def test_a_position_that_comes_twice_is_noticed(log: Path) -> None:
    rows = rows_of(log, 1, 5)
    rewrite(log, 1, 5, [*rows[:-1], rows[0]])
    with pytest.raises(DataError, match="step 5 has samples"):
        read_audit(log)


def test_a_sample_that_comes_at_two_positions_is_noticed(log: Path) -> None:
    rows = rows_of(log, 1, 5)
    other = rows_of(log, 0, 3)[0]
    rewrite(log, 1, 5, [[rows[0][0], *other[1:]], *rows[1:]])
    with pytest.raises(DataError, match="came 2 times in epoch 0"):
        read_audit(log)


def test_a_missing_step_is_noticed(log: Path) -> None:
    for rank in (0, 1):
        rewrite(log, rank, 7, None)
    with pytest.raises(DataError, match="step 7 is missing"):
        read_audit(log)


def test_a_line_cut_by_a_kill_is_the_end_of_a_log(log: Path) -> None:
    """The other process has logged the step; it is not a whole one."""
    path = log / "0001-rank-00001.jsonl"
    path.write_text(path.read_text()[:-20])
    assert len(read_audit(log)) == 88


def test_a_damaged_line_is_noticed(log: Path) -> None:
    path = log / "0001-rank-00001.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = lines[4][:-5]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 5 is damaged"):
        read_audit(log)


def test_processes_of_one_row_that_disagree_are_noticed(
    corpora: list[Corpus], tmp_path: Path
) -> None:
    setting = Setting(corpora, Order("concat", 16, GlobalShuffle(), None, seed=0))
    attempt(setting, Layout(1, 2, 4, 4, 0, 1), tmp_path, (0, 0), 3, NeverKills())
    rows = rows_of(tmp_path, 1, 2)
    rewrite(tmp_path, 1, 2, [[rows[0][0], 0, 0, rows[0][3] ^ 1], *rows[1:]])
    with pytest.raises(DataError, match="different"):
        read_audit(tmp_path)


def test_runs_are_compared_where_they_overlap() -> None:
    def run(start: int, end: int) -> NDArray[np.int64]:
        return np.array([[n, 0, 0, 7 * n] for n in range(start, end)])

    assert compare(run(0, 10), run(4, 20)) == (6, -1)
    changed = run(4, 20)
    changed[2, 3] += 1
    assert compare(run(0, 10), changed) == (6, 6)
    assert compare(run(0, 4), run(4, 8)) == (0, -1)

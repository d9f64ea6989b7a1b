"""Checkpoints: whole or not there, verified, loaded bit for bit by any layout; damage is named."""

import json
import random
import resource
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from moebius.errors import CheckpointError
from moebius.model.context import StepContext
from moebius.model.ledger import Ledger
from moebius.model.parameters import ParameterSpec
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.parallel.part import Box
from moebius.parallel.world import rank, world_size
from moebius.trainer.checkpoint.commit import INDEX_NAME, RECORD_NAME, CommitRecord, FileEntry
from moebius.trainer.checkpoint.files import BLOCK, DTYPES
from moebius.trainer.checkpoint.loader import fill, newest_sound, open_checkpoint, verify
from moebius.trainer.checkpoint.plan import (
    KINDS,
    Entry,
    Listing,
    Stored,
    check_index,
    plan,
    read_index,
    reads,
    total_bytes,
    write_index,
)
from moebius.trainer.checkpoint.retention import outdated
from moebius.trainer.checkpoint.storage import LocalStorage
from moebius.trainer.checkpoint.tensors import model_parts, model_shapes, optimizer_shapes
from moebius.trainer.checkpoint.writer import Writer
from moebius.trainer.optim import OptimConfig, build_optimizer
from tests.model.helpers import build, random_batch
from tests.parity.forks import run_forked
from tests.trainer.saves import (
    assert_holds,
    changed,
    contents,
    loaded,
    local,
    parts_of,
    place_of,
    random_boxes,
    random_shares,
    record,
    same_bytes,
    save,
    save_shares,
    saver_of,
    some_tensors,
)


def check_all(storage: LocalStorage, step: int) -> None:
    """Raises CheckpointError where any file of a checkpoint is damaged."""
    found = open_checkpoint(storage, step)
    verify(found, sorted(found.record.files))


# What is written


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """Bit for bit: all types, NaNs, scalars, nothing at all, and what does not lie in one piece."""
    storage, tensors = local(tmp_path), some_tensors()
    assert {t.dtype for t in tensors.values()} == set(DTYPES.values())
    assert not all(t.is_contiguous() for t in tensors.values())
    save(storage, 3, tensors)
    assert storage.steps() == [3]
    assert sorted(contents(storage.root)) == [
        f"step-00000003/{name}"
        for name in (
            RECORD_NAME,
            INDEX_NAME,
            "model-00000.safetensors",
            "optimizer-00000.safetensors",
        )
    ]
    check_all(storage, 3)
    assert_holds(storage, 3, tensors)
    found = open_checkpoint(storage, 3).record
    assert found.model_copy(update={"files": {}}) == record(3)


def test_files_of_one_process_are_plain_to_others(tmp_path: Path) -> None:
    """The library of the format reads them, under the names that the model has for them."""
    storage, tensors = local(tmp_path), some_tensors()
    save(storage, 1, tensors)
    folder = storage.root / "step-00000001"
    for kind in KINDS:
        file = folder / f"{kind}-00000.safetensors"
        expected = {n[len(kind) + 1 :]: t for n, t in tensors.items() if n.startswith(kind)}
        expected = {n: t for n, t in expected.items() if t.numel()}
        found = load_file(file)
        assert found.keys() == expected.keys()
        assert all(same_bytes(found[name], expected[name]) for name in found)


def test_files_of_several_processes_say_which_part_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, tensors = local(tmp_path), some_tensors()
    shares = random_shares(tensors, 3, random.Random(5))
    save_shares(storage, 1, shares, monkeypatch)
    seen = {name: torch.zeros(t.shape, dtype=torch.int64) for name, t in tensors.items()}
    for path in sorted((storage.root / "step-00000001").glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, text = key.partition("[")
                name = f"{path.name.partition('-')[0]}/{name}"
                pairs = [pair.split(":") for pair in text.rstrip("]").split(",") if pair]
                place = tuple(slice(int(a), int(b)) for a, b in pairs) or (...,)
                assert same_bytes(file.get_tensor(key), tensors[name][place])
                seen[name][place] += 1
    assert all((count == 1).all() for count in seen.values()), "once, whoever holds it too"


def test_any_partition_loads_what_any_other_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against slices of the whole: boxes of all dimensions, on other numbers of processes."""
    for seed in range(8):
        chance = random.Random(seed)
        storage, tensors = LocalStorage(tmp_path / str(seed)), some_tensors(seed)
        shares = random_shares(tensors, chance.choice([1, 2, 4]), chance)
        save_shares(storage, 1, shares, monkeypatch, chance.choice([None, 0, 100]))
        checkpoint = open_checkpoint(storage, 1)
        blanks = changed(tensors)
        for parts in random_shares(blanks, chance.choice([1, 3, 5]), chance):
            fill(checkpoint, parts)
            for name, part in parts.items():
                for chunk in part.chunks:
                    assert same_bytes(chunk.tensor, tensors[name][place_of(chunk.box)]), name


@pytest.mark.parametrize("budget", [0, None])
def test_views_of_one_element_are_saved(tmp_path: Path, budget: int | None) -> None:
    """Their strides may be anything."""
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"model/a": whole.T[1:2, 1:2], "model/b": whole[:, 2][1:2], "model/c": whole[0, 3]}
    save(local(tmp_path), 1, tensors, host_gigabytes=budget)
    assert_holds(local(tmp_path), 1, tensors)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    storage = local(tmp_path)
    save(storage, 3, some_tensors())
    for name, content in contents(storage.root).items():
        assert content[:2] not in (b"\x80\x04", b"\x80\x02", b"PK"), name
        json.loads(content if name.endswith(".json") else content[8:].partition(b"}}")[0] + b"}}")


# Who writes what


def whole_listing(name: str, shape: tuple[int, ...], *boxes: Box, dtype: str = "F32") -> Listing:
    return Listing(name, shape, dtype, boxes or (Box((0,) * len(shape), shape),))


def test_what_all_hold_is_written_once_and_in_equal_shares() -> None:
    chance = random.Random(0)
    own = [
        whole_listing(f"{kind}/{i}", (chance.randrange(1, 40), 8), dtype=dtype)
        for i in range(60)
        for kind, dtype in (("model", "BF16"), ("optimizer", "F32"))
    ]
    index = plan([own] * 4)
    assert index.keys() == {item.name for item in own}
    written = dict.fromkeys(range(4), 0)
    largest = 0
    for name, entry in index.items():
        (stored,) = entry.stored
        assert stored.box.sizes == entry.shape
        kind, _, writer = stored.file.removesuffix(".safetensors").partition("-")
        assert kind == name.partition("/")[0]
        size = stored.box.numel * DTYPES[entry.dtype].itemsize
        written[int(writer)] += size
        largest = max(largest, size)
    assert sum(written.values()) == total_bytes(index)
    assert max(written.values()) - min(written.values()) <= largest


def test_what_one_holds_it_writes_and_others_make_up_for_it() -> None:
    mine = Box((0, 0), (4, 8)), Box((4, 0), (4, 8))
    listings = [[whole_listing("model/a", (8, 8), box)] for box in mine]
    shared = [whole_listing(f"model/b{i}", (2, 8)) for i in range(4)]
    listings = [own + shared for own in listings] + [shared] * 2
    index = plan(listings)
    assert [(s.file, s.box) for s in index["model/a"].stored] == [
        ("model-00000.safetensors", mine[0]),
        ("model-00001.safetensors", mine[1]),
    ]
    writers = sorted(index[item.name].stored[0].file for item in shared)
    assert writers == ["model-00002.safetensors"] * 2 + ["model-00003.safetensors"] * 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (whole_listing("model/a", (4, 3)), "not alike on all processes"),
        (whole_listing("model/a", (4, 2), dtype="BF16"), "not alike on all processes"),
        (whole_listing("model/a", (4, 2), Box((1, 0), (1, 2))), "is not the sum of"),
        (whole_listing("model/a", (4, 2), Box((1, 0), (3, 2))), "is not the sum of"),
    ],
)
def test_a_layout_that_tells_something_wrong_is_no_checkpoint(
    second: Listing, message: str
) -> None:
    first = whole_listing("model/a", (4, 2), Box((0, 0), (2, 2)))
    with pytest.raises(RuntimeError, match=message):
        plan([[first], [second]])


def test_an_index_survives_as_json() -> None:
    chance = random.Random(1)
    index = {}
    for number in range(50):
        shape = tuple(chance.randrange(1, 9) for _ in range(chance.randrange(4)))
        boxes = random_boxes(shape, chance, 6)
        stored = tuple(Stored(f"model-{chance.randrange(9):05}.safetensors", b) for b in boxes)
        index[f"model/layers.{number}.ö"] = Entry(shape, chance.choice(list(DTYPES)), stored)
    index["model/none"] = Entry((0, 3), "F32", ())
    text = write_index(index)
    assert read_index(text.encode()) == index
    for end in range(0, len(text) - 1, 211):
        with pytest.raises(ValueError):  # noqa: PT011
            read_index(text[:end].encode())


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "7",
        "null",
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"shape": 1, "dtype": "F32", "parts": []}}',
        '{"a": {"shape": [1], "dtype": "F32", "parts": [1]}}',
        '{"a": {"shape": [1], "dtype": "F32", "parts": [["f", [0]]]}}',
        '{"a": {"shape": [1], "dtype": "F32", "parts": [["f", 0, 1]]}}',
    ],
)
def test_another_json_is_no_index(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        read_index(text.encode())


def test_elements_that_no_file_has_are_counted() -> None:
    index = {"model/a": Entry((4, 4), "F32", (Stored("f", Box((0, 0), (4, 3))),))}
    with pytest.raises(CheckpointError, match="4 elements of model/a are in no file"):
        list(reads(index, parts_of({"model/a": torch.zeros(4, 4)})))


# Copies in the host's memory


class Held:
    """Keeps a writer from what is staged until the test lets go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go = threading.Event()
        original = Writer._staged

        def staged(writer: Writer, copy: Tensor) -> Tensor:
            found = original(writer, copy)
            assert self.let_go.wait(30)
            return found

        monkeypatch.setattr(Writer, "_staged", staged)


@pytest.mark.parametrize("thirds", [None, 0, 1, 2, 3])
def test_only_what_the_budget_allows_is_copied_and_later_changes_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thirds: int | None
) -> None:
    held = Held(monkeypatch)
    tensors = {
        f"{kind}/{i}": torch.randn(2500) for kind in ("model", "optimizer") for i in range(3)
    }
    total = 6 * 10_000
    storage = local(tmp_path)
    saver = saver_of(
        storage,
        host_gigabytes=None if thirds is None else (total * thirds / 3 + 100 + 2 * BLOCK) / 1e9,
    )
    addresses = []
    for step in (1, 2):
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        held.let_go.clear()
        saver.begin(record(step), parts_of(tensors))
        buffers = saver.staging.buffers.values()
        assert (
            sum(buffer.nbytes for buffer in buffers)
            == total * (3 if thirds is None else thirds) // 3
        )
        addresses.append([buffer.data_ptr() for buffer in buffers])
        assert saver.pending
        assert saver.writing or thirds == 0
        for tensor in tensors.values():
            tensor.add_(1.0)
        held.let_go.set()
        saver.settle()
        assert not saver.pending
        assert not saver.writing
        assert_holds(storage, step, expected)
    assert addresses[0] == addresses[1], "the memory is used again"


def test_any_budget_saves_the_same(tmp_path: Path) -> None:
    tensors = some_tensors()
    total = sum(t.nbytes for t in tensors.values())
    files = []
    for budget in (None, 0, 1, 100, total // 3, total - 1, total):
        storage = LocalStorage(tmp_path / str(budget))
        save(storage, 1, tensors, host_gigabytes=None if budget is None else budget / 1e9)
        files.append({n: c for n, c in contents(storage.root).items() if n.endswith("tensors")})
    assert files == [files[0]] * len(files)


# Which are kept


def test_which_checkpoints_go() -> None:
    """Against the rule, said plainly."""
    chance = random.Random(0)
    for _ in range(500):
        steps = chance.sample(range(40), chance.randrange(12))
        losses = {
            s: chance.choice([1.0, 2.0, chance.random()])
            for s in range(40)
            if chance.random() < 0.5
        }
        last, best = chance.randrange(1, 5), chance.randrange(4)
        every = chance.choice([None, 1, 3, 10])
        gone = outdated(steps, losses, last, every, best)
        assert gone == sorted(gone)
        assert set(gone) <= set(steps)
        if steps:
            assert max(steps) not in gone
        known = [s for s in steps if s in losses]
        for step in steps:
            newer = sum(other > step for other in steps)
            better = sum((losses[o], o) < (losses[step], step) for o in known if step in losses)
            stays = (
                newer < last
                or (every is not None and step % every == 0)
                or (step in losses and better < best)
            )
            assert stays != (step in gone)


def test_the_newest_some_between_and_the_best_are_kept(tmp_path: Path) -> None:
    storage = local(tmp_path)
    saver = saver_of(storage, keep=2, keep_every=4, keep_best=1)
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: None, 7: 4.0, 8: 5.0, 9: 6.0}
    for step, loss in losses.items():
        saver.begin(record(step, loss), parts_of(some_tensors(step)))
        saver.settle()
    assert storage.steps() == [2, 4, 8, 9]
    for step in storage.steps():
        check_all(storage, step)
        assert_holds(storage, step, some_tensors(step))


def test_a_damaged_checkpoint_is_not_among_the_best(tmp_path: Path) -> None:
    storage = local(tmp_path)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        saver = saver_of(storage, keep=9)
        saver.begin(record(step, loss), parts_of(some_tensors()))
        saver.settle()
    (storage.root / "step-00000001" / RECORD_NAME).write_text("{}")
    assert saver_of(storage, keep=1, keep_best=1).retain() == [1]
    assert storage.steps() == [2, 3]


# Damage


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    """Checkpoints of two steps, each of two processes."""
    storage = local(tmp_path)
    for step in (10, 20):
        tensors = some_tensors(step)
        save_shares(storage, step, random_shares(tensors, 2, random.Random(step)), monkeypatch)
    return storage


FILES = [
    RECORD_NAME,
    INDEX_NAME,
    *(f"{kind}-0000{rank}.safetensors" for kind in KINDS for rank in (0, 1)),
]


def damages(content: bytes, other: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Ways to damage a file."""
    chance = random.Random(len(content))
    for number in range(40):
        at = number * (len(content) - 1) // 39
        flipped = bytearray(content)
        flipped[at] ^= 1 << chance.randrange(8)
        yield f"flip at {at}", bytes(flipped)
    for end in (0, 1, len(content) // 2, len(content) - 1):
        yield f"only {end}", content[:end]
    for extra in (b"\0", b" ", b"\n", b"}"):
        yield f"and {extra!r}", content + extra
    yield "gone", None
    yield "another step's", other


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_and_the_older_one_is_taken(
    two: LocalStorage, name: str
) -> None:
    path = two.root / "step-00000020" / name
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(FILES)
    content = path.read_bytes()
    other = (two.root / "step-00000010" / name).read_bytes()
    assert content != other
    for what, damage in damages(content, other):
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        with pytest.raises(CheckpointError, match="step-00000020") as error:
            check_all(two, 20)
        assert len(str(error.value).splitlines()) == 1
        found, refused = newest_sound(two, two.steps())
        assert found is not None, what
        assert found.record.step == 10, what
        ((step, reason),) = refused
        assert step == 20
        assert name in reason, what
        path.write_bytes(content)
    found, refused = newest_sound(two, two.steps())
    assert found is not None
    assert (found.record.step, refused) == (20, [])


def test_folders_that_were_renamed_are_no_checkpoints(two: LocalStorage) -> None:
    names = [two.root / f"step-000000{number}" for number in (10, 20)]
    names[0].rename(two.root / "aside")
    names[1].rename(names[0])
    (two.root / "aside").rename(names[1])
    for step, other in ((10, 20), (20, 10)):
        with pytest.raises(CheckpointError, match=rf"step-000000{step}': .* is of step {other}"):
            check_all(two, step)
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints in '.*' is sound; .*00020'"):
        newest_sound(two, two.steps())


def test_where_all_are_damaged_it_is_an_error_and_where_there_are_none_it_is_not(
    two: LocalStorage, tmp_path: Path
) -> None:
    for step in (10, 20):
        (two.root / f"step-000000{step}" / "model-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of 2 .* model-00001\.safetensors is missing"):
        newest_sound(two, two.steps())
    nothing = LocalStorage(tmp_path / "none")
    assert nothing.steps() == []
    assert newest_sound(nothing, []) == (None, [])


@pytest.mark.parametrize("data", [b"", b"{", b'{"format": 2}', b"\xff", b"[" * 100_000, b"null"])
def test_a_damaged_record_is_no_checkpoint(two: LocalStorage, data: bytes) -> None:
    (two.root / "step-00000020" / RECORD_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step-00000020': no valid commit\.json: ") as error:
        open_checkpoint(two, 20)
    assert len(str(error.value).splitlines()) == 1


def test_an_index_may_name_only_what_was_committed(tmp_path: Path) -> None:
    storage = local(tmp_path)
    text = write_index({"model/a": Entry((), "F32", (Stored("elsewhere", Box((), ())),))})
    for files, missing in (
        ({INDEX_NAME: FileEntry.of(text.encode())}, "elsewhere"),
        ({}, INDEX_NAME),
    ):
        storage.begin(1)
        sealed = record(1).model_copy(update={"files": files})
        storage.commit(1, {INDEX_NAME: text, RECORD_NAME: sealed.text()})
        with pytest.raises(CheckpointError, match=f"{missing} was not committed"):
            open_checkpoint(storage, 1)
        storage.remove(1)


def test_damage_after_the_verification_is_one_line(tmp_path: Path) -> None:
    storage, tensors = local(tmp_path), some_tensors()
    save(storage, 1, tensors)
    checkpoint = open_checkpoint(storage, 1)
    path = storage.root / "step-00000001" / "model-00000.safetensors"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-1]), path.unlink):
        damage()
        with pytest.raises(CheckpointError, match=r"model-00000\.safetensors: ") as error:
            loaded(checkpoint, tensors)
        assert len(str(error.value).splitlines()) == 1


# Failures


def test_an_unfinished_save_is_not_found_and_does_not_disturb(tmp_path: Path) -> None:
    storage = local(tmp_path)
    save(storage, 3, some_tensors())
    unfinished = storage.root / "step-00000004.tmp"
    unfinished.mkdir()
    (unfinished / "model-00000.safetensors").write_bytes(b"half")
    assert storage.steps() == [3]
    save(storage, 4, some_tensors(1))
    assert not unfinished.exists()
    assert storage.steps() == [3, 4]
    assert_holds(storage, 4, some_tensors(1))


def test_a_save_of_a_step_that_is_there_changes_nothing(tmp_path: Path) -> None:
    storage = local(tmp_path)
    save(storage, 3, some_tensors())
    before = contents(storage.root)
    saver = saver_of(storage)
    saver.begin(record(3), parts_of(some_tensors(1)))
    assert not saver.pending
    saver.settle()
    assert contents(storage.root) == before


def test_other_names_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    """A copy made by hand is neither the newest checkpoint nor old enough to be deleted."""
    storage = local(tmp_path)
    save(storage, 3, some_tensors())
    backup = storage.root / "step-00000009-backup"
    shutil.copytree(storage.root / "step-00000003", backup)
    assert storage.steps() == [3]
    for step in (4, 5, 6):
        save(storage, step, some_tensors())
    assert storage.steps() == [5, 6]
    assert storage.remove_remains() == []
    assert backup.is_dir()


def test_an_abandoned_save_is_no_checkpoint(tmp_path: Path) -> None:
    storage = local(tmp_path)
    save(storage, 1, some_tensors())
    go_on = threading.Event()
    saver = saver_of(storage)
    saver.phase = lambda phase: None if phase != "write" else go_on.wait(30) and None
    saver.begin(record(2), parts_of(some_tensors()))
    assert saver.writing
    threading.Timer(0.2, go_on.set).start()
    saver.abandon()
    assert not saver.pending
    assert not saver.writing
    saver.settle()
    assert storage.steps() == [1]
    saver.abandon()
    saver.begin(record(3), parts_of(some_tensors(3)))
    saver.settle()
    assert storage.steps() == [1, 3]
    assert_holds(storage, 3, some_tensors(3))


def limited(folder: str) -> str:
    """Save in a process that may not write large files."""
    storage = LocalStorage(Path(folder))
    save(storage, 1, {"model/a": torch.zeros(8)})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        save(storage, 2, {"model/a": torch.zeros(10_000)})
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_failed_write_is_named_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own."""
    (message,) = run_forked(1, limited, str(tmp_path))
    assert message.startswith(f"checkpoint: cannot write '{tmp_path}/step-00000002.tmp/model-00000")
    assert len(message.splitlines()) == 1
    storage = LocalStorage(tmp_path)
    assert storage.steps() == [1]
    check_all(storage, 1)


class Misled(LocalStorage):
    """One whose files of rank 1 can not be written."""

    def scratch(self, step: int) -> Path:
        if rank() == 1 and step == 2:
            return self.root / "file" / "below"
        return super().scratch(step)


def save_misled(folder: str) -> tuple[str, list[int], bool]:
    storage = Misled(Path(folder))
    saver = saver_of(storage)
    tensors = some_tensors()
    saver.begin(record(1), parts_of(tensors))
    saver.settle()
    if rank() == 0:
        (storage.root / "file").write_text("no folder")
    saver.begin(record(2), parts_of(tensors))
    message = ""
    try:
        saver.settle()
    except CheckpointError as error:
        message = str(error)
    found, refused = newest_sound(storage, storage.steps())
    assert found is not None
    assert not refused
    steps = storage.steps()
    saver.begin(record(3), parts_of(tensors))  # the saver goes on
    saver.settle()
    return message, steps, saver.pending


def test_where_one_process_cannot_write_all_raise_the_same(tmp_path: Path) -> None:
    results = run_forked(2, save_misled, str(tmp_path))
    assert results[0] == results[1]
    message, steps, pending = results[0]
    assert message.startswith(f"checkpoint: cannot write '{tmp_path}/file/below/")
    assert "Not a directory" in message
    assert (steps, pending) == ([1], False)
    storage = LocalStorage(tmp_path)
    assert storage.steps() == [1, 3]
    check_all(storage, 3)


def shares_here(seed: int) -> dict[str, Any]:
    """This process's random share of the tensors, the same whenever it is asked for."""
    return random_shares(some_tensors(9), world_size(), random.Random(seed))[rank()]


def save_here(folder: str, seed: int) -> None:
    saver = saver_of(LocalStorage(Path(folder)))
    saver.begin(record(1), shares_here(seed))
    saver.settle()


def load_here(folder: str, seed: int, damaged: str) -> tuple[int | None, str]:
    storage = LocalStorage(Path(folder))
    if damaged:
        with pytest.raises(CheckpointError) as error:
            newest_sound(storage, storage.steps())
        return None, str(error.value)
    found, _ = newest_sound(storage, storage.steps())
    assert found is not None
    parts = shares_here(seed)
    expected = {n: [c.tensor.clone() for c in p.chunks] for n, p in parts.items()}
    for part in parts.values():
        for chunk in part.chunks:
            chunk.tensor.zero_()
    fill(found, parts)
    for name, part in parts.items():
        for chunk, tensor in zip(part.chunks, expected[name], strict=True):
            assert same_bytes(chunk.tensor, tensor), name
    return found.record.step, ""


def test_real_processes_save_what_fewer_or_more_load(tmp_path: Path) -> None:
    """And each verifies other files: all hear of the damage that one has found."""
    run_forked(3, save_here, str(tmp_path), 1)
    check_all(LocalStorage(tmp_path), 1)
    for size in (1, 2, 4):
        assert run_forked(size, load_here, str(tmp_path), size + 7, "") == [(1, "")] * size
    path = tmp_path / "step-00000001" / "optimizer-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    ((_, first), (_, second)) = run_forked(2, load_here, str(tmp_path), 3, "damaged")
    assert first == second
    assert "optimizer-00002.safetensors has" in first


# Models


def adamw(parameters: Iterable[tuple[nn.Parameter, ParameterSpec]]) -> torch.optim.Optimizer:
    return build_optimizer(parameters, OptimConfig())


def test_model_and_optimizer_state_survive(tmp_path: Path) -> None:
    """Bit for bit, into a model that started from other values."""
    layout, other = (
        Layout(build(seed=seed).decoder, ParallelConfig(), adamw, 8) for seed in (0, 1)
    )
    layout.accumulate_gradients([random_batch(2, 8)], 16, StepContext("topk", Ledger()))
    layout.engine.step(1.0)
    storage = local(tmp_path)
    saver = saver_of(storage)
    saver.begin(record(1), layout.parts())
    saver.settle()
    checkpoint = open_checkpoint(storage, 1)
    decoder = layout.decoder
    check_index(checkpoint.index, model_shapes(decoder) | optimizer_shapes(decoder), KINDS)
    fill(checkpoint, other.parts())
    other.engine.take_over(other.parts())
    expected, found = layout.parts(), other.parts()
    assert found.keys() == expected.keys()
    for name, part in found.items():
        for own, theirs in zip(part.chunks, expected[name].chunks, strict=True):
            assert same_bytes(own.tensor, theirs.tensor), name
    for own_layout in (layout, other):
        own_layout.accumulate_gradients([random_batch(2, 8)], 16, StepContext("topk", Ledger()))
        own_layout.engine.step(1.0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            decoder.state_dict().values(), other.decoder.state_dict().values(), strict=True
        )
    ), "it goes on alike"
    lacking = {n: e for n, e in checkpoint.index.items() if n != "optimizer/norm.weight/exp_avg"}
    with pytest.raises(CheckpointError, match=r"norm\.weight/exp_avg is not in the checkpoint"):
        check_index(lacking, optimizer_shapes(decoder), ("optimizer",))


def index_of(model: nn.Module, tmp_path: Path) -> dict[str, Entry]:
    storage = LocalStorage(tmp_path / str(id(model)))
    saver = saver_of(storage)
    saver.begin(record(1), model_parts(model))
    saver.settle()
    return open_checkpoint(storage, 1).index


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    small, large = build(depth={"num_layers": 2}).decoder, build(depth={"num_layers": 3}).decoder
    of_small = index_of(small, tmp_path)

    def check(index: dict[str, Entry], model: nn.Module) -> None:
        check_index(index, model_shapes(model), ("model",))

    check(of_small, small)
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is not in the checkpoint"):
        check(of_small, large)
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is not in the model"):
        check(index_of(large, tmp_path), small)
    wide = build(hidden_size=64, depth={"num_layers": 2}).decoder
    with pytest.raises(CheckpointError, match=r"the model's is"):
        check(of_small, wide)
    small.register_buffer("bias", torch.ones(2))
    with pytest.raises(CheckpointError, match="bias is not in the checkpoint"):
        check(of_small, small)


def test_a_record_that_was_edited_is_not_read() -> None:
    text = record(3, 2.5).text()
    assert CommitRecord.read(text.encode()) == record(3, 2.5)
    for before, after in (
        ('"step": 3', '"step": 4'),
        ('"step": 3', '"step":  3'),
        ('"evaluation": 2.5', '"evaluation": 2.50'),
        ('"format": 2', '"format": 1'),
    ):
        assert before in text
        with pytest.raises(ValueError, match=r"checksum|as it was written"):
            CommitRecord.read(text.replace(before, after).encode())

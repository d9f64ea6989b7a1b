"""Where checkpoints lie: folders, full disks, and a real object store."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moebius.errors import CheckpointError
from moebius.trainer.checkpoint.commit import INDEX_NAME, RECORD_NAME
from moebius.trainer.checkpoint.loader import newest_sound, open_checkpoint, verify
from moebius.trainer.checkpoint.storage import (
    LocalStorage,
    RemoteStorage,
    Storage,
    UnreachableError,
    folder_name,
    open_storage,
)
from tests.parity.forks import run_forked
from tests.trainer.saves import (
    assert_holds,
    contents,
    local,
    parts_of,
    record,
    save,
    saver_of,
    some_tensors,
)

BUCKET = "runs"
KINDS = ("local", "file", "s3")


@pytest.fixture(scope="module")
def store() -> Iterator[None]:
    """An object store that speaks S3, on a port of this machine."""
    from moto.server import ThreadedMotoServer  # the others do without

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        storage = open_storage(f"s3://{BUCKET}")
        assert isinstance(storage, RemoteStorage)
        storage.fs.mkdir(BUCKET)
        yield
    server.stop()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What killed processes have not uploaded yet goes with the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(params=KINDS)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of checkpoints; nothing is there yet."""
    if request.param == "local":
        return str(tmp_path / "checkpoints")
    if request.param == "file":
        return f"file://{tmp_path}/checkpoints"
    request.getfixturevalue("store")
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def storage(location: str) -> Storage:
    found = open_storage(location)
    assert found.location == location
    assert isinstance(found, RemoteStorage if "://" in location else LocalStorage)
    return found


def put(storage: Storage, step: int, file: str, content: bytes | None) -> None:
    """Change a file behind the storage's back, or delete it."""
    if isinstance(storage, RemoteStorage):
        path = f"{storage.root}/{folder_name(step)}/{file}"
        if content is None:
            storage.fs.rm_file(path)
        else:
            storage.fs.pipe_file(path, content)
        return
    local_path = Path(storage.location) / folder_name(step) / file
    if content is None:
        local_path.unlink()
    else:
        local_path.write_bytes(content)


def check_all(storage: Storage, step: int) -> None:
    found = open_checkpoint(storage, step)
    verify(found, sorted(found.record.files))


def assert_one_line(error: BaseException, *parts: str) -> None:
    assert len(str(error).splitlines()) == 1
    for part in parts:
        assert part in str(error)


# What all storages do


def test_what_is_saved_is_listed_and_loaded(storage: Storage) -> None:
    assert storage.steps() == []
    assert newest_sound(storage, storage.steps()) == (None, [])
    for step in (4, 100_000_000):
        save(storage, step, some_tensors(step))
    assert storage.steps() == [4, 100_000_000]
    assert storage.name(4) == f"{storage.location}/step-00000004"
    for step in storage.steps():
        check_all(storage, step)
        assert_holds(storage, step, some_tensors(step))
    assert storage.remains() == []
    found, refused = newest_sound(storage, storage.steps())
    assert found is not None
    assert (found.record.step, refused) == (100_000_000, [])
    written = storage.written(4)
    assert written is not None
    assert abs(written - time.time()) < 60
    assert storage.written(5) is None


def saved_elsewhere(location: str, step: int) -> None:
    save(open_storage(location), step, some_tensors(step), keep=1)


def test_what_another_process_does_is_seen(storage: Storage, location: str) -> None:
    """Names that a filesystem has remembered are asked for anew."""
    save(storage, 1, some_tensors(1))
    assert storage.steps() == [1]
    run_forked(1, saved_elsewhere, location, 2)
    assert storage.steps() == [2]
    assert_holds(storage, 2, some_tensors(2))


@pytest.mark.parametrize("file", [RECORD_NAME, "model-00000.safetensors"])
def test_damage_is_passed_over(storage: Storage, file: str) -> None:
    for step in (1, 2):
        save(storage, step, some_tensors(step))
    with storage.open(2, file) as path:
        content = Path(path).read_bytes()
    for damage in (content[:-9] + b"#" + content[-8:], content[:-1], None):
        put(storage, 2, file, damage)
        if damage is None and file == RECORD_NAME:
            assert storage.steps() == ([1] if isinstance(storage, RemoteStorage) else [1, 2])
            continue
        found, refused = newest_sound(storage, storage.steps())
        assert found is not None
        assert found.record.step == 1
        ((step, reason),) = refused
        assert step == 2
        assert file in reason
        assert len(reason.splitlines()) == 1
    put(storage, 2, file, content)
    check_all(storage, 2)


def test_what_is_set_aside_is_no_checkpoint_and_its_step_is_free(storage: Storage) -> None:
    for step in (1, 2):
        save(storage, step, some_tensors(step))
    storage.set_aside(2)
    assert storage.steps() == [1]
    assert len(storage.remains()) == 1
    save(storage, 2, some_tensors(7))
    assert storage.steps() == [1, 2]
    assert_holds(storage, 2, some_tensors(7))
    storage.set_aside(2)
    assert storage.steps() == [1]
    remains = storage.remains()
    assert storage.remove_remains() == remains != []
    assert storage.remains() == storage.remove_remains() == []
    assert storage.steps() == [1]
    check_all(storage, 1)


def test_what_is_removed_leaves_nothing(storage: Storage) -> None:
    for step in (1, 2):
        save(storage, step, some_tensors(step))
    storage.remove(2)
    assert storage.steps() == [1]
    if isinstance(storage, RemoteStorage):
        assert not storage.fs.exists(f"{storage.root}/step-00000002")
    with pytest.raises(OSError, match=RECORD_NAME):
        storage.text(2, RECORD_NAME)
    check_all(storage, 1)


def test_where_nothing_is_nothing_remains(storage: Storage) -> None:
    assert storage.remains() == []
    assert storage.remove_remains() == []


def killed_save(location: str, step: int, phase: str, count: int) -> None:
    """Save, and be killed when something has begun for the `count`th time."""
    saver = saver_of(open_storage(location))
    times = 0

    def told(found: str) -> None:
        nonlocal times
        times += found == phase
        if found == phase and times == count:
            os.kill(os.getpid(), signal.SIGKILL)

    saver.phase = told
    saver.begin(record(step), parts_of(some_tensors(step)))
    saver.settle()


@pytest.mark.parametrize(("phase", "count"), [("commit", 1), ("retain", 1)])
def test_a_kill_leaves_a_whole_checkpoint_or_none(
    storage: Storage, location: str, phase: str, count: int
) -> None:
    save(storage, 1, some_tensors(1))
    with pytest.raises(RuntimeError, match="rank 0 died"):
        run_forked(1, killed_save, location, 2, phase, count)
    there = [1, 2] if phase == "retain" else [1]
    assert storage.steps() == there
    assert bool(storage.remains()) == (phase != "retain")
    for step in there:
        check_all(storage, step)
        assert_holds(storage, step, some_tensors(step))
    save(storage, 2, some_tensors(2))
    assert_holds(storage, 2, some_tensors(2))
    assert storage.steps() == [1, 2]
    if phase != "retain":
        assert storage.remains() == [], "an attempt at the same step takes its place"


def save_own(location: str) -> list[int]:
    """A tensor of each process and one of all."""
    storage = open_storage(location)
    save(storage, 1, own_tensors(os.environ["RANK"]))
    return storage.steps()


def own_tensors(rank: str) -> dict[str, torch.Tensor]:
    values = torch.full((5,), float(rank))
    return {f"model/{rank}": values, f"optimizer/{rank}": values * 2, "model/all": torch.ones(3)}


def test_processes_save_together(storage: Storage, location: str) -> None:
    assert run_forked(2, save_own, location) == [[1], [1]]
    check_all(storage, 1)
    assert_holds(storage, 1, own_tensors("0") | own_tensors("1"))
    files = open_checkpoint(storage, 1).record.files
    assert {
        f"{kind}-0000{rank}.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)
    } < set(files)


# Folders


def test_only_a_url_is_remote(tmp_path: Path) -> None:
    assert isinstance(open_storage(str(tmp_path)), LocalStorage)
    assert isinstance(open_storage("relative/folder"), LocalStorage)
    assert isinstance(open_storage("memory://run"), RemoteStorage)


def test_room_is_that_of_the_disk_even_before_there_is_a_folder(tmp_path: Path) -> None:
    free = LocalStorage(tmp_path / "a" / "b").free()
    assert free is not None
    assert abs(free - shutil.disk_usage(tmp_path).free) < 1 << 32


@pytest.mark.parametrize("place", ["file", "proc"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "below" if place == "file" else Path("/proc/checkpoints")
    storage = LocalStorage(root)
    assert storage.steps() == []
    with pytest.raises(CheckpointError, match="checkpoint: cannot write") as error:
        saver_of(storage).begin(record(1), parts_of(some_tensors()))
    assert_one_line(error.value, str(root))


def test_what_cannot_be_removed_is_one_line(tmp_path: Path) -> None:
    """Here the name is taken that it gets meanwhile; the new checkpoint is there already."""
    storage = local(tmp_path)
    for step in (1, 2):
        save(storage, step, some_tensors(step))
    saver = saver_of(storage, keep=2)
    saver.begin(record(3), parts_of(some_tensors(3)))
    (storage.root / "step-00000001.tmp" / "taken").mkdir(parents=True)
    warning = saver.settle()
    assert re.search(r"cannot write .*step-00000001': .*not empty", warning)
    assert storage.steps() == [1, 2, 3]
    for step in storage.steps():
        check_all(storage, step)


class Full(LocalStorage):
    """One of whose files lies on a device that is always full."""

    def begin(self, step: int) -> None:
        super().begin(step)
        (self.scratch(step) / "model-00000.safetensors").symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    storage = local(tmp_path)
    save(storage, 1, some_tensors(1))
    before = contents(storage.root)
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        save(Full(storage.root), 2, some_tensors(2))
    assert_one_line(error.value, "step-00000002.tmp/model-00000", "of before are untouched")
    assert storage.steps() == [1]
    assert contents(storage.root / "step-00000001") == {
        name.partition("/")[2]: content for name, content in before.items()
    }
    check_all(storage, 1)
    save(storage, 2, some_tensors(2))
    assert_holds(storage, 2, some_tensors(2))


SIZE = 1 << 20
LARGE = {"model/a": torch.arange(100_000.0)}
"""needs 0.4 MB"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[LocalStorage]:
    """A real disk of 1 MB with a checkpoint of 0.4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or shutil.which("mount") is None:
        pytest.skip("only Linux mounts a tmpfs")
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {result.stderr.strip()}")
    try:
        storage = LocalStorage(folder / "checkpoints")
        save(storage, 1, LARGE)
        yield storage
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_without_room_nothing_is_written(small_disk: LocalStorage) -> None:
    filler = small_disk.root.parent / "filler"
    filler.write_bytes(bytes(300_000))
    before = contents(small_disk.root)
    with pytest.raises(CheckpointError, match=r"400,000 bytes are needed in .*, \d+,\d+ are free"):
        save(small_disk, 2, LARGE)
    assert contents(small_disk.root) == before
    check_all(small_disk, 1)
    filler.unlink()
    save(small_disk, 2, LARGE)
    assert_holds(small_disk, 2, LARGE)


def test_a_disk_that_fills_up_meanwhile_loses_only_the_new_checkpoint(
    small_disk: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler = small_disk.root.parent / "filler"
    filler.write_bytes(bytes(300_000))
    with monkeypatch.context() as patch:
        patch.setattr(small_disk, "free", lambda: None)
        with pytest.raises(CheckpointError, match="No space left on device") as error:
            save(small_disk, 2, LARGE)
    assert_one_line(error.value, "step-00000002.tmp/model-00000")
    assert small_disk.steps() == [1]
    check_all(small_disk, 1)
    assert_holds(small_disk, 1, LARGE)
    filler.unlink()
    save(small_disk, 2, LARGE)
    assert small_disk.steps() == [1, 2]
    assert_holds(small_disk, 2, LARGE)


def test_what_is_left_of_a_killed_save_makes_room(small_disk: LocalStorage) -> None:
    unfinished = small_disk.root / "step-00000002.tmp"
    unfinished.mkdir()
    (unfinished / "model-00000.safetensors").write_bytes(bytes(400_000))
    free = small_disk.free()
    assert free is not None
    assert free < 400_000
    save(small_disk, 3, LARGE)
    assert small_disk.steps() == [1, 3]
    assert_holds(small_disk, 3, LARGE)


# Stores


def test_a_missing_package_or_unknown_protocol_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for url, reason in (("gs://bucket/run", "gcsfs"), ("nosuch://a", "nosuch")):
        with pytest.raises(
            CheckpointError, match=rf"checkpoint\.dir: '{url}': .*{reason}"
        ) as error:
            open_storage(url)
        assert_one_line(error.value)


@pytest.mark.usefixtures("store")
def test_a_missing_bucket_is_one_line_and_nothing_stays_on_the_local_disk() -> None:
    storage = RemoteStorage("s3://no-such-bucket/run")
    with pytest.raises(CheckpointError, match="s3://no-such-bucket/run") as error:
        save(storage, 1, some_tensors())
    assert_one_line(error.value)
    assert not [path for path in storage.local.rglob("*") if path.is_file()]
    assert storage.free() is None


@pytest.mark.usefixtures("store")
def test_files_stay_on_the_local_disk_only_until_they_are_uploaded(tmp_path: Path) -> None:
    storage = RemoteStorage(f"s3://{BUCKET}/{tmp_path.name}")
    seen = []
    saver = saver_of(storage)
    saver.phase = lambda phase: seen.append((phase, sorted(contents(storage.local))))
    saver.begin(record(1), parts_of(some_tensors()))
    saver.settle()
    assert [phase for phase, _ in seen] == ["stage", "write", "write", "commit", "retain"]
    assert all(files == [] for _, files in seen)
    assert not storage.local.exists()
    names = sorted(path.rpartition("/")[2] for path in storage.fs.find(storage.root))
    files = ["model-00000.safetensors", "optimizer-00000.safetensors"]
    assert names == [RECORD_NAME, INDEX_NAME, *files]


@pytest.mark.usefixtures("store")
def test_a_store_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    location = f"s3://{BUCKET}/{tmp_path.name}"
    save(open_storage(location), 1, some_tensors())
    S3FileSystem.clear_instance_cache()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        storage = open_storage(location)
        actions: list[Callable[[], object]] = [
            storage.steps,
            lambda: storage.begin(2),
            lambda: storage.commit(2, {RECORD_NAME: ""}),
            lambda: storage.set_aside(1),
            lambda: storage.remove(1),
            storage.remains,
            storage.remove_remains,
            lambda: open_checkpoint(storage, 1),
            lambda: newest_sound(storage, [1]),
            lambda: saver_of(storage).begin(record(2), parts_of(some_tensors())),
        ]
        for action in actions:
            with pytest.raises(CheckpointError, match=location) as error:
                action()
            assert_one_line(error.value)
        with pytest.raises(UnreachableError, match=location):
            storage.text(1, RECORD_NAME)
        with pytest.raises(UnreachableError, match=location):
            storage.digest(1, RECORD_NAME)
        assert storage.written(1) is None
    S3FileSystem.clear_instance_cache()
    check_all(open_storage(location), 1)

"""Files of a corpus at a URL: whole or not there, downloaded once, within a limit."""

import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from moebius.data.storage import CacheConfig, Storage, open_storage
from moebius.errors import DataError


class Shelf(LocalFileSystem):
    """A local folder that writes down each download. One takes a while where there is a file
    `slow` in the folder, and stops halfway, as long as nobody ends it, where there is a `stuck`.
    """

    protocol = "shelf"

    def get_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        source = Path(path1)
        with (source.parent / "downloads").open("a") as log:
            log.write(f"{source.name}\n")
        content = source.read_bytes()
        half = len(content) // 2
        with open(path2, "wb") as target:
            target.write(content[:half])
            target.flush()
            if (source.parent / "slow").exists():
                time.sleep(0.1)
            if (source.parent / "stuck").exists():
                (source.parent / "halfway").touch()
                time.sleep(60)
            target.write(content[half:])


class Broken(LocalFileSystem):
    """A local folder whose files fail by their names."""

    protocol = "broken"

    def get_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        name = Path(path1).name
        if name == "forbidden":
            raise PermissionError("Access Denied\nrequest 4711")
        if name == "unreachable":
            raise ConnectionError("\ncannot reach host 'shelf'\nTraceback")
        if name == "late":
            raise TimeoutError
        if name == "foreign":
            raise RuntimeError("Expired token\n")  # as of the libraries that derive from Exception
        if name == "full":
            Path("/dev/full").write_bytes(b"x" * 100_000)
        Path(path2).write_bytes(Path(path1).read_bytes()[:-1])


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """A fetch that waits for ever fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this takes for ever"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """The folder of a remote corpus, read by the protocols of this file."""
    for kind in (Shelf, Broken):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    folder = tmp_path / "remote"
    folder.mkdir()
    return folder


def put(folder: Path, name: str, size: int, seed: int = 0) -> bytes:
    """A file of random bytes."""
    content = random.Random(f"{name}/{seed}").randbytes(size)
    (folder / name).write_bytes(content)
    return content


def cache(tmp_path: Path, max_bytes: float = 1e9) -> CacheConfig:
    return CacheConfig(dir=str(tmp_path / "cache"), max_gigabytes=max_bytes / 1e9)


def downloads(folder: Path) -> list[str]:
    log = folder / "downloads"
    return log.read_text().split() if log.exists() else []


def in_cache(tmp_path: Path) -> list[Path]:
    """All files but the locks."""
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    return [path for path in files if path.suffix != ".lock" and path.name != "lock"]


def refusal(storage: Storage, name: str, *, fresh: bool = False) -> str:
    """The message with which a fetch fails; it is one line."""
    with pytest.raises(DataError) as caught:
        storage.fetch(name, fresh=fresh)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_files_of_a_local_folder_stay_where_they_are(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "corpus"), cache(tmp_path))
    assert not storage.is_remote
    assert storage.folder == tmp_path / "corpus"
    assert storage.fetch("manifest.json") == tmp_path / "corpus" / "manifest.json"
    assert storage.fetch("manifest.json", fresh=True) == tmp_path / "corpus" / "manifest.json"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_fetched_file_has_the_content_of_the_remote_one(
    tmp_path: Path, size: int, slash: str
) -> None:
    (tmp_path / "remote").mkdir()
    content = put(tmp_path / "remote", "train-00000.bin", size)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/storage-test/web/train-00000.bin", content)
    for url in ("memory://storage-test/web", f"file://{tmp_path}/remote"):
        storage = open_storage(url + slash, cache(tmp_path))
        assert storage.is_remote
        path = storage.fetch("train-00000.bin")
        assert path == storage.folder / "train-00000.bin"
        assert path.read_bytes() == content
        assert tmp_path / "cache" in path.parents


def test_a_zip_file_at_a_url_is_a_corpus_too(tmp_path: Path) -> None:
    (tmp_path / "remote" / "web").mkdir(parents=True)
    content = put(tmp_path / "remote" / "web", "manifest.json", 1000)
    archive = shutil.make_archive(str(tmp_path / "corpus"), "zip", tmp_path / "remote")
    storage = open_storage(f"zip://web::file://{archive}", cache(tmp_path))
    assert storage.fetch("manifest.json").read_bytes() == content


def test_every_url_has_a_folder_of_its_own_with_a_name_to_read(tmp_path: Path) -> None:
    urls = [f"s3://bucket/{part}" for part in ("web", "web-2", "we/b", "we-b", "x" * 300, "ä/数")]
    urls += ["gs://bucket/web", "sftp://user:secret@host/web"]
    folders = [open_storage(url, cache(tmp_path)).folder for url in urls]
    assert len({*folders}) == len(urls)
    for folder in folders:
        folder.mkdir(parents=True)  # the system takes the name
        assert folder.parent == tmp_path / "cache"
        assert "secret" not in folder.name
    assert folders[0].name.startswith("s3-bucket-web-")
    assert open_storage(f"{urls[0]}/", cache(tmp_path)).folder == folders[0]


def test_the_cache_lies_where_the_system_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_storage("s3://a/b", CacheConfig()).folder.parent == tmp_path / "xdg" / "moebius"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    expected = tmp_path / "home" / ".cache" / "moebius"
    assert open_storage("s3://a/b", CacheConfig()).folder.parent == expected


def test_a_present_file_needs_no_remote(tmp_path: Path, shelf: Path) -> None:
    contents = {name: put(shelf, name, 1000) for name in ("manifest.json", "train-00000.bin")}
    for name in contents:
        open_storage(f"shelf://{shelf}", cache(tmp_path)).fetch(name)
    shutil.rmtree(shelf)
    storage = open_storage(f"shelf://{shelf}", cache(tmp_path))
    assert {name: storage.fetch(name).read_bytes() for name in contents} == contents


def test_fresh_downloads_what_has_changed_and_nothing_else(tmp_path: Path, shelf: Path) -> None:
    storage = open_storage(f"shelf://{shelf}", cache(tmp_path))
    old = put(shelf, "manifest.json", 1000)
    for fresh in (True, True, False):
        assert storage.fetch("manifest.json", fresh=fresh).read_bytes() == old
    assert downloads(shelf) == ["manifest.json"]
    new = put(shelf, "manifest.json", 1000, seed=1)  # of the same size
    assert storage.fetch("manifest.json").read_bytes() == old
    for _ in range(2):
        assert storage.fetch("manifest.json", fresh=True).read_bytes() == new
    assert downloads(shelf) == ["manifest.json"] * 2


def test_fresh_downloads_always_where_nothing_tells_a_version(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an HTTP server that gives neither time nor ETag."""

    def info(self: Shelf, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": os.path.getsize(path), "type": "file"}

    monkeypatch.setattr(Shelf, "info", info)
    storage = open_storage(f"shelf://{shelf}", cache(tmp_path))
    for seed in range(3):
        content = put(shelf, "tokenizer.json", 1000, seed)
        assert storage.fetch("tokenizer.json", fresh=True).read_bytes() == content
        assert storage.fetch("tokenizer.json").read_bytes() == content
    assert downloads(shelf) == ["tokenizer.json"] * 3


def test_fresh_passes_over_what_a_filesystem_remembers(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those do that find a file in a listing of its folder."""
    remembered: dict[str, Any] = {}
    info = Shelf.info

    def remembering(self: Shelf, path: str, **kwargs: Any) -> dict[str, Any]:
        return dict(remembered.setdefault(path, info(self, path, **kwargs)))

    monkeypatch.setattr(Shelf, "info", remembering)
    monkeypatch.setattr(Shelf, "invalidate_cache", lambda *_: remembered.clear())
    storage = open_storage(f"shelf://{shelf}", cache(tmp_path))
    for seed in range(2):
        content = put(shelf, "manifest.json", 1000, seed)
        assert storage.fetch("manifest.json", fresh=True).read_bytes() == content


def test_fresh_does_not_serve_a_file_that_is_gone(tmp_path: Path, shelf: Path) -> None:
    storage = open_storage(f"file://{shelf}", cache(tmp_path))
    put(shelf, "manifest.json", 10)
    storage.fetch("manifest.json")
    (shelf / "manifest.json").unlink()
    assert "not found" in refusal(storage, "manifest.json", fresh=True)


def test_shards_used_longest_ago_make_room(tmp_path: Path, shelf: Path) -> None:
    """Against a list that is moved and popped, with two corpora in one cache."""
    limit, draw = 1000, random.Random(0)
    contents, storages = {}, []
    for corpus in ("web", "code"):
        (shelf / corpus).mkdir()
        storages.append(open_storage(f"shelf://{shelf}/{corpus}", cache(tmp_path, limit)))
        for size in (100, 200, 300, 400, 1000):
            path = storages[-1].folder / f"{size}.bin"
            contents[path] = put(shelf / corpus, path.name, size, seed=len(storages))
            put(shelf / corpus, f"{size}.idx", 5000)

    unused_longest: list[Path] = []
    for _ in range(80):
        storage, size = draw.choice(storages), draw.choice((100, 200, 300, 400, 1000))
        path = storage.fetch(f"{size}.bin")
        if path in unused_longest:
            unused_longest.remove(path)
        while sum(len(contents[other]) for other in unused_longest) + size > limit:
            unused_longest.pop(0)
        unused_longest.append(path)
        assert {path for path in in_cache(tmp_path) if path.suffix == ".bin"} == {*unused_longest}
        assert all(path.read_bytes() == contents[path] for path in unused_longest)
        storage.fetch(f"{size}.idx")  # never counts, never goes
        time.sleep(0.011)  # files have the time of the system's tick
    assert sum(path.suffix == ".idx" for path in in_cache(tmp_path)) == 10
    assert len(downloads(shelf / "web")) > 10


def test_a_mapped_shard_stays_readable_when_it_leaves_the_cache(
    tmp_path: Path, shelf: Path
) -> None:
    contents = [put(shelf, f"{number}.bin", 100_000) for number in range(2)]
    storage = open_storage(f"file://{shelf}", cache(tmp_path, 150_000))
    path = storage.fetch("0.bin")
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    storage.fetch("1.bin")
    assert not path.exists()
    assert mapped.tobytes() == contents[0]


def test_files_that_were_not_downloaded_are_never_deleted(tmp_path: Path, shelf: Path) -> None:
    """The cache may be put into a folder of corpora."""
    (tmp_path / "cache" / "mine").mkdir(parents=True)
    mine = put(tmp_path / "cache" / "mine", "train-00000.bin", 5000)
    for number in range(3):
        put(shelf, f"{number}.bin", 600)
        open_storage(f"file://{shelf}", cache(tmp_path, 1000)).fetch(f"{number}.bin")
    assert (tmp_path / "cache" / "mine" / "train-00000.bin").read_bytes() == mine
    assert len(in_cache(tmp_path)) == 2


def test_a_shard_beyond_the_limit_is_refused(tmp_path: Path, shelf: Path) -> None:
    put(shelf, "small.bin", 900)
    put(shelf, "large.bin", 0)
    os.truncate(shelf / "large.bin", 250_001_000)
    storage = open_storage(f"file://{shelf}", cache(tmp_path, 1e8))
    kept = storage.fetch("small.bin")
    message = refusal(storage, "large.bin")
    assert "data.cache.max_gigabytes: 0.1," in message
    assert "250,001,000 bytes" in message
    assert message.endswith("set it to 0.3 or more")
    assert in_cache(tmp_path) == [kept]


def fetch_in_threads(location: str, config: CacheConfig, names: list[str], start: Barrier) -> None:
    """Each name in a thread of its own, all processes and threads at once."""
    fsspec.register_implementation(Shelf.protocol, Shelf, clobber=True)
    storage = open_storage(location, config)
    start.wait(timeout=30)
    with ThreadPoolExecutor(len(names)) as threads:
        for name, path in zip(names, threads.map(storage.fetch, names), strict=True):
            assert path.read_bytes() == Path(location.removeprefix("shelf://"), name).read_bytes()


def test_processes_and_threads_download_a_file_once(tmp_path: Path, shelf: Path) -> None:
    for name in ("0.bin", "manifest.json"):
        put(shelf, name, 100_000)
    (shelf / "slow").touch()
    names = ["0.bin"] * 6 + ["manifest.json"] * 2
    spawn = multiprocessing.get_context("spawn")
    arguments = (f"shelf://{shelf}", cache(tmp_path), names, spawn.Barrier(2))
    processes = [spawn.Process(target=fetch_in_threads, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(downloads(shelf)) == ["0.bin", "manifest.json"]
    assert sorted(path.name for path in in_cache(tmp_path)) == ["0.bin", "manifest.json"]


def test_who_waits_for_a_download_does_not_ask_the_remote(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    info = Shelf.info

    def watched(self: Shelf, path: str, **kwargs: Any) -> dict[str, Any]:
        asked.append(path)
        return dict(info(self, path, **kwargs))

    monkeypatch.setattr(Shelf, "info", watched)
    (shelf / "slow").touch()
    put(shelf, "0.bin", 1000)
    storage = open_storage(f"shelf://{shelf}", cache(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(storage.fetch, ["0.bin"] * 8))
    assert asked == [f"{shelf}/0.bin"]


def test_downloads_at_once_keep_to_the_limit_together(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight shards at once with room for three."""
    running: list[str] = []
    most = {"running": 0, "shards": 0}
    guard = threading.Lock()
    slow = Shelf.get_file

    def watched(self: Shelf, path1: str, path2: str, **kwargs: Any) -> None:
        with guard:
            running.append(path1)
            whole = [path for path in Path(path2).parent.glob("*.bin")]
            most["running"] = max(most["running"], len(running))
            most["shards"] = max(most["shards"], len(running) + len(whole))
        slow(self, path1, path2, **kwargs)
        with guard:
            running.remove(path1)

    monkeypatch.setattr(Shelf, "get_file", watched)
    (shelf / "slow").touch()
    names = [f"{number}.bin" for number in range(8)]
    for name in names:
        put(shelf, name, 1000)
    storage = open_storage(f"shelf://{shelf}", cache(tmp_path, 3000))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(storage.fetch, names))
    assert sorted(downloads(shelf)) == names
    assert most == {"running": 3, "shards": 3}
    assert 0 < len(in_cache(tmp_path)) <= 3


def test_a_killed_download_leaves_nothing_that_counts(tmp_path: Path, shelf: Path) -> None:
    """The process is killed with half of a shard written. Then the cache, which has room for one
    shard, takes another one, or the same one, also when that has changed."""
    contents = [put(shelf, f"{number}.bin", 100_000) for number in range(2)]
    (shelf / "stuck").touch()
    spawn = multiprocessing.get_context("spawn")
    config = cache(tmp_path, 150_000)
    arguments = (f"shelf://{shelf}", config, ["0.bin"], spawn.Barrier(1))
    process = spawn.Process(target=fetch_in_threads, args=arguments)
    process.start()
    for _ in range(3000):
        if (shelf / "halfway").exists():
            break
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (shelf / "stuck").unlink()
    (half,) = in_cache(tmp_path)
    assert half.name != "0.bin"
    assert half.stat().st_size == 50_000

    def after(number: int) -> bytes:
        """What a fetch gives in a copy of the cache as it was left."""
        shutil.copytree(tmp_path / "cache", tmp_path / "copy" / "cache")
        storage = open_storage(f"shelf://{shelf}", cache(tmp_path / "copy", 150_000))
        path = storage.fetch(f"{number}.bin")
        content = path.read_bytes()
        assert in_cache(tmp_path / "copy") == [path]
        shutil.rmtree(tmp_path / "copy")
        return content

    assert after(0) == contents[0]
    assert after(1) == contents[1]
    changed = put(shelf, "0.bin", 90_000, seed=1)
    assert after(0) == changed


def test_a_child_forked_during_a_download_does_not_keep_the_lock(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []
    copy = Shelf.get_file

    def fork_and_copy(self: Shelf, path1: str, path2: str, **kwargs: Any) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)
        copy(self, path1, path2, **kwargs)

    monkeypatch.setattr(Shelf, "get_file", fork_and_copy)
    put(shelf, "0.bin", 10)
    try:
        path = open_storage(f"shelf://{shelf}", cache(tmp_path)).fetch("0.bin")
        locks = [path.with_name("0.bin.lock"), tmp_path / "cache" / "lock"]
        for lock in locks:
            with lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


class TestErrors:
    REASONS: ClassVar = {
        "forbidden": "Access Denied",
        "unreachable": "cannot reach host 'shelf'",
        "late": "TimeoutError",
        "foreign": "Expired token",
    }

    @pytest.mark.parametrize("name", REASONS)
    def test_a_failed_download_names_url_and_reason(
        self, tmp_path: Path, shelf: Path, name: str
    ) -> None:
        put(shelf, name, 10)
        message = refusal(open_storage(f"broken://{shelf}", cache(tmp_path)), name)
        assert message == (f"data.dir: cannot read 'broken://{shelf}/{name}': {self.REASONS[name]}")
        assert in_cache(tmp_path) == []

    def test_a_file_of_another_size_is_not_kept(self, tmp_path: Path, shelf: Path) -> None:
        put(shelf, "0.bin", 10)
        message = refusal(open_storage(f"broken://{shelf}", cache(tmp_path)), "0.bin")
        assert "got 9 bytes" in message
        assert "has 10" in message
        assert in_cache(tmp_path) == []

    def test_a_full_disk_is_the_caches(self, tmp_path: Path, shelf: Path) -> None:
        put(shelf, "full", 10)
        message = refusal(open_storage(f"broken://{shelf}", cache(tmp_path)), "full")
        assert message.startswith(f"data.cache.dir: cannot write to '{tmp_path}/cache': No space")

    def test_a_cache_that_cannot_be_made_is_named(self, tmp_path: Path, shelf: Path) -> None:
        put(shelf, "0.bin", 10)
        (tmp_path / "cache").touch()
        message = refusal(open_storage(f"file://{shelf}", cache(tmp_path)), "0.bin")
        assert message.startswith(f"data.cache.dir: cannot write to '{tmp_path}/cache': ")

    @pytest.mark.parametrize("url", ["memory://storage-test/none", "file://{shelf}/none"])
    def test_a_missing_file_is_named(self, tmp_path: Path, shelf: Path, url: str) -> None:
        url = url.format(shelf=shelf)
        message = refusal(open_storage(url, cache(tmp_path)), "manifest.json")
        assert message == f"data.dir: cannot read '{url}/manifest.json': not found"

    def test_a_missing_file_has_the_reason_of_its_failure(
        self, tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For HTTP every failure is a missing file."""

        def info(self: Shelf, path: str, **kwargs: Any) -> dict[str, Any]:
            raise FileNotFoundError(path) from ConnectionError("no route to host")

        monkeypatch.setattr(Shelf, "info", info)
        message = refusal(open_storage(f"shelf://{shelf}", cache(tmp_path)), "0.bin")
        assert message.endswith("not found (no route to host)")

    def test_a_server_that_cannot_be_reached_is_no_fault_of_the_cache(
        self, tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Some filesystems connect when they are made."""

        def refuse(self: Shelf, **kwargs: Any) -> None:
            raise ConnectionRefusedError(111, "Connection refused")

        monkeypatch.setattr(Shelf, "__init__", refuse)
        monkeypatch.setattr(Shelf, "cachable", False)
        message = refusal(open_storage(f"shelf://{shelf}", cache(tmp_path)), "0.bin")
        assert message.startswith(f"data.dir: cannot read 'shelf://{shelf}/0.bin': ")
        assert message.endswith("Connection refused")

    def test_a_folder_is_no_file(self, tmp_path: Path, shelf: Path) -> None:
        (shelf / "manifest.json").mkdir()
        message = refusal(open_storage(f"file://{shelf}", cache(tmp_path)), "manifest.json")
        assert f"'file://{shelf}/manifest.json' must be a file" in message
        assert in_cache(tmp_path) == []

    def test_an_unknown_protocol_is_named(self, tmp_path: Path) -> None:
        message = refusal(open_storage("cupboard://web", cache(tmp_path)), "manifest.json")
        assert message.startswith("data.dir: cannot read 'cupboard://web/manifest.json': ")
        assert "cupboard" in message.split("': ")[1]

    def test_a_missing_package_is_named(self, tmp_path: Path) -> None:
        fsspec.register_implementation(
            "attic", "no_such_atticfs.Attic", clobber=True, errtxt="Install atticfs for it"
        )
        message = refusal(open_storage("attic://web", cache(tmp_path)), "manifest.json")
        assert message == (
            "data.dir: cannot read 'attic://web/manifest.json': Install atticfs for it"
        )

    @pytest.mark.parametrize("name", ["../0.bin", "/etc/passwd", "..", "", ".0.bin", "a\n.bin"])
    def test_names_do_not_lead_out_of_the_folder(
        self, tmp_path: Path, shelf: Path, name: str
    ) -> None:
        put(tmp_path, "0.bin", 10)
        message = refusal(open_storage(f"file://{shelf}", cache(tmp_path)), name)
        assert "names a file" in message
        assert in_cache(tmp_path) == []

"""Damaged files are refused in one line or do no harm: no traceback, no hang, no wrong token.

Every case damages one file of a sound set, by a chance of its own that is the same each time, and
reads everything. It may be refused by a DataError of one line, or give what the sound files give;
text and logs may also give what the damaged file really says, as another reader finds it.
"""

import bz2
import gzip
import itertools
import json
import lzma
import os
import resource
import shutil
import signal
import struct
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer

from moebius.data import encode as encode_module
from moebius.data import prepare as prepare_module
from moebius.data import shards as shards_module
from moebius.data.audit import AuditWriter, read_audit
from moebius.data.build import build_stream, validation_readers
from moebius.data.config import DataConfig, FilesSource, TokenizerConfig
from moebius.data.corpus import SplitReader, open_corpora
from moebius.data.prepare import Workshop, prepare
from moebius.data.quarantine import find_bad_shards
from moebius.data.stream import TrainStream
from moebius.errors import DataError, MoebiusError
from moebius.trainer.cli import main
from tests.conftest import QUIET, model_tree

VOCAB_SIZE = 300
LENGTH = 32
BATCH = 8
SECONDS = 5
"""that a case may take"""
ROOM = 2 << 30
"""bytes that a case may take"""
NOBODY = 65534
MODULES = ("calendar", "configparser", "csv", "difflib")
PARTS = ("concat", "best_fit", "lengths", "validation")
"""what is read of a corpus, each by itself: what is not used need not be whole"""
SHARD = "train-00001"
CACHE = f"{SHARD}.best_fit-{LENGTH}"


class Case(NamedTuple):
    """One damage to one file."""

    file: str
    how: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.file}-{self.how}-{self.seed}"

    @property
    def chance(self) -> Random:
        """The same each time."""
        return Random(str(self))


# Damages: to bytes, to JSON, to a file as a whole.


def flip_one(content: bytearray, chance: Random) -> None:
    content[chance.randrange(len(content))] ^= chance.randint(1, 255)


def flip_some(content: bytearray, chance: Random) -> None:
    for _ in range(chance.randint(2, 20)):
        flip_one(content, chance)


def truncate(content: bytearray, chance: Random) -> None:
    del content[chance.randrange(len(content)) :]


def extend(content: bytearray, chance: Random) -> None:
    content += chance.randbytes(chance.randint(1, 200))


def swap(content: bytearray, chance: Random) -> None:
    """Two ranges of one length, one after the other."""
    size = chance.randint(1, len(content) // 3)
    first = chance.randrange(len(content) - 2 * size + 1)
    second = chance.randrange(first + size, len(content) - size + 1)
    left, right = content[first : first + size], content[second : second + size]
    content[first : first + size], content[second : second + size] = right, left


def zero_page(content: bytearray, chance: Random) -> None:
    page = 256
    start = chance.randrange(0, len(content), page)
    end = min(start + page, len(content))
    content[start:end] = bytes(end - start)


def empty(content: bytearray, chance: Random) -> None:
    content.clear()


BYTES: dict[str, Callable[[bytearray, Random], None]] = {
    damage.__name__: damage
    for damage in (flip_one, flip_some, truncate, extend, swap, zero_page, empty)
}


def delete(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path) -> None:
    """Whoever opens it to read waits for ever."""
    path.unlink()
    os.mkfifo(path)


WHOLE: dict[str, Callable[[Path], None]] = {
    damage.__name__: damage for damage in (delete, folder, dangling, loop, pipe)
}
DEEP = 100_000
JUNK = {"a": [None, {"b": [1.5, {"c": "\ud800"}]}, True]}
JSON = (
    *("digit", "huge", "negative", "float", "nan", "null", "text", "junk", "deep"),
    *("lines", "traversal", "drop", "rename", "rename_lines", "repeat"),
)


def damaged_json(content: bytes, how: str, chance: Random) -> bytes:
    """One value or key of a JSON document changed."""
    tree = json.loads(content)
    places = [place for place in _places(tree) if _suits(*place, how)]
    container, key = chance.choice(places)
    old = container[key]
    if how == "drop":
        del container[key]
    elif how in ("rename", "rename_lines"):
        container[f"{key}x" if how == "rename" else f"{key}\nTraceback: b"] = container.pop(key)
    elif how == "repeat":
        container[key] = "@twice@"
    else:
        container[key] = {
            "digit": lambda: _other_digit(old, chance),
            "huge": lambda: chance.choice([2**31, 2**32 + 1, 2**63, 2**64 + 7, 10**400]),
            "negative": lambda: -chance.choice([1, 2, 300, 2**31 + 1]),
            "float": lambda: chance.choice([0.5, 1e300, -0.0]),
            "nan": lambda: chance.choice([float("nan"), float("inf")]),
            "null": lambda: None,
            "text": lambda: chance.choice(["", "7", "ten", "x" * 10_000]),
            "junk": lambda: chance.choice([JUNK, [JUNK] * 3, [], {}, True]),
            "deep": lambda: "@deep@",
            "lines": lambda: f"{old}\nTraceback: a\r\nb",
            "traversal": lambda: chance.choice(["../../etc/passwd", "/etc/passwd", "..", "\0"]),
        }[how]()
    text = json.dumps(tree)
    text = text.replace('"@deep@"', "[" * DEEP + "]" * DEEP)
    if how == "repeat":
        name = json.dumps(str(key))
        text = text.replace(
            f'{name}: "@twice@"', f"{name}: {json.dumps(old)}, {name}: {json.dumps(old)}"
        )
    return text.encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Where each value of a document is."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in children:
        yield tree, key
        if isinstance(child, dict | list):
            yield from _places(child)


def _suits(container: Any, key: Any, how: str) -> bool:
    if how == "digit":
        value = container[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number or (isinstance(value, str) and any(c in "0123456789" for c in value))
    return isinstance(container, dict) or how not in ("rename", "rename_lines", "repeat")


def _other_digit(value: Any, chance: Random) -> Any:
    text = str(value)
    place = chance.choice([n for n, c in enumerate(text) if c in "0123456789"])
    digits = [digit for digit in "123456789" if digit != text[place]]
    return type(value)(text[:place] + chance.choice(digits) + text[place + 1 :])


def damage(path: Path, case: Case, other: Path | None = None) -> None:
    """Damage a file; `other`, a sound one of its kind, may take its place."""
    if case.how in WHOLE:
        WHOLE[case.how](path)
        return
    content = bytearray(path.read_bytes())
    if case.how in BYTES:
        BYTES[case.how](content, case.chance)
    elif case.how == "other":
        assert other is not None
        content = bytearray(other.read_bytes())
    else:
        chance, lines = case.chance, [bytes(content)]
        if path.suffix == ".jsonl":
            lines = content.splitlines()
        number = chance.randrange(len(lines))
        lines[number] = damaged_json(lines[number], case.how, chance)
        content = bytearray(b"\n".join(lines))
    path.unlink()  # it may be a link to the sound file
    path.write_bytes(content)


def case_list(files: tuple[str, ...], hows: tuple[str, ...], seeds: int = 1) -> list[Case]:
    """Those that have no chance are there once."""
    return [
        Case(file, how, seed)
        for file in files
        for how in hows
        for seed in range(1 if how in (*WHOLE, "empty", "other") else seeds)
    ]


# A sound corpus, and what is in it.


class Sound(NamedTuple):
    """A corpus and what is read from it."""

    folder: Path
    texts: list[str]
    parts: dict[str, Any]


def real_texts() -> list[str]:
    """Short pieces of modules of the standard library."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = [(stdlib / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    pieces = [piece for text in modules for piece in text.split("\n\n")]
    return [piece for piece in pieces if 20 < len(piece) < 140][:160]


def write_rows(path: Path, texts: list[str]) -> Path:
    """Texts as a file of the kind that its name says."""
    rows = [{"text": text, "number": number} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    joined = "\n".join(texts).encode()
    match "".join(path.suffixes):
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".arrow":
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_bytes(lines)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines, mtime=0))
        case ".txt":
            path.write_bytes(joined)
        case ".txt.gz":
            path.write_bytes(gzip.compress(joined, mtime=0))
        case ".txt.bz2":
            path.write_bytes(bz2.compress(joined))
        case ".txt.xz":
            path.write_bytes(lzma.compress(joined))
    return path


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[pytest.MonkeyPatch]:
    """Shards of several pieces from little text; nothing waits for a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "SHARD_TOKENS", 1200)
        patch.setattr(shards_module, "PIECE", 1024)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield patch


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> Sound:
    place = tmp_path_factory.mktemp("sound")
    texts = real_texts()
    source = FilesSource(paths=(str(write_rows(place / "rows.jsonl", texts)),))
    config = DataConfig(dir=str(place / "corpus"), source=source, validation_fraction=0.2)
    made = prepare(config, VOCAB_SIZE, QUIET)
    assert len(made.first.manifest.splits["train"].shards) > 3
    parts = {part: read_part(place / "corpus", part) for part in PARTS}  # makes the packings, too
    return Sound(place / "corpus", texts, parts)


@pytest.fixture
def copy(sound: Sound, tmp_path: Path) -> Path:
    """Of links: what is damaged is a new file."""
    return Path(shutil.copytree(sound.folder, tmp_path / "copy", copy_function=os.link))


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """A case that hangs, or takes all memory, fails; none takes the tests with it."""

    def late(*_: object) -> None:
        pytest.fail(f"hangs for {SECONDS} seconds")

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def corpus_config(location: Path, packing: str = "concat") -> DataConfig:
    return DataConfig(dir=str(location), source=None, sequence_length=LENGTH, packing=packing)


def samples(reader: SplitReader) -> list[list[list[int]]]:
    return [[w.tolist() for w in reader.sample(n)] for n in range(reader.num_samples)]


def read_part(location: Path, part: str) -> Any:
    """A part of a corpus, as a run reads it."""
    config = corpus_config(location, "best_fit" if part == "best_fit" else "concat")
    corpora = open_corpora(config)
    if part == "validation":
        return samples(validation_readers(config, corpora, {})[""])
    stream = build_stream(config, corpora, BATCH, 0, {})
    assert isinstance(stream, TrainStream)
    (reader,) = stream.readers
    if part == "lengths":
        return [shard.lengths().tolist() for shard in reader.shards]
    return samples(reader)


def refusal(work: Callable[[], object]) -> str:
    """The line with which something is refused; empty where it is not. Other errors are raised."""
    try:
        work()
    except DataError as error:
        return one_line(error)
    return ""


def alone(work: Callable[[], object], report: Path) -> None:
    """Do it in a process of its own: code that is not Python's may hang, or end the process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    try:
        _, status = os.waitpid(child, 0)
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if status != 0:
        reason = (
            report.read_text()
            if report.exists()
            else f"ended with {os.waitstatus_to_exitcode(status)}"
        )
        pytest.fail(reason, pytrace=False)


def one_line(error: MoebiusError) -> str:
    message = str(error)
    assert message.strip()
    assert not set("\n\r") & set(message), message
    return message


# Files of a corpus.

FILES = tuple(f"{SHARD}.{kind}" for kind in ("bin", "idx", "sums"))
CORPUS_CASES = [
    *case_list((*FILES, CACHE), (*BYTES, *WHOLE, "other"), seeds=3),
    *case_list(("validation-00000.bin",), (*BYTES, "delete", "other")),
    *case_list(("manifest.json",), (*BYTES, *WHOLE, "other"), seeds=3),
    *case_list(("manifest.json",), JSON, seeds=6),
    *case_list(("tokenizer.json",), (*BYTES, *WHOLE, "other", "digit", "drop")),
]


@pytest.fixture(scope="module")
def others(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of another corpus, which is sound as well."""
    place = tmp_path_factory.mktemp("others")
    texts = [text.upper() for text in sound.texts]
    source = FilesSource(paths=(str(write_rows(place / "rows.jsonl", texts)),))
    config = DataConfig(dir=str(place / "corpus"), source=source, validation_fraction=0.2)
    prepare(config, VOCAB_SIZE, QUIET)
    return place / "corpus"


def replacement(case: Case, sound: Sound, others: Path) -> Path:
    """Another shard's file, or the file of another corpus."""
    name = case.file.replace(SHARD, "train-00000").replace("validation-00000", "train-00000")
    return sound.folder / name if name != case.file else others / name


def check_same(found: list[Any], wanted: list[Any], what: str) -> None:
    """Like an assertion, which would take seconds to show how long lists differ."""
    if found != wanted:
        pairs = itertools.zip_longest(found, wanted)
        place = next(n for n, (one, other) in enumerate(pairs) if one != other)
        pytest.fail(
            f"{what}: {len(found)} items, wanted {len(wanted)}; the first that differs is {place}: "
            f"{str(found[place : place + 1])[:200]}, wanted {str(wanted[place : place + 1])[:200]}"
        )


def check_corpus(location: Path, wanted: dict[str, Any], *names: str) -> list[str]:
    """Each part is as it should be, or is refused by a line that has one of the names."""
    refusals = []
    for part in PARTS:
        found: list[Any] = []
        message = refusal(lambda part=part, found=found: found.append(read_part(location, part)))
        if message:
            assert any(name in message for name in names), message
            refusals.append(message)
        else:
            check_same(found[0], wanted[part], part)
    return refusals


@pytest.mark.parametrize("case", CORPUS_CASES, ids=str)
def test_a_corpus_with_a_damaged_file_is_refused_or_as_it_was(
    case: Case, sound: Sound, others: Path, copy: Path
) -> None:
    damage(copy / case.file, case, replacement(case, sound, others))
    # A number of the manifest is found to be wrong where a shard does not have it.
    names = [str(copy)] if case.file == "manifest.json" else [str(copy / case.file)]
    refusals = check_corpus(copy, sound.parts, *names)
    if case.file == CACHE:
        assert not refusals  # it is made anew


@pytest.mark.parametrize("case", case_list(FILES, (*BYTES, *WHOLE, "other")), ids=str)
def test_quarantine_finds_a_damaged_shard_and_reads_only_what_was_prepared(
    case: Case, sound: Sound, others: Path, copy: Path
) -> None:
    before = (copy / case.file).read_bytes()
    damage(copy / case.file, case, replacement(case, sound, others))
    path = copy / case.file
    same = path.is_file() and path.read_bytes() == before
    config = corpus_config(copy)
    corpora, reports = open_corpora(config), []
    bad = find_bad_shards(corpora, reports.append)
    assert bad == ({} if same else {"": [SHARD]})
    assert all(case.file in line and "\n" not in line for line in reports)
    for packing in ("concat", "best_fit"):
        reader = SplitReader(corpora.first, "train", LENGTH, packing, bad.get("", ()))
        found = samples(reader)
        assert len(found) == len(sound.parts[packing])
        assert all(sample in sound.parts[packing] for sample in found)


Tree = dict[str, Any]


def entries(tree: Tree, split: str = "train") -> list[Tree]:
    found: list[Tree] = tree["splits"][split]["shards"]
    return found


def edit(path: Path, change: Callable[[Tree], object]) -> None:
    """Change the manifest of a copy."""
    tree = json.loads(path.read_text())
    change(tree)
    path.unlink()
    path.write_text(json.dumps(tree))


def _move_entry(tree: Tree) -> None:
    entries(tree).append(entries(tree, "validation").pop())


def _swap_splits(tree: Tree) -> None:
    splits = tree["splits"]
    splits["train"], splits["validation"] = splits["validation"], splits["train"]


def _named(name: str) -> Callable[[Tree], None]:
    return lambda tree: entries(tree)[1].update(name=name)


MANIFEST_EDITS: dict[str, Callable[[Tree], object]] = {
    "another_end_of_document": lambda tree: tree["tokenizer"].update(eod_id=7),
    "an_end_of_document_beyond_the_vocabulary": lambda t: t["tokenizer"].update(eod_id=VOCAB_SIZE),
    "an_end_of_document_beyond_64_bits": lambda tree: tree["tokenizer"].update(eod_id=2**63),
    "a_smaller_vocabulary": lambda tree: tree["tokenizer"].update(vocab_size=40),
    "a_larger_vocabulary": lambda tree: tree["tokenizer"].update(vocab_size=2**16),
    "another_type": lambda tree: tree.update(dtype="int32"),
    "a_vocabulary_of_another_type": lambda tree: (
        tree.update(dtype="int32"),
        tree["tokenizer"].update(vocab_size=2**17),
    ),
    "shards_swapped": lambda tree: entries(tree).insert(0, entries(tree).pop()),
    "a_shard_twice": lambda tree: entries(tree).append(entries(tree)[0]),
    "a_shard_twice_in_a_row": lambda tree: entries(tree).insert(0, entries(tree)[0]),
    "the_last_shard_left_out": lambda tree: entries(tree).pop(),
    "the_first_shard_left_out": lambda tree: entries(tree).pop(0),
    "no_shards": lambda tree: entries(tree).clear(),
    "a_held_out_shard_in_training": _move_entry,
    "splits_swapped": _swap_splits,
    "no_training": lambda tree: tree["splits"].pop("train"),
    "no_validation": lambda tree: tree["splits"].pop("validation"),
    "a_third_split": lambda tree: tree["splits"].update(test=tree["splits"]["train"]),
    "a_split_of_two_lines": lambda tree: tree["splits"].update({"a\nb": {}}),
    "a_key_of_two_lines": lambda tree: tree.update({"a\nb": 1}),
    "names_swapped": lambda tree: (
        entries(tree)[0].update(name="train-00001"),
        entries(tree)[1].update(name="train-00000"),
    ),
    "a_name_of_two_lines": _named("train-00001\n"),
    "a_name_of_a_folder_above": _named("../copy/train-00001"),
    "a_name_with_a_root": _named("/etc/passwd"),
    "a_name_of_a_folder_below": _named("a/../train-00001"),
    "a_name_of_dots": _named(".."),
    "a_name_without_letters": _named(""),
    "a_name_longer_than_files_have": _named("a" * 300),
    "a_name_longer_than_paths_have": _named("a" * 10_000),
    "a_name_with_a_null": _named("train\0"),
    "a_name_with_umlauts": _named("train-ä"),
    "fewer_tokens_in_one_shard": lambda t: entries(t)[0].update(tokens=entries(t)[0]["tokens"] - 1),
    "tokens_beyond_64_bits": lambda tree: entries(tree)[0].update(tokens=2**70),
    "documents_beyond_64_bits": lambda tree: entries(tree)[0].update(documents=2**70),
    "bytes_beyond_floats": lambda tree: tree["splits"]["train"].update(bytes=10**400),
    "another_format": lambda tree: tree.update(format=3),
    "an_older_format": lambda tree: tree.update(format=1),
    "a_list": lambda tree: tree.update(splits=[]),
}


@pytest.mark.parametrize("name", MANIFEST_EDITS)
def test_a_corpus_with_another_manifest_is_refused_or_as_it_was(
    name: str, sound: Sound, copy: Path
) -> None:
    edit(copy / "manifest.json", MANIFEST_EDITS[name])
    check_corpus(copy, sound.parts, str(copy))


PACK_HEADER = struct.Struct("<16s32sQQ")
PACK_EDITS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "more_samples_of_as_many_bytes": lambda samples, pieces: (samples + 3, pieces - 2),
    "fewer_samples_of_as_many_bytes": lambda samples, pieces: (samples - 3, pieces + 2),
    "far_fewer_samples_of_as_many_bytes": lambda s, p: (s % 3, p + (s - s % 3) // 3 * 2),
    "no_samples": lambda samples, pieces: (0, 0),
    "samples_beyond_memory": lambda samples, pieces: (2**60, pieces),
    "numbers_that_overflow": lambda samples, pieces: (2**64 - 1, 2**64 - 1),
}


@pytest.mark.parametrize("name", PACK_EDITS)
def test_a_packing_of_another_size_is_made_anew(name: str, sound: Sound, copy: Path) -> None:
    content = (copy / CACHE).read_bytes()
    magic, digest, *counts = PACK_HEADER.unpack_from(content)
    changed = PACK_EDITS[name](*counts)
    (copy / CACHE).unlink()
    head = PACK_HEADER.pack(magic, digest, *changed)
    (copy / CACHE).write_bytes(head + content[PACK_HEADER.size :])
    assert not check_corpus(copy, sound.parts)


# Text that a corpus is made from.

SOURCES = tuple(
    f"rows.{kind}"
    for kind in (
        *("jsonl", "json", "parquet", "arrow"),
        *("txt", "txt.gz", "jsonl.gz", "txt.bz2", "txt.xz"),
    )
)
SOURCE_CASES = [
    *case_list(("rows.jsonl", "rows.parquet"), (*BYTES, "other"), seeds=3),
    *case_list(("rows.txt.gz",), (*BYTES, "other"), seeds=2),
    *case_list(("rows.arrow", "rows.json", "rows.jsonl.gz"), tuple(BYTES)),
    *case_list(("rows.txt.bz2", "rows.txt.xz"), ("flip_one", "truncate", "extend")),
    *case_list(("rows.txt",), ("flip_one", "flip_some"), seeds=2),
    *case_list(("rows.jsonl", "rows.parquet", "rows.txt.gz"), tuple(WHOLE)),
    *case_list(("rows.jsonl",), JSON),
]


def as_another_reader_finds(path: Path) -> list[str]:
    """The texts that a file really has; raises some error where it cannot be read."""
    content = path.read_bytes()
    kinds = path.suffixes
    if kinds[-1] in (".gz", ".bz2", ".xz"):
        readers = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
        content = readers[kinds[-1]](content)
    if kinds[0] == ".txt":
        return [content.decode("utf-8-sig")]
    if kinds[0] == ".parquet":
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    elif kinds[0] == ".arrow":
        rows = pa.ipc.open_stream(content).read_all().to_pylist()
    else:
        rows = list(json_values(content.decode("utf-8-sig")))
        if len(rows) == 1 and isinstance(rows[0], list):
            rows = [{"text": row} if isinstance(row, str) else row for row in rows[0]]
    texts = [row["text"] for row in rows]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no text")
    return texts


def json_values(text: str) -> Iterator[Any]:
    """Values one after the other, each on a line of its own or not."""
    decoder, blank = json.JSONDecoder(strict=False), " \t\r\n"
    text = text.strip(blank)
    while text:
        value, end = decoder.raw_decode(text)
        yield value
        text = text[end:].lstrip(blank)


def documents_of(location: Path) -> list[list[int]]:
    """All documents of a corpus, read without the package; each has its end."""
    manifest = json.loads((location / "manifest.json").read_text())
    found = []
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            dtype = {"uint16": "<u2", "int32": "<i4"}[manifest["dtype"]]
            tokens = np.fromfile(location / f"{shard['name']}.bin", dtype)
            ends = np.flatnonzero(tokens == manifest["tokenizer"]["eod_id"])
            assert ends[-1] == len(tokens) - 1
            found += [piece[:-1].tolist() for piece in np.split(tokens, ends + 1)[:-1]]
    return found


def texts_of(location: Path) -> list[str]:
    tokenizer = Tokenizer.from_file(str(location / "tokenizer.json"))
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in documents_of(location)]


def source_config(place: Path, tokenizer: Path, *paths: Path) -> DataConfig:
    return DataConfig(
        dir=str(place / "out"),
        source=FilesSource(paths=tuple(map(str, paths))),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        sequence_length=LENGTH,
        validation_fraction=0.4,
    )


@pytest.fixture(scope="module")
def sources(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound files of each kind, and a second set of them."""
    place = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        for folder, texts in (("a", sound.texts[:40]), ("b", sound.texts[40:70])):
            (place / folder).mkdir(exist_ok=True)
            write_rows(place / folder / name, texts)
    return place


def check_source(place: Path, path: Path, sound: Sound) -> str:
    """A corpus of a damaged file and a sound one has the texts of both, or is refused."""
    rows = sound.texts[100:120]
    good = write_rows(place / "good.jsonl", rows)
    config = source_config(place, sound.folder / "tokenizer.json", good, path)
    message = refusal(lambda: prepare(config, VOCAB_SIZE, QUIET))
    if message:
        assert path.name in message, message
        assert not (place / "out" / "manifest.json").exists()
        return message
    try:
        wanted = [*rows, *as_another_reader_finds(path)]
    except Exception as error:
        pytest.fail(f"was read, though {type(error).__name__}: {error}")
    check_same(sorted(texts_of(place / "out")), sorted(filter(None, wanted)), "texts")
    return ""


@pytest.mark.parametrize("name", SOURCES)
def test_a_sound_source_is_not_refused(
    name: str, sources: Path, sound: Sound, tmp_path: Path
) -> None:
    """Else all that follows would prove nothing."""
    assert check_source(tmp_path, sources / "a" / name, sound) == ""


@pytest.mark.parametrize("case", SOURCE_CASES, ids=str)
def test_a_damaged_source_is_refused_or_read_as_it_is(
    case: Case, sources: Path, sound: Sound, tmp_path: Path
) -> None:
    path = Path(shutil.copy(sources / "a" / case.file, tmp_path))
    damage(path, case, sources / "b" / case.file)
    if case.how == "pipe":
        alone(lambda: check_source(tmp_path, path, sound), tmp_path / "report")
    else:
        check_source(tmp_path, path, sound)


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(**columns: Any) -> bytes:
    """A parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


PADDED = lines(*({"text": f"row {n}", "pad": "x" * 1_000_000} for n in range(11)))
"""more than what is read of a file at once"""
WRITTEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "two_rows_in_a_line": ("jsonl", lambda: b'{"text": "a"}{"text": "b"}\n'),
    "a_row_in_two_lines": ("jsonl", lambda: b'{"text":\n "a"}\n{"text": "b"}\n'),
    "rows_that_end_with_returns": ("jsonl", lambda: b'{"text": "a"}\r{"text": "b"}\r'),
    "a_key_twice": ("jsonl", lambda: b'{"text": "a", "text": "b"}\n'),
    "half_a_surrogate": ("jsonl", lambda: b'{"text": "a\\ud800"}\n'),
    "halves_of_surrogates_swapped": ("jsonl", lambda: b'{"text": "\\udc00\\ud800"}\n'),
    "a_null_character": ("jsonl", lambda: b'{"text": "a\\u0000b"}\n'),
    "no_utf8": ("jsonl", lambda: b'{"text": "\xff\xfe"}\n'),
    "utf8_of_a_surrogate": ("jsonl", lambda: b'{"text": "\xed\xa0\x80"}\n'),
    "utf8_that_is_too_long": ("jsonl", lambda: b'{"text": "\xc0\xaf"}\n'),
    "utf16": ("jsonl", lambda: '{"text": "a"}\n'.encode("utf-16")),
    "a_byte_order_mark": ("jsonl", lambda: b"\xef\xbb\xbf" + lines({"text": "a"})),
    "a_list_of_rows": ("jsonl", lambda: b'[{"text": "a"}, {"text": "b"}]'),
    "a_list_of_texts": ("jsonl", lambda: b'["a", "b"]'),
    "a_list_with_no_utf8": ("json", lambda: b'[{"text": "a\x96b"}]'),
    "a_list_with_half_a_surrogate": ("json", lambda: b'[{"text": "a\\ud800b"}]'),
    "a_list_of_lists": ("jsonl", lambda: b'[["a"], ["b"]]'),
    "a_list_and_rows": ("jsonl", lambda: b'["a"]\n{"text": "b"}\n'),
    "rows_and_a_list": ("jsonl", lambda: b'{"text": "b"}\n["a"]\n'),
    "a_row_of_columns": ("jsonl", lambda: b'{"text": {"0": "a", "1": "b"}}'),
    "columns_in_lines": ("json", lambda: b'{\n"text": {"0": "a",\n"1": "b"}\n}'),
    "numbers_as_columns_in_lines": ("json", lambda: b'{\n"text": {"0": "1",\n"1": "02"}\n}'),
    "null_rows": ("jsonl", lambda: b'{"text": "a"}\nnull\n{"text": "b"}\n'),
    "empty_rows": ("jsonl", lambda: b'{"text": "a"}\n{}\n{"text": "b"}\n'),
    "blank_lines": ("jsonl", lambda: b'\n\n{"text": "a"}\n  \n\n{"text": "b"}\n\n'),
    "a_text_and_a_number": ("jsonl", lambda: lines({"text": "1"}, {"text": 1})),
    "texts_and_a_list": ("jsonl", lambda: lines({"text": "1"}, {"text": ["a"]})),
    "a_truth": ("jsonl", lambda: lines({"text": "true"}, {"text": True})),
    "texts_that_are_dates": (
        "jsonl",
        lambda: lines({"text": "2026-01-02"}, {"text": "2026-01-03"}),
    ),
    "texts_that_are_numbers": ("jsonl", lambda: lines({"text": "1"}, {"text": "02"})),
    "texts_that_are_json": ("jsonl", lambda: lines({"text": "{}"}, {"text": '"a"'}, {"text": "["})),
    "json_texts_and_a_number": (
        "jsonl",
        lambda: lines({"text": "{}"}, {"text": '"a"'}, {"text": "null"}, {"text": 5}),
    ),
    "a_date_far_on": ("jsonl", lambda: PADDED + lines({"text": "2026-01-02"})),
    "a_number_far_on": ("jsonl", lambda: PADDED + lines({"text": 5})),
    "a_null_far_on": ("jsonl", lambda: PADDED + lines({"text": None})),
    "an_object_far_on": ("jsonl", lambda: PADDED + lines({"text": {"a": 1}})),
    "a_broken_line_far_on": ("jsonl", lambda: PADDED + b'{"text": "a"\n'),
    "deep_lists": ("jsonl", lambda: b"[" * DEEP + b"]" * DEEP),
    "a_deep_text": ("jsonl", lambda: b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}\n"),
    "many_keys": ("jsonl", lambda: lines({"text": "a"} | {str(n): n for n in range(300)})),
    "a_key_of_two_lines": ("jsonl", lambda: lines({"a\nb": "a"})),
    "text_of_windows": ("txt", lambda: b"a\r\nb\rc\n"),
    "compressed_text_of_windows": ("txt.gz", lambda: gzip.compress(b"a\r\nb\rc\n")),
    "text_of_nulls": ("txt", lambda: bytes(1000)),
    "text_with_a_byte_order_mark": ("txt", lambda: b"\xef\xbb\xbfa"),
    "two_members": ("txt.gz", lambda: gzip.compress(b"a") + gzip.compress(b"b")),
    "padded_with_zeros": ("txt.gz", lambda: gzip.compress(b"a") + bytes(512)),
    "compressed_twice": ("txt.gz", lambda: gzip.compress(gzip.compress(b"a"))),
    "compressed_nothing": ("txt.gz", lambda: gzip.compress(b"")),
    "not_compressed": ("txt.gz", lambda: b"plain text"),
    "another_compression": ("txt.gz", lambda: bz2.compress(b"a")),
    "compressed_under_another_name": ("txt", lambda: gzip.compress(b"a")),
    "a_parquet_file_of_numbers": ("parquet", lambda: table(text=[1, 2])),
    "a_parquet_file_of_bytes": ("parquet", lambda: table(text=[b"a", b"\xff"])),
    "a_parquet_file_of_nulls": ("parquet", lambda: table(text=[None, None])),
    "a_parquet_file_with_a_null": ("parquet", lambda: table(text=["a", None])),
    "a_parquet_file_of_lists": ("parquet", lambda: table(text=[["a"], ["b"]])),
    "a_parquet_file_without_rows": ("parquet", lambda: table(text=pa.array([], pa.string()))),
    "a_parquet_file_without_columns": ("parquet", lambda: table()),
    "a_parquet_file_of_another_column": ("parquet", lambda: table(body=["a"])),
    "a_parquet_file_of_a_dictionary": (
        "parquet",
        lambda: table(text=pa.array(["a", "b", "a"]).dictionary_encode()),
    ),
    "jsonl_as_parquet": ("parquet", lambda: lines({"text": "a"})),
    "parquet_as_jsonl": ("jsonl", lambda: table(text=["a"])),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_strange_source_is_refused_or_read_as_it_is(
    name: str, sound: Sound, tmp_path: Path
) -> None:
    kind, content = WRITTEN[name]
    path = tmp_path / f"strange.{kind}"
    path.write_bytes(content())
    if "deep" in name:
        alone(lambda: check_source(tmp_path, path, sound), tmp_path / "report")
    else:
        check_source(tmp_path, path, sound)


# A tokenizer that text is encoded with.

TOKENIZER_CASES = [
    *case_list(("tokenizer.json",), (*BYTES, *WHOLE)),
    *case_list(("tokenizer.json",), JSON, seeds=2),
]


@pytest.fixture(scope="module")
def tokenizer_file(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the library, but without spaces, so that a change falls on something."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(json.loads((sound.folder / "tokenizer.json").read_text())))
    return path


def check_tokenizer(place: Path, path: Path, sound: Sound) -> None:
    """A corpus has the ids that the library gives, or is refused."""
    texts = sound.texts[100:120]
    config = source_config(place, path, write_rows(place / "rows.jsonl", texts))
    message = refusal(lambda: prepare(config, VOCAB_SIZE, QUIET))
    if message:
        assert path.name in message or "data.tokenizer" in message, message
        return
    library = Tokenizer.from_file(str(path))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    wanted = [library.encode(text, add_special_tokens=False).ids for text in texts]
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"]["eod_id"] == library.token_to_id("<|endoftext|>")
    assert manifest["tokenizer"]["vocab_size"] == max(library.get_vocab().values()) + 1
    check_same(sorted(documents_of(place / "out")), sorted(wanted), "documents")
    # What was made can be read.
    read_part(place / "out", "concat")


@pytest.mark.parametrize("case", TOKENIZER_CASES, ids=str)
def test_a_damaged_tokenizer_is_refused_or_used_as_it_is(
    case: Case, tokenizer_file: Path, sound: Sound, tmp_path: Path
) -> None:
    path = Path(shutil.copy(tokenizer_file, tmp_path))
    damage(path, case)
    if case.how in ("huge", "pipe"):
        alone(lambda: check_tokenizer(tmp_path, path, sound), tmp_path / "report")
    else:
        check_tokenizer(tmp_path, path, sound)


Vocabulary = dict[str, int]


def _change_vocabulary(change: Callable[[Vocabulary], object]) -> Callable[[Tree], object]:
    return lambda tree: change(tree["model"]["vocab"])


TOKENIZER_EDITS: dict[str, Callable[[Tree], object]] = {
    "an_id_beyond_shards": _change_vocabulary(lambda vocab: vocab.update(e=2**31 + 5)),
    "the_largest_id": _change_vocabulary(lambda vocab: vocab.update(e=2**32 - 1)),
    "an_id_beyond_32_bits": _change_vocabulary(lambda vocab: vocab.update(e=2**32 + 1)),
    "an_id_beyond_two_bytes": _change_vocabulary(lambda vocab: vocab.update(e=2**16)),
    "the_last_id_of_two_bytes": _change_vocabulary(lambda vocab: vocab.update(e=2**16 - 1)),
    "an_id_twice": _change_vocabulary(lambda vocab: vocab.update(e=vocab["t"])),
    "the_end_as_a_letter": _change_vocabulary(lambda vocab: vocab.update(e=0)),
    "a_byte_left_out": _change_vocabulary(lambda vocab: vocab.pop("e")),
    "no_vocabulary": _change_vocabulary(lambda vocab: vocab.clear()),
    "no_merges": lambda tree: tree["model"].update(merges=[]),
    "a_merge_of_nothing": lambda tree: tree["model"].update(merges=[["", ""]]),
    "another_model": lambda tree: tree["model"].update(type="WordLevel", unk_token="e"),
    "an_unknown_token": lambda tree: tree["model"].update(unk_token="unknown"),
    "no_added_tokens": lambda tree: tree.update(added_tokens=[]),
    "an_end_that_is_text": lambda tree: tree["added_tokens"][0].update(special=False),
    "another_id_of_the_end": lambda tree: tree["added_tokens"][0].update(id=9),
    "an_end_without_content": lambda tree: tree["added_tokens"][0].update(content=""),
    "no_decoder": lambda tree: tree.update(decoder=None),
    "no_pieces": lambda tree: tree.update(pre_tokenizer=None),
    "lower_case_only": lambda tree: tree.update(normalizer={"type": "Lowercase"}),
    "cut": lambda tree: tree.update(
        truncation={
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        }
    ),
    "a_pattern_without_end": lambda tree: tree.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(a|aa)+$|(e+)+!|(\\w|\\s)*\\d\\d\\d\\d\\d"},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
}


@pytest.mark.parametrize("name", TOKENIZER_EDITS)
def test_a_strange_tokenizer_is_refused_or_used_as_it_is(
    name: str, tokenizer_file: Path, sound: Sound, tmp_path: Path
) -> None:
    path = Path(shutil.copy(tokenizer_file, tmp_path))
    edit(path, TOKENIZER_EDITS[name])
    if "_id" in name or "pattern" in name:
        alone(lambda: check_tokenizer(tmp_path, path, sound), tmp_path / "report")
    else:
        check_tokenizer(tmp_path, path, sound)


# Logs of what was trained on.

LOG = "0002-rank-00001.jsonl"
AUDIT_CASES = [
    *case_list((LOG, "0001-rank-00000.jsonl"), (*BYTES, *WHOLE, "other"), seeds=2),
    *case_list((LOG,), JSON, seeds=4),
]


@pytest.fixture(scope="module")
def logs(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, stopped after step 5 and gone on with from step 3, beyond an epoch."""
    place = tmp_path_factory.mktemp("run") / "audit"
    corpora = open_corpora(corpus_config(sound.folder))
    reader = SplitReader(corpora.first, "validation", LENGTH)
    assert reader.num_samples < 16 * BATCH < 2 * reader.num_samples
    stream = TrainStream([reader], BATCH, seed=1, prefetch=0)
    for attempt, first, last in ((1, 0, 5), (2, 3, 16)):
        for rank in range(2):
            stream.position = first * BATCH
            writer = AuditWriter(place, attempt, rank, rank, first, stream)
            for step in range(first + 1, last + 1):
                start = (step - 1) * BATCH + rank * BATCH // 2
                writer.write(step, range(start, start + BATCH // 2))
            writer.close()
    assert len(read_audit(place)) == 16 * BATCH
    return place


@pytest.fixture
def logs_copy(logs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(logs, tmp_path / "run" / "audit"))


def check_audit(place: Path, sound: Sound) -> None:
    """What is not refused is a proof: each sample once, and only what the logs say."""
    found: list[Any] = []
    message = refusal(lambda: found.append(read_audit(place)))
    if message:
        assert str(place) in message, message
        return
    rows = [tuple(row) for row in found[0].tolist()]
    size = len(sound.parts["validation"])
    assert [position for position, *_ in rows] == list(range(len(rows)))
    assert len({row[1:] for row in rows}) == len(rows)
    assert {corpus for _, corpus, _, _ in rows} <= {0}
    epochs: dict[int, set[int]] = {}
    for _, _, epoch, number in rows:
        epochs.setdefault(epoch, set()).add(number)
    assert sorted(epochs) == list(range(len(epochs)))
    for epoch, numbers in epochs.items():
        assert numbers <= set(range(size))
        assert epoch == len(epochs) - 1 or len(numbers) == size
    said = "\n".join(path.read_text(errors="replace") for path in sorted(place.glob("*.jsonl")))
    said = said.replace(" ", "")
    assert all(json.dumps(row, separators=(",", ":")) in said for row in rows)


@pytest.mark.parametrize("case", AUDIT_CASES, ids=str)
def test_an_audit_of_a_damaged_log_is_refused_or_proves_what_it_says(
    case: Case, sound: Sound, logs_copy: Path
) -> None:
    damage(logs_copy / case.file, case, logs_copy / "0002-rank-00000.jsonl")
    check_audit(logs_copy, sound)


Lines = list[Tree]


def _rows(lines: Lines, value: Any) -> None:
    lines[4]["rows"] = value


def _cell(column: int, value: Any) -> Callable[[Lines], None]:
    """Another value in the first row of a step in the middle."""

    def change(lines: Lines) -> None:
        lines[4]["rows"][0][column] = value

    return change


def _finished_epoch_of_a_foreign_sample(lines: Lines) -> None:
    lines[1]["rows"][0][3] = 10**6


LOG_EDITS: dict[str, Callable[[Lines], object]] = {
    "the_header_left_out": lambda lines: lines.pop(0),
    "a_step_left_out": lambda lines: lines.pop(4),
    "a_step_twice": lambda lines: lines.insert(4, lines[4]),
    "steps_swapped": lambda lines: lines.insert(4, lines.pop(6)),
    "a_list_as_a_step": lambda lines: lines[4].update(step=[1]),
    "a_text_as_a_step": lambda lines: lines[4].update(step="5"),
    "a_step_of_a_half": lambda lines: lines[4].update(step=4.5),
    "no_step": lambda lines: lines[4].update(step=None),
    "a_step_far_on": lambda lines: lines[4].update(step=10**12),
    "a_step_before": lambda lines: lines[4].update(step=-1),
    "a_list_as_a_reader": lambda lines: lines[0].update(dp=[1]),
    "a_text_as_a_reader": lambda lines: lines[0].update(dp="x"),
    "the_other_reader": lambda lines: lines[0].update(dp=0),
    "a_text_as_a_position": lambda lines: lines[0].update(position="x"),
    "a_number_of_samples_that_is_no_list": lambda lines: lines[0].update(samples=5),
    "texts_as_numbers_of_samples": lambda lines: lines[0].update(samples=["x"]),
    "no_rows": lambda lines: _rows(lines, []),
    "rows_that_are_text": lambda lines: _rows(lines, "rows"),
    "rows_that_are_a_number": lambda lines: _rows(lines, 5),
    "rows_that_are_null": lambda lines: _rows(lines, None),
    "rows_of_unequal_length": lambda lines: _rows(lines, [[1, 2, 3, 4], [1, 2]]),
    "rows_of_eight": lambda lines: _rows(lines, [[1, 2, 3, 4, 5, 6, 7, 8]]),
    "a_flat_row": lambda lines: _rows(lines, [52, 0, 0, 1]),
    "a_row_of_texts": lambda lines: _rows(lines, [["52", "0", "0", "1"]]),
    "a_position_of_a_half": _cell(0, 52.5),
    "a_sample_of_a_half": _cell(3, 7.5),
    "a_true_epoch": _cell(2, True),
    "a_sample_of_text": _cell(3, "7"),
    "a_sample_beyond_64_bits": _cell(3, 2**63),
    "a_sample_that_is_not_there": _cell(3, 10**6),
    "a_sample_before_the_first": _cell(3, -1),
    "an_epoch_before_the_first": _cell(2, -1),
    "an_epoch_far_on": _cell(2, 2**40),
    "an_epoch_later": _cell(2, 10**9),
    "a_corpus_that_is_not_there": _cell(1, 5),
    "a_corpus_before_the_first": _cell(1, -1),
    "a_foreign_sample_in_a_finished_epoch": _finished_epoch_of_a_foreign_sample,
}


def edit_log(path: Path, change: Callable[[Lines], object]) -> None:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    change(found)
    path.write_bytes(lines(*found))


@pytest.mark.parametrize("name", LOG_EDITS)
def test_an_audit_of_a_strange_log_is_refused_or_proves_what_it_says(
    name: str, sound: Sound, logs_copy: Path
) -> None:
    edit_log(logs_copy / LOG, LOG_EDITS[name])
    check_audit(logs_copy, sound)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": ["x"]},
        {"samples": [0]},
        {"samples": [10**6]},
        {"samples": []},
        {"samples": 5},
        {"samples": {"a": 1}},
        {"position": "x"},
        {"position": None},
        {"position": -5},
        {"position": 2**70},
        {"step": "x"},
        {"step": 10**12},
        {"step": -(10**12)},
        {"dp": None},
        {"batch_size": "x"},
        {"batch_size": 0},
        {"batch_size": 2**40},
        {"batch_size": -1},
    ],
    ids=str,
)
def test_an_audit_of_headers_that_all_lie_is_refused_or_proves_what_it_says(
    change: Tree, sound: Sound, logs_copy: Path
) -> None:
    for path in logs_copy.iterdir():
        first, _, rest = path.read_text().partition("\n")
        path.write_text(json.dumps(json.loads(first) | change) + "\n" + rest)
    check_audit(logs_copy, sound)


@pytest.mark.parametrize(
    "name",
    [
        "0003-rank-00000.jsonl",
        "3-rank-0.jsonl",
        "0x-rank-0.jsonl",
        "0002-rank-00001 (copy).jsonl",
        "00002-rank-00001.jsonl",
        "0002-rank-00001.jsonl.bak",
        "notes.jsonl",
    ],
)
def test_an_audit_with_a_stray_file_is_refused_or_proves_what_it_says(
    name: str, sound: Sound, logs_copy: Path
) -> None:
    shutil.copy(logs_copy / LOG, logs_copy / name)
    check_audit(logs_copy, sound)


# A preparation that was killed, whose files are damaged before it goes on.

HALF = "train-00002"
JOURNAL_CASES = [
    *case_list(
        ("progress.json",),
        ("flip_one", "truncate", "zero_page", "empty", "folder", "digit", "huge", "junk", "deep"),
    ),
    *case_list(
        (f"{HALF}.bin", f"{HALF}.lengths"),
        ("flip_one", "truncate", "extend", "zero_page", "empty", "delete", "folder"),
    ),
    *case_list(("train-00000.bin", "ids.sqlite"), ("flip_one", "zero_page", "delete")),
    *case_list(("tokenizer.json",), ("flip_one", "empty", "delete")),
]
JOURNAL_EDITS: dict[str, Callable[[Tree], object]] = {
    "no_documents": lambda tree: tree.update(documents=0),
    "more_documents": lambda tree: tree.update(documents=10**6),
    "an_earlier_row": lambda tree: tree["source"].update(row=3),
    "a_later_row": lambda tree: tree["source"].update(row=100),
    "a_part_that_is_null": lambda tree: tree["source"].update(part=None),
    "a_part_before_the_first": lambda tree: tree["source"].update(part=-1),
    "a_part_that_is_not_there": lambda tree: tree["source"].update(part=7),
    "a_state_of_another_reader": lambda tree: tree["source"].update(rows={"row": 1}),
    "no_state": lambda tree: tree.update(source=None),
    "no_splits": lambda tree: tree.update(splits={}),
    "fewer_documents_of_the_open_shard": lambda tree: tree["splits"]["train"].update(documents=1),
    "more_tokens_of_the_open_shard": lambda tree: tree["splits"]["train"].update(tokens=10**5),
    "a_closed_shard_left_out": lambda tree: tree["splits"]["train"]["shards"].pop(0),
}


class Half(NamedTuple):
    """A preparation that was killed, and what it would have made."""

    folder: Path
    config: DataConfig
    parts: dict[str, Any]


@pytest.fixture(scope="module")
def half(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Half:
    class KilledError(Exception):
        pass

    def kill(done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KilledError

    place, calls = tmp_path_factory.mktemp("half"), 0
    rows = place / "rows.jsonl"
    rows.write_bytes(lines(*({"text": text, "id": str(n)} for n, text in enumerate(sound.texts))))
    tokenizer = shutil.copy(sound.folder / "tokenizer.json", place / "given.json")
    config = source_config(place, Path(tokenizer), rows)
    source = FilesSource(paths=(str(rows),), id_field="id")
    config = config.model_copy(update={"source": source})
    prepare(config, VOCAB_SIZE, QUIET)
    assert len(documents_of(place / "out")) == len(sound.texts)
    parts = {part: read_part(place / "out", part) for part in PARTS}
    shutil.rmtree(place / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "BATCH_DOCUMENTS", 20)
        patch.setattr(prepare_module, "JOURNAL_SECONDS", 0.0)
        with pytest.raises(KilledError):
            prepare(config, VOCAB_SIZE, Workshop(QUIET.report, kill))
    for name in ("progress.json", f"{HALF}.lengths", "train-00000.idx", "ids.sqlite"):
        assert (place / "out" / name).is_file(), name
    return Half(place / "out", config, parts)


def check_going_on(place: Path, half: Half) -> None:
    """What was damaged is noticed at the latest when the corpus is read."""
    config = half.config.model_copy(update={"dir": str(place)})
    if not refusal(lambda: prepare(config, VOCAB_SIZE, QUIET)):
        check_corpus(place, half.parts, str(place))


@pytest.mark.parametrize("case", JOURNAL_CASES, ids=str)
def test_a_preparation_whose_files_were_damaged_is_refused_or_gives_what_it_should(
    case: Case, half: Half, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(half.folder, tmp_path / "out"))
    damage(place / case.file, case)
    check_going_on(place, half)


@pytest.mark.parametrize("name", JOURNAL_EDITS)
def test_a_preparation_with_a_strange_journal_is_refused_or_gives_what_it_should(
    name: str, half: Half, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(half.folder, tmp_path / "out"))
    edit(place / "progress.json", JOURNAL_EDITS[name])
    check_going_on(place, half)


# Files that may not be read.


@contextmanager
def nobody(place: Path) -> Iterator[None]:
    """Root may read everything: be another user in a folder that all may use."""
    here = Path.cwd()
    place.chmod(0o777)
    os.chdir(place)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        os.chdir(here)


@pytest.mark.parametrize("name", [*FILES, CACHE, "manifest.json", "tokenizer.json"])
def test_a_corpus_with_a_file_that_may_not_be_read_is_refused_or_as_it_was(
    name: str, sound: Sound, copy: Path
) -> None:
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    (copy / name).write_bytes(content)
    (copy / name).chmod(0)
    with nobody(copy):
        refusals = check_corpus(Path("."), sound.parts, name)
    assert (not refusals) == (name == CACHE)


def test_a_corpus_in_a_folder_that_may_not_be_read_is_refused(sound: Sound, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sound.folder, tmp_path / "place" / "copy"))
    copy.chmod(0)
    with nobody(tmp_path / "place"):
        refusals = check_corpus(Path("copy"), sound.parts, "copy")
    copy.chmod(0o700)
    assert len(refusals) == len(PARTS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.txt.gz"])
def test_a_source_that_may_not_be_read_is_refused(
    name: str, sources: Path, sound: Sound, tmp_path: Path
) -> None:
    for path in (shutil.copy(sources / "a" / name, tmp_path), tmp_path / "tokenizer.json"):
        if not Path(path).exists():
            shutil.copy(sound.folder / "tokenizer.json", path)
    (tmp_path / name).chmod(0)
    with nobody(tmp_path):
        config = source_config(Path("."), Path("tokenizer.json"), Path(name))
        message = refusal(lambda: prepare(config, VOCAB_SIZE, QUIET))
    assert name in message


def test_a_log_that_may_not_be_read_is_refused(logs_copy: Path) -> None:
    (logs_copy / LOG).chmod(0)
    with nobody(logs_copy):
        message = refusal(lambda: read_audit(Path(".")))
    assert LOG in message


# The command line.


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The only line with which a command fails."""
    capsys.readouterr()
    code = main(list(words))
    output = capsys.readouterr()
    assert code != 0
    assert "Traceback" not in output.err + output.out
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "case",
    [
        Case(f"{SHARD}.bin", "flip_one"),
        Case(f"{SHARD}.bin", "truncate"),
        Case(f"{SHARD}.idx", "flip_one"),
        Case(f"{SHARD}.sums", "flip_one"),
        Case("validation-00000.bin", "zero_page"),
        Case("manifest.json", "truncate"),
        Case("manifest.json", "junk"),
        Case("tokenizer.json", "flip_one"),
        Case("tokenizer.json", "delete"),
    ],
    ids=str,
)
def test_moebius_inspect_refuses_a_damaged_corpus_in_one_line(
    case: Case, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy / case.file, case)
    line = said_by(capsys, "inspect", str(copy), "--verify")
    assert case.file in line


@pytest.mark.parametrize(
    "name",
    ["bytes_beyond_floats", "a_name_longer_than_files_have", "a_key_of_two_lines", "no_validation"],
)
def test_moebius_inspect_refuses_a_strange_manifest_in_one_line(
    name: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy / "manifest.json", MANIFEST_EDITS[name])
    said_by(capsys, "inspect", str(copy))


def run_file(place: Path, config: DataConfig) -> Path:
    tree = {
        "run_dir": str(place / "run"),
        "model": model_tree(vocab_size=VOCAB_SIZE),
        "data": config.model_dump(mode="json"),
        "train": {"num_steps": 2, "batch_size": 2},
        "optim": {"lr": 1e-3, "schedule": {"kind": "cosine", "warmup_steps": 1}},
    }
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    "case",
    [
        Case("rows.jsonl", "truncate"),
        Case("rows.jsonl", "null"),
        Case("rows.parquet", "truncate"),
        Case("rows.parquet", "empty"),
        Case("rows.txt.gz", "zero_page"),
        Case("rows.txt.gz", "folder"),
        Case("rows.jsonl", "delete"),
    ],
    ids=str,
)
def test_moebius_prepare_refuses_a_damaged_source_in_one_line(
    case: Case,
    sources: Path,
    sound: Sound,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(shutil.copy(sources / "a" / case.file, tmp_path))
    damage(path, case)
    config = source_config(tmp_path, sound.folder / "tokenizer.json", path)
    line = said_by(capsys, "prepare", str(run_file(tmp_path, config)), "--processes", "1")
    assert case.file in line


def test_moebius_prepare_refuses_a_recipe_of_two_lines_in_one(
    sound: Sound, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a manifest says is repeated in the refusal."""
    edit(copy / "manifest.json", lambda tree: tree["recipe"].update(source="a\nb"))
    config = source_config(tmp_path, sound.folder / "tokenizer.json", copy / "manifest.json")
    config = config.model_copy(update={"dir": str(copy)})
    line = said_by(capsys, "prepare", str(run_file(tmp_path, config)))
    assert str(copy) in line


@pytest.mark.parametrize(
    "case",
    [
        Case(LOG, "deep"),
        Case(LOG, "delete"),
        Case(LOG, "folder"),
        Case(LOG, "swap"),
        Case(LOG, "zero_page"),
    ],
    ids=str,
)
def test_moebius_audit_refuses_a_damaged_log_in_one_line(
    case: Case, logs_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(logs_copy / case.file, case)
    line = said_by(capsys, "audit", str(logs_copy.parent))
    assert str(logs_copy) in line


@pytest.mark.parametrize(
    "name", ["the_header_left_out", "a_list_as_a_reader", "rows_that_are_null", "an_epoch_far_on"]
)
def test_moebius_audit_refuses_a_strange_log_in_one_line(
    name: str, logs_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_log(logs_copy / LOG, LOG_EDITS[name])
    line = said_by(capsys, "audit", str(logs_copy.parent))
    assert str(logs_copy) in line


def test_there_are_many_cases() -> None:
    """Damages by chance and damages that were thought of, each of another kind or place."""
    by_chance = (CORPUS_CASES, SOURCE_CASES, TOKENIZER_CASES, AUDIT_CASES, JOURNAL_CASES)
    thought_of = (
        *(MANIFEST_EDITS, PACK_EDITS, WRITTEN),
        *(TOKENIZER_EDITS, LOG_EDITS, JOURNAL_EDITS),
    )
    cases = len(set(itertools.chain(*by_chance))) + sum(map(len, thought_of))
    assert cases >= 300, f"only {cases} cases"

"""What makes a folder a checkpoint: a commit record, written last, that vouches for each file."""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from moebius.config import ConfigNode
from moebius.errors import CheckpointError

RECORD_NAME = "commit.json"


class FileEntry(ConfigNode):
    """One file of a checkpoint."""

    size: int
    sha256: str


class CommitRecord(ConfigNode):
    """What a checkpoint holds."""

    format: Literal[1] = 1
    step: int
    """optimizer steps done"""
    position: int
    """samples of the training stream consumed"""
    corpus: str
    """fingerprint of tokenizer and tokens, see `Manifest.fingerprint`"""
    config: dict[str, Any]
    """resolved configuration of the run"""
    program: list[str]
    """the unrolled visits, as layer@depth"""
    callbacks: dict[str, dict[str, Any]]
    """state of each callback that has one"""
    files: dict[str, FileEntry]
    """every file beside the record"""


def seal(folder: Path, record: CommitRecord) -> None:
    """Force every file in `folder` to disk, then write the record with their sizes and hashes."""
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = FileEntry(size=path.stat().st_size, sha256=_sha256(path))
    temporary = folder / f"{RECORD_NAME}.tmp"
    temporary.write_text(record.model_copy(update={"files": files}).model_dump_json(indent=1))
    _sync(temporary)
    os.replace(temporary, folder / RECORD_NAME)
    _sync(folder)


def publish(folder: Path, final: Path) -> None:
    """Give a sealed folder its name; the rename is the moment from which the checkpoint exists."""
    os.replace(folder, final)
    _sync(final.parent)


def read_record(folder: Path) -> CommitRecord:
    """The record of a checkpoint, its files verified against it.

    Raises CheckpointError naming the first file that is missing or differs in size or hash.
    """
    path = folder / RECORD_NAME
    try:
        record = CommitRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"checkpoint '{folder}': no valid {RECORD_NAME}: {reason}") from None
    for name, entry in record.files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint '{folder}': {name} is missing")
        if file.stat().st_size != entry.size:
            raise CheckpointError(
                f"checkpoint '{folder}': {name} has {file.stat().st_size} bytes, "
                f"{entry.size} were committed"
            )
        if _sha256(file) != entry.sha256:
            raise CheckpointError(f"checkpoint '{folder}': {name} was changed after its commit")
    return record


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What makes a folder a checkpoint: a commit record, written last, that vouches for each file."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moebius.config import ConfigNode
from moebius.errors import CheckpointError
from moebius.files import file_sha256, sync, write_whole

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
    tokens: int
    """the same in tokens"""
    stream: dict[str, Any] = Field(default_factory=dict)
    """what else the stream needs to go on there"""
    corpus: str
    """fingerprint of tokenizer and tokens, see `Manifest.fingerprint`"""
    config: dict[str, Any]
    """resolved configuration of the run"""
    program: list[str]
    """the unrolled visits, as layer@depth"""
    callbacks: dict[str, dict[str, Any]]
    """state of each callback that has one"""
    processes: int = 1
    """how many trained it"""
    teacher: str | None = None
    """hash of the weights that the run distils from"""
    files: dict[str, FileEntry]
    """every file beside the record"""


def seal(folder: Path, record: CommitRecord) -> None:
    """Force every file in `folder` to disk, then write the record with their sizes and hashes."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = FileEntry(size=path.stat().st_size, sha256=file_sha256(path))
    sealed = record.model_copy(update={"files": files})
    write_whole(folder / RECORD_NAME, sealed.model_dump_json(indent=1))


def publish(folder: Path, final: Path) -> None:
    """Give a sealed folder its name; the rename is the moment from which the checkpoint exists."""
    os.replace(folder, final)
    sync(final.parent)


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
        if file_sha256(file) != entry.sha256:
            raise CheckpointError(f"checkpoint '{folder}': {name} was changed after its commit")
    return record

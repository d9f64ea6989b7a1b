"""What makes some files a checkpoint: a commit record, written last, that vouches for each."""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from moebius.config import ConfigNode
from moebius.files import seal, unseal

RECORD_NAME = "commit.json"
INDEX_NAME = "index.json"


class FileEntry(ConfigNode):
    """One file of a checkpoint."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "FileEntry":
        """That of a file with some content."""
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())


class CommitRecord(ConfigNode):
    """What a checkpoint holds."""

    format: Literal[2] = 2
    step: int
    """optimizer steps done"""
    position: int
    """samples of the training stream consumed"""
    tokens: int
    """the same in tokens"""
    skipped: list[tuple[int, int]] = Field(default_factory=list)
    """ranges of positions that were left out"""
    rewound: list[tuple[int, int]] = Field(default_factory=list)
    """see `Run.rewound`"""
    stream: dict[str, Any] = Field(default_factory=dict)
    """what else the stream needs to go on there"""
    corpus: str
    """fingerprint of tokenizer and tokens, see `Manifest.fingerprint`"""
    config: dict[str, Any]
    """resolved configuration of the run; with its seed all random numbers are functions of the
    step and the sample"""
    program: list[str]
    """the unrolled visits, as layer@depth"""
    callbacks: dict[str, dict[str, Any]]
    """state of each callback that has one"""
    processes: int = 1
    """how many trained it"""
    teacher: str | None = None
    """fingerprint of the weights that the run distils from"""
    evaluation: float | None = None
    """validation loss at this step, where there was an evaluation"""
    files: dict[str, FileEntry]
    """every file beside the record"""

    @property
    def weights(self) -> str:
        """Fingerprint of the files that hold the model."""
        names = sorted(name for name in self.files if name.startswith("model-"))
        return "+".join(self.files[name].sha256 for name in names)

    def text(self) -> str:
        """The record as it is written, with a checksum of itself."""
        return seal(self.model_dump(mode="json"))

    @classmethod
    def read(cls, text: bytes) -> "CommitRecord":
        """Raises ValueError where it is damaged."""
        tree = unseal(text)
        if tree.get("format") != 2:
            raise ValueError(f"its format is {json.dumps(tree.get('format'))}, not 2")
        if seal(tree).encode() != text:
            raise ValueError("it is not as it was written")
        return cls.model_validate_json(json.dumps(tree))
